"""A shop of one's own for each test, or one whose folder is put back after it."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from krea_dagster.emulator import Emulator
from tests.dagster_bench import OpenAccount
from tests.spend.project_harness import Shop

NAMES = ("ash", "birch", "cedar", "date")


@pytest.fixture
def shop(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> Shop:
    """An empty table, and an account that nobody else uses."""
    return Shop(tmp_path, emulator, open_account())


@pytest.fixture
def stocked(shop: Shop) -> Shop:
    """A shop that has bought its four rows and written its manifests."""
    shop = shop.with_rows(*NAMES)
    shop.buy()
    return shop


@pytest.fixture(scope="session")
def _bought_once(
    tmp_path_factory: pytest.TempPathFactory, emulator: Emulator, open_account: OpenAccount
) -> Shop:
    shop = Shop(tmp_path_factory.mktemp("bought"), emulator, open_account()).with_rows(*NAMES)
    shop.buy()
    shutil.copytree(shop.folder / "krea", shop.folder / "honest")
    return shop


@pytest.fixture
def bought(_bought_once: Shop) -> Iterator[Shop]:
    """The same, for tests that forge and do not buy: all of them look at one purchase."""
    yield _bought_once
    shutil.rmtree(_bought_once.folder / "krea")
    shutil.copytree(_bought_once.folder / "honest", _bought_once.folder / "krea")

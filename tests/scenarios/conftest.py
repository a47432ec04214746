"""A project whose journal is not in its storage root, so that each can be exchanged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from krea_dagster.emulator import Emulator
from tests.engine.conftest import journal_url
from tests.engine.harness import ServerClock
from tests.spend.project_harness import ProjectHarness

__all__ = ["journal_url"]

KEY = "sk-of-the-scenarios-0001-Zq81"


@pytest.fixture
def clock() -> ServerClock:
    """The server's clock, which a test may move."""
    return ServerClock()


@pytest.fixture
def server(tmp_path: Path, clock: ServerClock) -> Iterator[Emulator]:
    """An emulator for this test."""
    state = tmp_path / "server"
    with Emulator(
        state=state, latency_s=0.01, latency_jitter=0.0, clock=clock, task_lifetime_s=86400
    ) as emulator:
        emulator.world.add_account(KEY, 10_000_000)
        yield emulator


@pytest.fixture
def shop(tmp_path: Path, server: Emulator) -> ProjectHarness:
    """A project with four rows."""
    folder = tmp_path / "shop"
    folder.mkdir()
    journal_url = f"sqlite:///{tmp_path / 'journal' / 'journal.db'}"
    shop = ProjectHarness(folder, server, KEY).with_settings(journal_url=journal_url)
    return shop.with_rows("ash", "birch", "cedar", "date")

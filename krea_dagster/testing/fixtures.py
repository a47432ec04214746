"""Fixtures for pytest: ``pytest_plugins = ["krea_dagster.testing.fixtures"]`` in a conftest."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from krea_dagster.testing.fake_krea import FakeKrea
from krea_dagster.testing.small_table import write_prompts


@pytest.fixture
def fake_krea(tmp_path: Path) -> Iterator[FakeKrea]:
    """A ``KreaResource`` whose EvoLink is an emulator in this process, in a folder of the test."""
    krea = FakeKrea(storage=str(tmp_path / "krea"))
    yield krea
    krea.close()


@pytest.fixture
def krea_prompts(tmp_path: Path) -> str:
    """The path of a small prompt table: four prompts in two categories."""
    return write_prompts(tmp_path)

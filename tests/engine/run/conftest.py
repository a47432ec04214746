"""The harness of the run's tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.engine.harness import EngineHarness, open_harness


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineHarness]:
    """Return an engine whose emulator finishes a task within 20 ms."""
    with open_harness(tmp_path) as opened:
        yield opened

"""A folder in which the command krea-dagster can be used, with an emulated account."""

from __future__ import annotations

from pathlib import Path

import pytest

from krea_dagster.emulator import Emulator
from tests.cli.shell import Shell
from tests.dagster_bench import OpenAccount


@pytest.fixture
def shell(
    *,
    tmp_path: Path,
    dagster_home: Path,
    emulator: Emulator,
    open_account: OpenAccount,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Shell:
    variables = {
        "EVOLINK_API_KEY": open_account(),
        "EVOLINK_BASE_URL": emulator.url,
        "KREA_PROMPTS": str(tmp_path / "prompts.parquet"),
        "KREA_STORAGE": str(tmp_path / "krea"),
        "KREA_PARTITION_BY": "hash:2",
        "DAGSTER_HOME": str(dagster_home),
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Shell(tmp_path, capsys, monkeypatch)

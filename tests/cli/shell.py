"""The command krea-dagster, run in the process of a test."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import krea_dagster.cli.terminal  # noqa: F401 - or its consoles keep the COLUMNS of one test
from krea_dagster import cli
from tests.dagster_bench import write_table


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass(frozen=True)
class Shell:
    """A folder with a prompt table, and the environment that names it."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    patch: pytest.MonkeyPatch

    def table(self, **columns: Any) -> None:
        write_table(self.folder / "prompts.parquet", columns)

    def run(self, *arguments: str) -> Outcome:
        """Run the command."""
        return run_command(self.patch, self.capture, *arguments)


def run_command(
    patch: pytest.MonkeyPatch, capture: pytest.CaptureFixture[str], *arguments: str
) -> Outcome:
    """Run the command in this process, which spares it four seconds of imports."""
    patch.setattr(sys, "argv", ["krea-dagster", *arguments])
    capture.readouterr()
    with pytest.raises(SystemExit) as ended:
        cli.run()
    captured = capture.readouterr()
    code = ended.value.code
    return Outcome(code if isinstance(code, int) else 0, captured.out, captured.err)

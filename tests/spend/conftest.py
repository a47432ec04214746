"""Projects of the tests: a new one for each test, or a shared one that is restored afterwards."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest

from krea_dagster.emulator import Emulator
from tests.cli.shell import Outcome, run_command
from tests.dagster_bench import OpenAccount
from tests.spend.project_harness import CommandOn, ProjectHarness

NAMES = ("ash", "birch", "cedar", "date")


@pytest.fixture
def project(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> ProjectHarness:
    """An empty table, and a new account."""
    return ProjectHarness(tmp_path, emulator, open_account())


@pytest.fixture
def bought_project(project: ProjectHarness) -> ProjectHarness:
    """A project that has bought its four rows and written its manifests."""
    project = project.with_rows(*NAMES)
    project.buy()
    return project


@pytest.fixture(scope="session")
def _bought_once(
    tmp_path_factory: pytest.TempPathFactory, emulator: Emulator, open_account: OpenAccount
) -> ProjectHarness:
    project = ProjectHarness(tmp_path_factory.mktemp("bought"), emulator, open_account()).with_rows(
        *NAMES
    )
    project.buy()
    shutil.copytree(project.folder / "krea", project.folder / "honest")
    return project


@pytest.fixture
def shared_project(_bought_once: ProjectHarness) -> Iterator[ProjectHarness]:
    """The same for tests that only read it or change its files, which are restored."""
    yield _bought_once
    shutil.rmtree(_bought_once.folder / "krea")
    shutil.copytree(_bought_once.folder / "honest", _bought_once.folder / "krea")


@pytest.fixture
def command_on(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandOn:
    """Return a function that gives the command krea-dagster on a project."""

    def of(project: ProjectHarness) -> Callable[..., Outcome]:
        monkeypatch.setenv("KREA_STORAGE", str(project.folder / "krea"))
        monkeypatch.setenv("KREA_PROMPTS", str(project.folder / "prompts.parquet"))
        return partial(run_command, monkeypatch, capsys)

    return of

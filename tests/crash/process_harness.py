"""Runs of the engine in separate processes, which share one journal and one emulator."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from krea_dagster.emulator import Emulator
from krea_dagster.engine.budget import column_scope
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.models import ImageRequest
from tests.engine.harness import make_request

#: Importing the engine takes longer than many runs here, so each process is a fork of one that
#: has only imported it.
_PROCESSES: Final = multiprocessing.get_context("forkserver")
_PROCESSES.set_forkserver_preload(["tests.crash.engine_worker"])


@dataclass(frozen=True)
class Job:
    """One run: rows ``start`` to ``start + count``, every ``two_k``-th of them in 2K.

    ``file_bytes`` bounds the size of the files that the process may write. Every second row is of
    the campaign autumn, the others of spring.
    """

    emulator: str
    journal: str
    storage: str
    run_id: str
    start: int = 0
    count: int = 0
    two_k: int = 0
    partition: str = "p"
    max_in_flight: int = 64
    run_units: int | None = None
    day_units: int | None = None
    file_bytes: int | None = None
    budgets: tuple[str, ...] = ()


def requests(job: Job) -> list[ImageRequest]:
    """The requests of a job: the same rows request the same images in every process."""
    return [
        make_request(seed=row + 1, quality="2K" if job.two_k and row % job.two_k == 0 else "1K")
        for row in range(job.start, job.start + job.count)
    ]


def wanted(job: Job) -> Iterator[RequestedImage]:
    """The requested images of a job, with partition and campaign."""
    for request in requests(job):
        campaign = "autumn" if request.seed % 2 else "spring"
        yield RequestedImage(request, job.partition, scopes=(column_scope("campaign", campaign),))


class Process:
    """A run in a separate process, which waits for ``go``."""

    def __init__(self, job: Job) -> None:
        from tests.crash.engine_worker import work  # noqa: PLC0415 - which imports this file

        self._here, there = _PROCESSES.Pipe()
        self._process = _PROCESSES.Process(target=work, args=(job, there), daemon=True)
        self._process.start()
        there.close()

    def go(self) -> None:
        """Let it run."""
        self._here.send("go")

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def end(self) -> tuple[int | None, dict[str, Any]]:
        """Wait for its end; return its exit code and its report."""
        report: dict[str, Any] = {}
        assert self._here.poll(120), "the process does not end"
        with suppress(EOFError):
            report = self._here.recv()
        self._process.join(60)
        return self._process.exitcode, report

    def abandon(self) -> None:
        """End it, if it still runs."""
        self._process.kill()
        self._process.join()
        self._here.close()


class ProcessHarness:
    """One emulator, one journal and one storage root, and processes that use them together."""

    def __init__(self, folder: Path, emulator: Emulator, journal: str | None = None) -> None:
        self.emulator = emulator
        self._all: list[Process] = []
        self.job = Job(
            emulator=emulator.url,
            journal=journal or f"sqlite:///{folder / 'journal.db'}",
            storage=str(folder / "images"),
            run_id="",
        )

    def start(self, *runs: dict[str, Any]) -> list[Process]:
        """Start these runs, all at once when each is ready."""
        started = [self.prepare(**run) for run in runs]
        for process in started:
            process.go()
        return started

    def prepare(self, **run: Any) -> Process:
        """Start a process that waits for ``go``."""
        job = replace(self.job, **{"run_id": f"run-{len(self._all)}", **run})
        process = Process(job)
        self._all.append(process)
        return process

    def close(self) -> None:
        """End what still runs."""
        for process in self._all:
            process.abandon()

    def records(self) -> list[Record]:
        """Every request of the journal."""
        with closing(Journal(self.job.journal)) as journal:
            return list(journal.all_records())

    def assert_accounts_agree(
        self, *, tasks: int | None = None, forgotten: bool = False
    ) -> dict[str, Any]:
        """Compare the emulator's totals with the journal, and return them.

        Nothing was bought twice, and both know the same tasks and the same charges. ``forgotten``:
        the journal has lost purchases: it took their files up, or was told that they were replayed.
        """
        stats = self.emulator.stats()
        assert stats["bodies_bought_more_than_once"] == 0
        with closing(Journal(self.job.journal)) as journal:
            charges = [charge for charge in journal.charges() if charge.task_id]
        known = {charge.task_id: charge.charged_units for charge in charges}
        charged = {task["task_id"]: task["charged_units"] for task in stats["tasks"]}
        if forgotten:
            assert known.keys() <= charged.keys()
            assert all(known[task] in (0, charged[task]) for task in known)
        else:
            assert known == charged
        assert tasks is None or stats["creates"] == tasks
        return stats


def outcomes(processes: Sequence[Process]) -> list[tuple[int | None, dict[str, Any]]]:
    """Wait for all of them."""
    return [process.end() for process in processes]

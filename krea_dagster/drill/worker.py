"""A worker process: production's engine, and the edges at which it kills itself.

Run as a module it is a fork server. Importing the engine takes longer than many a worker runs, so
it is imported once, and each worker is a fork. The fork server reads one JSON object per line,
``{"start": JOB}`` or ``{"kill": NUMBER}``. It first writes ``{"ready": PID}``, then
``{"started": NUMBER}`` and ``{"ended": NUMBER, "status": STATUS}``, where STATUS is an exit code
or a negative signal number. When its input ends, it kills the workers that still run, and ends.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Final

from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.krea import Krea
from krea_dagster.application.purchase import buy
from krea_dagster.application.run import run
from krea_dagster.drill.instrumented import (
    InstrumentedClient,
    MakeClient,
    WorkerContext,
    instrumented_krea,
)
from krea_dagster.drill.job import PARTITION, WorkerJob, read_requests
from krea_dagster.engine.resolution import parse_resolution
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.errors import ConfigError, JournalError, StorageError

#: The exit code of a worker that stopped with an error meant for people.
STOPPED: Final = 3


def work(job: WorkerJob, make_client: MakeClient = InstrumentedClient) -> None:
    """Do a job, and print on stderr how it ended."""
    krea = instrumented_krea(WorkerContext.of(job), make_client)
    ended = _carry(job, krea) if job.again is None else _regenerate(job, krea)
    print(json.dumps({"worker": job.number, **ended}), file=sys.stderr)  # noqa: T201 - its log


def _carry(job: WorkerJob, krea: Krea) -> dict[str, Any]:
    requests = read_requests(job.paths.folder)[: job.rows]
    report = buy(
        krea,
        [RequestedImage(request, PARTITION) for request in requests],
        run_id=f"worker-{job.number}",
        resolutions={key: parse_resolution(text) for key, text in job.resolutions.items()},
    )
    return {
        "seconds": round(report.seconds, 3),
        "delivered": report.progress.delivered,
        "failed": report.progress.failed,
        "left": dict(report.left_reasons),
        "stopped": None if report.stopped is None else str(report.stopped),
    }


def _regenerate(job: WorkerJob, krea: Krea) -> dict[str, Any]:
    """Regenerate rows as ``materialize --again`` does."""
    rows = list(job.again or ())
    options = BuyOptions(regenerate=rows, wait=True)
    ran = run(krea, krea.table(), None, options, run_id=f"worker-{job.number}")
    return {
        "again": rows,
        "seconds": round(ran.report.seconds, 3),
        "delivered": ran.report.progress.delivered,
        "left": ran.report.progress.left,
    }


# -- the fork server --------------------------------------------------------------------------


class ForkServer:
    """Forks a worker for each job, and reports when it has ended. One thread, no event loop."""

    def __init__(self, make_client: MakeClient) -> None:
        self._make_client = make_client
        self._workers: dict[int, int] = {}  # process id to the job's number
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)

    def serve(self) -> None:
        """Work until stdin ends; then kill the workers that still run."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._woken)
        _send({"ready": os.getpid()})
        gc.freeze()  # imported objects are never collected, so the forks' pages stay shared
        try:
            for line in self._lines():
                message = json.loads(line)
                if "start" in message:
                    self._start(WorkerJob(**message["start"]))
                else:
                    self._kill(message["kill"])
        finally:
            for process in self._workers:
                os.kill(process, signal.SIGKILL)
            while self._workers:
                self._reap(block=True)

    def _lines(self) -> Iterator[bytes]:
        """Yield the lines of stdin, and reap ended workers while waiting for them."""
        rest = b""
        while True:
            ready, _, _ = select.select([sys.stdin.fileno(), self._wake], [], [])
            if self._wake in ready:
                os.read(self._wake, 4096)
                self._reap(block=False)
            if sys.stdin.fileno() in ready:
                piece = os.read(sys.stdin.fileno(), 65536)
                if not piece:
                    return
                *lines, rest = (rest + piece).split(b"\n")
                yield from lines

    def _start(self, job: WorkerJob) -> None:
        process = os.fork()
        if process == 0:
            os._exit(self._run(job))
        self._workers[process] = job.number
        _send({"started": job.number})

    def _run(self, job: WorkerJob) -> int:
        """Do a job in the forked process, and return the exit code."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._wake, self._woken, sys.stdin.fileno(), sys.stdout.fileno()):
            os.close(descriptor)
        try:
            work(job, self._make_client)
        except (ConfigError, JournalError, StorageError) as error:
            kind = type(error).__name__
            print(f"worker {job.number} stopped: {kind}: {error}", file=sys.stderr)  # noqa: T201 - its log
            return STOPPED
        except BaseException:  # noqa: BLE001 - the drill must learn of every error
            print(f"worker {job.number} at {job.edge!r}:", file=sys.stderr)  # noqa: T201 - its log
            traceback.print_exc()
            return 1
        finally:
            sys.stderr.flush()
        return 0

    def _kill(self, number: int) -> None:
        for process, of in self._workers.items():
            if of == number:  # not reaped yet, so the id is still this worker's
                os.kill(process, signal.SIGKILL)

    def _reap(self, *, block: bool) -> None:
        with suppress(ChildProcessError):
            while True:
                process, status = os.waitpid(-1, 0 if block else os.WNOHANG)
                if process == 0:
                    return
                number = self._workers.pop(process, None)
                if number is None:
                    continue  # another process's child: a namespace's first process inherits them
                _send({"ended": number, "status": os.waitstatus_to_exitcode(status)})


def _send(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # the drill has ended
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def main(make_client: MakeClient = InstrumentedClient) -> None:
    """Run the fork server."""
    ForkServer(make_client).serve()


if __name__ == "__main__":
    main()

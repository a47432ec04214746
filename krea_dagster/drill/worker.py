"""The drill's worker process: the engine as production runs it, and where it kills itself.

Run as a module it is a fork server: importing the engine takes longer than many a worker lives,
so it is imported once, and each worker is a fork of it. It reads one JSON object per line,
``{"start": JOB}`` or ``{"kill": NUMBER}``, and writes ``{"ready": PID}`` at first, then
``{"started": NUMBER}`` and ``{"ended": NUMBER, "status": STATUS}``: an exit code, or a signal's
number with a minus. When its input ends, it kills what still runs, and ends.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import select
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

from krea_dagster.drill.instrumented import DrilledClient, Life, MakeClient, drilled_resource
from krea_dagster.drill.job import PARTITION, Job, read_requests
from krea_dagster.engine.resolution import parse_resolution
from krea_dagster.engine.run.runner import Wanted
from krea_dagster.errors import ConfigError, JournalError, StorageError

#: The exit code of a worker that has stopped with an error for the person who reads it.
STOPPED: Final = 3


def carry(job: Job, make_client: MakeClient = DrilledClient) -> None:
    """Live one life: carry the job's rows as far as they go, and say on stderr how it ended."""
    krea = drilled_resource(Life.of(job), make_client)
    if job.again is not None:
        from krea_dagster.drill.regenerate_worker import ask_again  # noqa: PLC0415 - it needs all of Dagster

        ask_again(job, krea)
        return
    wanted = [Wanted(request, PARTITION) for request in read_requests(Path(job.folder))[: job.rows]]
    report = krea.carry(
        wanted,
        run_id=f"worker-{job.number}",
        resolutions={key: parse_resolution(text) for key, text in job.resolutions.items()},
    )
    ended = {
        "worker": job.number,
        "seconds": round(report.seconds, 3),
        "delivered": report.progress.delivered,
        "failed": report.progress.failed,
        "left": dict(report.left_reasons),
        "stopped": None if report.stopped is None else str(report.stopped),
    }
    print(json.dumps(ended), file=sys.stderr)  # noqa: T201 - the worker's log


# -- the fork server --------------------------------------------------------------------------


class ForkServer:
    """Forks a worker for each job, and tells when it has ended. One thread, no event loop."""

    def __init__(self, make_client: MakeClient) -> None:
        self._make_client = make_client
        self._workers: dict[int, int] = {}  # process id to the job's number
        self._wake, self._woken = os.pipe()
        os.set_blocking(self._woken, False)

    def serve(self) -> None:
        """Work until stdin ends; then kill what still runs."""
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)
        signal.set_wakeup_fd(self._woken)
        _say({"ready": os.getpid()})
        gc.freeze()  # what is imported is never collected, so the forks' pages stay shared
        try:
            for line in self._lines():
                message = json.loads(line)
                if "start" in message:
                    self._start(Job(**message["start"]))
                else:
                    self._kill(message["kill"])
        finally:
            for process in self._workers:
                os.kill(process, signal.SIGKILL)
            while self._workers:
                self._reap(block=True)

    def _lines(self) -> Iterator[bytes]:
        """The lines of stdin; ended workers are reaped while waiting for them."""
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

    def _start(self, job: Job) -> None:
        if job.again is not None:  # once, and not in each fork
            importlib.import_module("krea_dagster.drill.regenerate_worker")
        process = os.fork()
        if process == 0:
            os._exit(self._live(job))
        self._workers[process] = job.number
        _say({"started": job.number})

    def _live(self, job: Job) -> int:
        """The life of a forked worker; returns its exit code."""
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for descriptor in (self._wake, self._woken, sys.stdin.fileno(), sys.stdout.fileno()):
            os.close(descriptor)
        try:
            carry(job, self._make_client)
        except (ConfigError, JournalError, StorageError) as error:
            kind = type(error).__name__
            print(f"worker {job.number} stopped: {kind}: {error}", file=sys.stderr)  # noqa: T201 - its log
            return STOPPED
        except BaseException:  # noqa: BLE001 - whatever it is, the drill must hear of it
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
                    continue  # a stranger's child, which the first process of a namespace inherits
                _say({"ended": number, "status": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def main(make_client: MakeClient = DrilledClient) -> None:
    """Be the fork server."""
    ForkServer(make_client).serve()


if __name__ == "__main__":
    main()

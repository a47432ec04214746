"""The drill's worker process: the engine as it is, and the places where it kills itself.

What is exchanged for the drill are subclasses of the journal, the storage and the client, which
do exactly what their parents do and count how often an edge is passed.

Run as a module it is a fork server: importing the engine takes longer than many a worker lives,
so it is imported once, and each worker is a fork of it. It reads one JSON object per line,
``{"start": JOB}`` or ``{"kill": NUMBER}``, and writes ``{"started": NUMBER}`` and
``{"ended": NUMBER, "status": STATUS}``: an exit code, or a signal's number with a minus. When
its input ends, it kills what still runs, and ends.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import select
import signal
import sys
import threading
import traceback
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any, Final

import httpx

from krea_dagster.api.client import KreaClient
from krea_dagster.api.files import Download, Sink
from krea_dagster.drill import edges
from krea_dagster.drill.job import API_KEY, PARTITION, Job, journal_url, read_requests, storage_root
from krea_dagster.engine.changes import Change
from krea_dagster.engine.images import ImageStore
from krea_dagster.engine.journal import Journal
from krea_dagster.engine.latency import Latencies
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import parse_resolution
from krea_dagster.engine.runner import Runner, Wanted
from krea_dagster.engine.storage import Storage
from krea_dagster.models import ImageRequest

_CREATE: Final = "/v1/images/generations"
_TASKS: Final = "/v1/tasks"


class Guard:
    """Kills this process when it passes one edge for the n-th time. Thread-safe."""

    def __init__(self, edge: str, passage: int) -> None:
        self._edge = edge
        self._left = passage
        self._lock = threading.Lock()

    def passing(self, edge: str) -> None:
        """Say that an edge is passed now."""
        if edge != self._edge:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class DrilledJournal(Journal):
    """The journal, with an edge before and after each commit."""

    def __init__(self, url: str, guard: Guard) -> None:
        super().__init__(url)
        self._guard = guard

    def plan(self, wanted: Iterable[tuple[ImageRequest, str]], *, run_id: str, at: datetime) -> int:
        """Enter new requests."""
        self._guard.passing(edges.BEFORE_PLANNED)
        added = super().plan(wanted, run_id=run_id, at=at)
        self._guard.passing(edges.AFTER_PLANNED)
        return added

    def claim(self, keys: Iterable[str], owner: str, at: datetime) -> set[str]:
        """Claim requests."""
        self._guard.passing(edges.BEFORE_CLAIM)
        mine = super().claim(keys, owner, at)
        self._guard.passing(edges.AFTER_CLAIM)
        return mine

    def release(self, owner: str) -> None:
        """Give up all claims."""
        self._guard.passing(edges.BEFORE_RELEASE)
        super().release(owner)
        self._guard.passing(edges.AFTER_RELEASE)

    def append(self, changes: Sequence[Change], **keywords: Any) -> list[Any]:
        """Write events. A kill before the commit takes the whole group with it."""
        for change in changes:
            self._guard.passing(edges.before(change.event))
        answers = super().append(changes, **keywords)
        for change, answer in zip(changes, answers, strict=True):
            if isinstance(answer, Record):
                self._guard.passing(edges.after(change.event))
        return answers


class DrilledStorage(Storage):
    """The storage, with an edge before and after a file gets its name."""

    def __init__(self, root: str, guard: Guard) -> None:
        super().__init__(root)
        self._guard = guard

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished file its name."""
        self._guard.passing(edges.BEFORE_RENAME)
        super().publish(temporary, name)
        self._guard.passing(edges.AFTER_RENAME)


class DrilledTransport(httpx.AsyncHTTPTransport):
    """httpx's own transport, with edges before a request leaves and before its answer is read.

    By the second, the emulator has committed what it answers: it does so before the first byte.
    """

    def __init__(self, guard: Guard) -> None:
        super().__init__(limits=httpx.Limits(max_connections=16, max_keepalive_connections=16))
        self._guard = guard

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request."""
        path = request.url.path
        if path == _CREATE:
            self._guard.passing(edges.BEFORE_POST)
        elif path.startswith(_TASKS):
            self._guard.passing(edges.BEFORE_READ)
        response = await super().handle_async_request(request)
        if path == _CREATE and response.status_code == httpx.codes.OK:
            self._guard.passing(edges.TASK_EXISTS)
        elif path.startswith(_TASKS):
            self._guard.passing(edges.AFTER_READ)
        return response


class DrilledClient(KreaClient):
    """The client, with edges around a download and in the midst of it."""

    def __init__(self, url: str, guard: Guard) -> None:
        super().__init__(
            API_KEY,
            base_url=url,
            transport=DrilledTransport(guard),
            transport_reports_unsent=True,  # it is httpx's own
        )
        self._guard = guard

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Fetch a result link to a sink."""
        write = sink if callable(sink) else sink.write

        def through(piece: bytes) -> object:
            written = write(piece)
            self._guard.passing(edges.DURING_DOWNLOAD)
            return written

        self._guard.passing(edges.BEFORE_DOWNLOAD)
        done = await super().download(url, sink=through, max_bytes=max_bytes)
        self._guard.passing(edges.AFTER_DOWNLOAD)
        return done


#: Makes a worker's client.
MakeClient = Callable[[str, Guard], KreaClient]


def carry(job: Job, make_client: MakeClient = DrilledClient) -> None:
    """Live one life: carry the job's rows as far as they go, and say on stderr how it ended."""
    folder = Path(job.folder)
    guard = Guard(job.edge, job.passage)

    @asynccontextmanager
    async def connect() -> AsyncIterator[KreaClient]:
        async with make_client(job.url, guard) as client:
            yield client

    runner = Runner(
        connect=connect,
        journal=DrilledJournal(journal_url(folder), guard),
        images=ImageStore(DrilledStorage(str(storage_root(folder)), guard)),
        run_id=f"worker-{job.number}",
        policy=Policy(**job.policy),
        max_in_flight=job.max_in_flight,
        resolutions={key: parse_resolution(text) for key, text in job.resolutions.items()},
        randomness=random.Random(f"{job.seed}:{job.number}"),  # noqa: S311 - nothing secret
        latencies=Latencies.known({"1K": job.latency_s}),
    )
    wanted = [Wanted(request, PARTITION) for request in read_requests(folder)[: job.rows]]
    report = asyncio.run(runner.run(wanted))
    ended = {
        "worker": job.number,
        "seconds": round(report.seconds, 3),
        "delivered": report.progress.delivered,
        "failed": report.progress.failed,
        "left": dict(Counter(report.left.values())),
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
                number = self._workers.pop(process)
                _say({"ended": number, "status": os.waitstatus_to_exitcode(status)})


def _say(message: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):  # nobody listens any more
        os.write(sys.stdout.fileno(), json.dumps(message).encode() + b"\n")


def main(make_client: MakeClient = DrilledClient) -> None:
    """Be the fork server."""
    ForkServer(make_client).serve()


if __name__ == "__main__":
    main()

"""The engine as production runs it, with places where a worker kills itself. Nothing else differs.

What is exchanged for the drill are subclasses of the resource, the journal, the storage and the
client, and a transport around the client's own to the API's host. They do exactly what their
parents do, and count how often an edge is passed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import httpx

from krea_dagster.api.client import KreaClient
from krea_dagster.api.download import Download, Sink
from krea_dagster.api.transport import reports_unsent
from krea_dagster.api.wire import CREATE_PATH, TASKS_PATH
from krea_dagster.drill import edges
from krea_dagster.drill.job import Job
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import ImageRequest
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PromptTable

_OK: Final = 200


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

    def plan(
        self,
        wanted: Iterable[tuple[ImageRequest, str]],
        *,
        run_id: str,
        at: datetime,
        table_id: str = "",
    ) -> int:
        """Enter new requests."""
        self._guard.passing(edges.BEFORE_PLANNED)
        added = super().plan(wanted, run_id=run_id, at=at, table_id=table_id)
        self._guard.passing(edges.AFTER_PLANNED)
        return added

    def claim(self, keys: Iterable[str], owner: str) -> set[str]:
        """Claim requests."""
        self._guard.passing(edges.BEFORE_CLAIM)
        mine = super().claim(keys, owner)
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


class DrilledTransport(httpx.AsyncBaseTransport):
    """The transport to the API's host, with edges before a request leaves and after its answer.

    By the second, nobody in this process but the transport itself has heard of the answer.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, guard: Guard) -> None:
        self.inner = inner
        self.reports_unsent = reports_unsent(inner)
        self._guard = guard

    async def aclose(self) -> None:
        """Close the connections."""
        await self.inner.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request once."""
        path = request.url.path
        creates, reads = path == CREATE_PATH, path.startswith(TASKS_PATH)
        if creates:
            self._guard.passing(edges.BEFORE_POST)
        elif reads:
            self._guard.passing(edges.BEFORE_READ)
        response = await self.inner.handle_async_request(request)
        if creates and response.status_code == _OK:
            self._guard.passing(edges.TASK_EXISTS)
        elif reads:
            self._guard.passing(edges.AFTER_READ)
        return response


class DrilledClient(KreaClient):
    """The client over its own transport, with edges around each call and in a download."""

    def __init__(self, life: Life, api_key: str, **settings: Any) -> None:
        self._guard = life.guard
        super().__init__(api_key, now=life.clock.now, **settings)

    def _wrap_transport(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        return DrilledTransport(transport, self._guard)

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


class SetClock(SystemClock):
    """A wall clock that is ahead of this machine's, and is set once more while it is looked at.

    What never goes back, the seconds for pacing, is this machine's. Thread-safe.
    """

    def __init__(self, job: Job) -> None:
        self._ahead = timedelta(seconds=job.ahead_s)
        self._step = timedelta(seconds=job.step_s)
        self._left = job.step_after
        self._lock = threading.Lock()

    def now(self) -> datetime:
        """Return the time in UTC."""
        with self._lock:
            self._left -= 1
            if self._left == 0:
                self._ahead += self._step
            return super().now() + self._ahead


@dataclass(frozen=True)
class Life:
    """What a worker's parts share."""

    job: Job
    guard: Guard
    clock: SetClock

    @classmethod
    def of(cls, job: Job) -> Life:
        """A life as the job says."""
        return cls(job, Guard(job.edge, job.passage), SetClock(job))


#: Makes a worker's client, with the key and the settings that the resource gives it.
MakeClient = Callable[..., KreaClient]


def drilled_resource(life: Life, make_client: MakeClient) -> KreaResource:
    """The resource of a life. What differs is in its class, of which Dagster makes others."""
    job, guard = life.job, life.guard

    class DrilledResource(KreaResource):
        """KreaResource, with the drilled parts."""

        def open_storage(self) -> Storage:
            return DrilledStorage(self.storage, guard)

        @contextmanager
        def open_journal(self) -> Iterator[Journal]:
            with closing(DrilledJournal(self._journal_url(), guard)) as journal:
                yield journal

        def policy(self, ask_again: Iterable[str] = ()) -> Policy:
            return replace(super().policy(ask_again), **job.policy)

        @contextmanager
        def _runner(
            self,
            run_id: str,
            on_progress: Callable[[Progress], None],
            table: PromptTable | None = None,
        ) -> Iterator[Runner]:
            with super()._runner(run_id, on_progress, table) as runner:
                yield replace(
                    runner,
                    clock=life.clock,
                    randomness=random.Random(f"{job.seed}:{job.number}"),  # noqa: S311 - nothing secret
                    latencies=Latencies.known({"1K": job.latency_s}),
                )

        def _client(self, api_key: str, base_url: str) -> KreaClient:
            return make_client(
                life,
                api_key,
                base_url=base_url,
                timeout_s=self.timeout_s,
                download_timeout_s=self.download_timeout_s,
            )

    return DrilledResource(
        api_key=job.api_key,
        base_url=job.url,
        storage=str(job.place.storage),
        journal_url=job.place.journal_url,
        max_in_flight=job.max_in_flight,
        on_unknown=job.on_unknown,
        measure_images=False,  # it decides nothing, and costs more than all else here
    )

"""Production's engine with edges at which a worker kills itself. Nothing else differs.

The subclasses of the resource, the journal, the storage and the client, and the transport around
the client's own, do what their parents do and count how often an edge is passed.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from krea_dagster.application.krea import Krea
from krea_dagster.application.settings import Settings
from krea_dagster.drill import edges
from krea_dagster.drill.job import WorkerJob
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.claim_log import ClaimLog
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import ImageRequest

_OK: Final = 200


class KillSwitch:
    """Kills this process when it passes one edge for the n-th time. Thread-safe."""

    def __init__(self, edge: str, passage: int) -> None:
        self._edge = edge
        self._left = passage
        self._lock = threading.Lock()

    def passing(self, edge: str) -> None:
        """Report that an edge is passed now."""
        if edge != self._edge:
            return
        with self._lock:
            self._left -= 1
            if self._left == 0:
                os.kill(os.getpid(), signal.SIGKILL)


class InstrumentedClaims(ClaimLog):
    """The claims of the journal, with an edge before and after each commit."""

    def __init__(self, database: Database, switch: KillSwitch) -> None:
        super().__init__(database)
        self._switch = switch

    def claim(self, keys: Iterable[str], owner: str) -> set[str]:
        """Claim requests."""
        self._switch.passing(edges.BEFORE_CLAIM)
        claimed = super().claim(keys, owner)
        self._switch.passing(edges.AFTER_CLAIM)
        return claimed

    def release(self, owner: str) -> None:
        """Give up all claims."""
        self._switch.passing(edges.BEFORE_RELEASE)
        super().release(owner)
        self._switch.passing(edges.AFTER_RELEASE)


class InstrumentedJournal(Journal):
    """The journal, with an edge before and after each commit."""

    def __init__(self, url: str, switch: KillSwitch) -> None:
        super().__init__(url)
        self._switch = switch
        self.claims = InstrumentedClaims(self.database, switch)

    def plan(
        self,
        wanted: Iterable[tuple[ImageRequest, str]],
        *,
        run_id: str,
        at: datetime,
        table_id: str = "",
    ) -> int:
        """Enter new requests."""
        self._switch.passing(edges.BEFORE_PLANNED)
        added = super().plan(wanted, run_id=run_id, at=at, table_id=table_id)
        self._switch.passing(edges.AFTER_PLANNED)
        return added

    def append(self, changes: Sequence[Change], **keywords: Any) -> list[Any]:
        """Write events. A kill before the commit loses the whole group."""
        for change in changes:
            self._switch.passing(edges.before(change.event))
        results = super().append(changes, **keywords)
        for change, result in zip(changes, results, strict=True):
            if isinstance(result, Record):
                self._switch.passing(edges.after(change.event))
        return results


class InstrumentedStorage(Storage):
    """The storage, with an edge before and after a file gets its name."""

    def __init__(self, root: str, switch: KillSwitch) -> None:
        super().__init__(root)
        self._switch = switch

    def publish(self, temporary: Path, name: str) -> None:
        """Give a finished file its name."""
        self._switch.passing(edges.BEFORE_RENAME)
        super().publish(temporary, name)
        self._switch.passing(edges.AFTER_RENAME)


class InstrumentedTransport(httpx.AsyncBaseTransport):
    """The transport to the API's host, with edges before a request leaves and after its response.

    At the second edge only the transport has seen the response.
    """

    def __init__(self, inner: httpx.AsyncBaseTransport, switch: KillSwitch) -> None:
        self.inner = inner
        self.reports_unsent = reports_unsent(inner)
        self._switch = switch

    async def aclose(self) -> None:
        """Close the connections."""
        await self.inner.aclose()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request once."""
        path = request.url.path
        creates, reads = path == CREATE_PATH, path.startswith(TASKS_PATH)
        if creates:
            self._switch.passing(edges.BEFORE_POST)
        elif reads:
            self._switch.passing(edges.BEFORE_READ)
        response = await self.inner.handle_async_request(request)
        if creates and response.status_code == _OK:
            self._switch.passing(edges.TASK_EXISTS)
        elif reads:
            self._switch.passing(edges.AFTER_READ)
        return response


class InstrumentedClient(KreaClient):
    """The client over its own transport, with edges around each call and in a download."""

    def __init__(self, context: WorkerContext, api_key: str, **settings: Any) -> None:
        self._switch = context.switch
        super().__init__(api_key, now=context.clock.now, **settings)

    def _wrap_transport(self, transport: httpx.AsyncBaseTransport) -> httpx.AsyncBaseTransport:
        return InstrumentedTransport(transport, self._switch)

    async def download(
        self, url: str, *, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Fetch a result link to a sink."""
        write = sink if callable(sink) else sink.write

        def through(piece: bytes) -> object:
            written = write(piece)
            self._switch.passing(edges.DURING_DOWNLOAD)
            return written

        self._switch.passing(edges.BEFORE_DOWNLOAD)
        done = await super().download(url, sink=through, max_bytes=max_bytes)
        self._switch.passing(edges.AFTER_DOWNLOAD)
        return done


class ShiftedClock(SystemClock):
    """A wall clock that is ahead of this machine's, and is moved once more while it is read.

    The monotonic clock stays this machine's. Thread-safe.
    """

    def __init__(self, job: WorkerJob) -> None:
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
class WorkerContext:
    """What the instrumented parts of one worker share."""

    job: WorkerJob
    switch: KillSwitch
    clock: ShiftedClock

    @classmethod
    def of(cls, job: WorkerJob) -> WorkerContext:
        """Return the context of a job."""
        return cls(job, KillSwitch(job.edge, job.passage), ShiftedClock(job))


#: Makes a worker's client from its context, the key, and the resource's settings.
MakeClient = Callable[..., KreaClient]


def instrumented_krea(context: WorkerContext, make_client: MakeClient) -> Krea:
    """Return a worker's application, with the instrumented parts."""
    job, switch = context.job, context.switch

    class InstrumentedKrea(Krea):
        """Krea with the instrumented parts."""

        def open_storage(self) -> Storage:
            return InstrumentedStorage(self.settings.storage, switch)

        @contextmanager
        def open_journal(self) -> Iterator[Journal]:
            with closing(InstrumentedJournal(self.settings.journal_url, switch)) as journal:
                yield journal

        def policy(self, retry_errors: Iterable[str] = ()) -> Policy:
            return replace(super().policy(retry_errors), **job.policy)

        def run_options(self) -> Mapping[str, Any]:
            return {
                "clock": context.clock,
                "randomness": random.Random(f"{job.seed}:{job.number}"),  # noqa: S311 - nothing secret
                "latencies": Latencies.known({"1K": job.latency_s}),
            }

        def client(self, base_url: str) -> KreaClient:
            return make_client(
                context,
                self.key,
                base_url=base_url,
                timeout_s=self.settings.timeout_s,
                download_timeout_s=self.settings.download_timeout_s,
            )

    return InstrumentedKrea(
        Settings(
            api_key=job.api_key,
            base_url=job.url,
            prompts=str(job.paths.prompts),
            partition_by="hash:1",
            storage=str(job.paths.storage),
            journal_url=job.paths.journal_url,
            max_in_flight=job.max_in_flight,
            on_unknown=job.on_unknown,
            measure_images=False,  # it decides nothing, and takes more time than all else here
        )
    )

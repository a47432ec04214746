"""What the engine's tests share: requests, a writer of events, and a harness for runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import anyio
from sqlalchemy import Table, create_engine, select

from krea_dagster.api import KreaClient
from krea_dagster.emulator import Emulator
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.engine.policy import Policy
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.report import RunReport
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.states import Event, State, replay
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import BuyingClosed, JournalError
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.requests import request_key

NOW: Final = datetime(2026, 1, 1, tzinfo=timezone.utc)


def make_request(prompt: str = "a fox", **fields: Any) -> ImageRequest:
    """A request for one image, with its true identity."""
    what = {"size": "1:2", "quality": "1K", "seed": 7, "nsfw_check": False, **fields}
    key = request_key(prompt=prompt, **what)
    return ImageRequest(request_key=key, prompt=prompt, attempt=what.pop("attempt", 0), **what)


def make_requests(count: int, start: int = 0) -> list[ImageRequest]:
    """Requests that differ in their seed."""
    return [make_request(seed=number + 1) for number in range(start, start + count)]


IMAGE: Final[Mapping[str, Any]] = MappingProxyType(
    {
        "image_path": "images/a.png",
        "image_sha256": "0" * 64,
        "image_bytes": 10,
        "image_format": "PNG",
        "width": 704,
        "height": 1472,
    }
)

#: Columns that each event needs at least.
VALUES: Final[Mapping[Event, Mapping[str, Any]]] = MappingProxyType(
    {
        Event.SUBMITTING: {"partition_key": "p"},
        Event.ACCEPTED: {"reserved_units": 4500},
        Event.COMPLETED: {"result_url": "https://files.test/a.png", "charged_units": 4500},
        Event.FAILED: {"error_code": "service_error", "charged_units": 0},
        Event.STORED: IMAGE,
        Event.FOUND: IMAGE,
    }
)

#: The shortest way to each state, after a request was planned.
EVENTS_TO_STATE: Final[Mapping[State, tuple[Event, ...]]] = MappingProxyType(
    {
        State.PLANNED: (),
        State.DEFERRED: (Event.DEFERRED,),
        State.SUBMITTING: (Event.SUBMITTING,),
        State.UNKNOWN: (Event.SUBMITTING, Event.OUTCOME_UNKNOWN),
        State.REFUSED: (Event.SUBMITTING, Event.REFUSED),
        State.SUBMITTED: (Event.SUBMITTING, Event.ACCEPTED),
        State.FAILED: (Event.SUBMITTING, Event.ACCEPTED, Event.FAILED),
        State.EXPIRED: (Event.SUBMITTING, Event.ACCEPTED, Event.EXPIRED),
        State.COMPLETED: (Event.SUBMITTING, Event.ACCEPTED, Event.COMPLETED),
        State.STORED: (Event.SUBMITTING, Event.ACCEPTED, Event.COMPLETED, Event.STORED),
    }
)


def change(request: ImageRequest, event: Event, at: datetime = NOW, /, **values: Any) -> Change:
    """An event of a request, with the columns that it needs."""
    needed = dict(VALUES.get(event, {}))
    if event is Event.ACCEPTED:
        needed["task_id"] = f"task-unified-{request.request_key[:20]}"
    return Change(request.request_key, event, at, {**needed, **values})


class JournalWriter:
    """An owner that writes events one by one."""

    def __init__(self, journal: Journal, run_id: str = "run-by-hand") -> None:
        self.journal = journal
        self.run_id = run_id
        self.owner = new_owner(run_id)
        journal.claims.register(self.owner)

    def plan(self, *requests: ImageRequest) -> int:
        """Plan and claim requests; return how many were new."""
        pairs = [(request, "p") for request in requests]
        new = self.journal.plan(pairs, run_id=self.run_id, at=NOW)
        self.journal.claims.claim([r.request_key for r in requests], self.owner.owner)
        return new

    def append(self, *changes: Change) -> list[Record | JournalError | BuyingClosed]:
        return self.journal.append(changes, owner=self.owner.owner, run_id=self.run_id)

    def write(self, request: ImageRequest, event: Event, **values: Any) -> Record:
        """Write one event. Raises the journal's error."""
        (answer,) = self.append(change(request, event, **values))
        if not isinstance(answer, Record):
            raise answer
        return answer

    def bring_to(self, request: ImageRequest, state: State) -> Record:
        """Plan a request and bring it to a state."""
        self.plan(request)
        for event in EVENTS_TO_STATE[state]:
            self.write(request, event)
        return self.journal.records([request.request_key])[request.request_key]


def rows(journal_url: str, table: Table) -> list[dict[str, Any]]:
    """Return all rows of a table, in the order of their keys."""
    engine = create_engine(journal_url)
    with engine.connect() as connection:
        found = connection.execute(select(table).order_by(*table.primary_key.columns)).mappings()
        values = [dict(row) for row in found]
    engine.dispose()
    return values


def all_rows(journal_url: str) -> dict[str, list[dict[str, Any]]]:
    """Return the rows of every table."""
    return {table.name: rows(journal_url, table) for table in schema.metadata.sorted_tables}


#: Retries without pauses; a task is gone as soon as it was not found three times.
QUICK: Final = Policy(wait_scale=0.01, gone_after_s=0.0, patience_s=20.0, outage_patience_s=5.0)

#: The emulator's latency is known, so that a run does not need to learn it.
KNOWN_LATENCIES: Final = Latencies.known({"1K": 0.02, "2K": 0.02})


async def wait_until(what: Callable[[], bool], within_s: float = 10.0) -> None:
    """Wait for something that happens in another thread or process. Raises TimeoutError."""
    with anyio.fail_after(within_s):
        while not what():  # noqa: ASYNC110 - no event of this loop can be set from there
            await anyio.sleep(0.005)


class ServerClock:
    """The emulator's clock, which a test can move on."""

    def __init__(self) -> None:
        self._ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self._ahead_s

    def move(self, seconds: float) -> None:
        self._ahead_s += seconds


class ClockAhead(SystemClock):
    """This machine's clocks, with the time of day moved on."""

    def __init__(self, ahead: timedelta) -> None:
        self._ahead = ahead

    def now(self) -> datetime:
        return super().now() + self._ahead


_RUN_OPTIONS: Final = {field.name for field in fields(Runner)}


class EngineHarness:
    """A storage root with its journal, and runs against one emulator."""

    def __init__(self, folder: Path, emulator: Emulator) -> None:
        self.folder = folder
        self.emulator = emulator
        self.url = f"sqlite:///{folder / 'journal.db'}"
        self.journal = Journal(self.url)
        self.images = ImageStore(Storage(str(folder)))

    def runner(self, run_id: str = "run-1", *, timeout_s: float = 5.0, **options: Any) -> Runner:
        """Return a runner whose pauses are short; ``options`` are fields of it or its policy."""
        own = {name: options.pop(name) for name in _RUN_OPTIONS & options.keys()}
        defaults = {
            "connect": lambda: KreaClient(
                "emulator", base_url=self.emulator.url, timeout_s=timeout_s, max_connections=16
            ),
            "journal": self.journal,
            "images": self.images,
            "randomness": random.Random(1),
            "latencies": KNOWN_LATENCIES,
        }
        return Runner(run_id=run_id, policy=replace(QUICK, **options), **{**defaults, **own})

    async def run(
        self, requests: Iterable[ImageRequest], run_id: str = "run-1", **options: Any
    ) -> RunReport:
        """Run these requests to their end."""
        return await self.runner(run_id, **options).run(to_requested(requests))

    def record(self, request: ImageRequest) -> Record:
        return self.journal.records([request.request_key])[request.request_key]

    def states(self, requests: Iterable[ImageRequest]) -> list[str]:
        return [self.record(request).state.value for request in requests]

    def events(self, request: ImageRequest) -> list[Event]:
        return [event for _, event, _ in self.journal.history(request.request_key)]

    def files(self) -> list[str]:
        """Every file under the storage root that belongs to an image."""
        parts = [*self.folder.glob("images/**/*"), *self.folder.glob(".partial/*")]
        return sorted(str(p.relative_to(self.folder)) for p in parts if p.is_file())

    def assert_accounts_agree(self, *, bought_twice: int = 0) -> dict[str, Any]:
        """Compare the emulator's totals with the journal, and return them.

        Nothing was bought twice; every task that was created is known, or its request counts
        as unknown; every charge is the server's; the events lead to the present states; the
        key was only sent to the API.
        """
        stats = self.emulator.stats()
        assert stats["bodies_bought_more_than_once"] == bought_twice
        assert stats["key_leaks"] == 0
        records = list(self.journal.all_records())
        open_keys = {
            record.idempotency_key
            for record in records
            if record.state in (State.UNKNOWN, State.SUBMITTING)
        }
        bought = {row["task_id"]: row for row in rows(self.url, schema.submissions)}
        for task in stats["tasks"]:
            if task["idempotency_key"] in open_keys:
                continue
            row = bought[task["task_id"]]
            assert row["idempotency_key"] == task["idempotency_key"]
            assert row["reserved_units"] == task["reserved_units"]
            if row["charged_units"] is not None:
                assert row["charged_units"] == task["charged_units"]
        for record in records:
            history = self.journal.history(record.request_key)
            assert replay(event for _, event, _ in history) is record.state
        return stats


def to_requested(requests: Iterable[ImageRequest]) -> list[RequestedImage]:
    return [RequestedImage(request, "p") for request in requests]


@contextmanager
def open_harness(folder: Path, **settings: Any) -> Iterator[EngineHarness]:
    """Open a harness whose emulator finishes a task within 20 ms."""
    options = {"latency_s": 0.01, "latency_jitter": 0.0, **settings}
    with Emulator(state=folder / "emulator", **options) as emulator:
        yield EngineHarness(folder, emulator)

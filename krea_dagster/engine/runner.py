"""Carries requests to their end: one sliding window over all requests of a run.

The only file that owns tasks. Whatever must wait goes back into the same window, so that
neither a retry nor the last few hold anything up. Downloads and checks overlap generation,
outside the window.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, Final, TypeVar

import anyio
import anyio.abc
import anyio.to_thread

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.clock import Clock, SystemClock
from krea_dagster.engine.images import ImageStore
from krea_dagster.engine.journal import NO_CAPS, Journal
from krea_dagster.engine.owner import has_ended, this_process
from krea_dagster.engine.pace import Latencies, Window
from krea_dagster.engine.policy import (
    DONE,
    Ask,
    Defer,
    Expire,
    Fetch,
    FoundUnanswered,
    Leave,
    PlanAgain,
    Policy,
    Replay,
    Submit,
    Trail,
    next_action,
)
from krea_dagster.engine.progress import Progress
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Resolution
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.steps import Carrier, Client, Steps
from krea_dagster.engine.writer import GroupCommit
from krea_dagster.errors import (
    AccountStopped,
    ApiError,
    JournalError,
    PurchasesNotWritten,
    RunStopped,
    StorageError,
    TakenOver,
)
from krea_dagster.models import ImageRequest

_T = TypeVar("_T")

#: A pause up to this long is slept through in place; a longer one goes back to the window.
_SHORT_S: Final = 0.5
#: Finished images that may wait for their download before nothing new is started.
_FETCH_BACKLOG: Final = 64
#: So that what is to be bought and holds no place goes by way of the queue.
_ANEW_S: Final = 0.001
_HEARTBEAT_S: Final = 20.0
_ELSEWHERE_S: Final = 1.0


@dataclass(frozen=True)
class Wanted:
    """A request that some rows want; ``rows`` counts them."""

    request: ImageRequest
    partition_key: str
    rows: int = 1


@dataclass(frozen=True)
class RunReport:
    """How a run ended.

    ``new`` counts requests that the journal had never seen. ``left`` says, by request key, why
    a request is not finished although the run is. ``stopped`` is the answer that ended the
    buying, where one did; ``caps_reached`` what the caps said, ``dearer``
    which prices were above the expected. ``account_error`` is why the
    account's credits could not be read beside, where they could not. ``posts``, ``asked`` and
    ``reads`` count create calls, tasks asked about, and the calls which that took.
    """

    new: int
    progress: Progress
    seconds: float
    left: Mapping[str, str] = field(default_factory=dict)
    stopped: AccountStopped | RunStopped | None = None
    caps_reached: Sequence[str] = ()
    dearer: Sequence[str] = ()
    account_error: str | None = None
    posts: int = 0
    asked: int = 0
    reads: int = 0


@dataclass(frozen=True)
class Runner:
    """Buys, fetches and verifies requests, and returns once nothing more can be done for them.

    ``connect`` opens a client; it is not called where there is nothing to do. ``run_id`` is
    written with every purchase. ``max_in_flight`` bounds the tasks at the server.
    ``caps`` bound what it commits, and ``launch`` names the runs that stop together where the
    account stops one (by default this run alone). With ``buying`` false it only asks and
    fetches. ``resolutions`` are a person's decisions about unknown outcomes, by request key.
    ``randomness`` jitters the pauses. ``latencies`` is what is known before the run.
    ``on_progress`` is called on the event loop whenever something changed.
    """

    connect: Callable[[], AbstractAsyncContextManager[Client]]
    journal: Journal
    images: ImageStore
    run_id: str
    policy: Policy = field(default_factory=Policy)
    max_in_flight: int = 64
    caps: Caps = NO_CAPS
    launch: str = ""
    buying: bool = True
    resolutions: Mapping[str, Resolution] = field(default_factory=dict)
    clock: Clock = field(default_factory=SystemClock)
    randomness: random.Random = field(default_factory=random.Random)
    latencies: Latencies = field(default_factory=Latencies)
    on_progress: Callable[[Progress], None] = lambda _: None

    async def run(self, wanted: Iterable[Wanted]) -> RunReport:
        """Carry all requests as far as they go.

        Raises JournalError where the journal cannot be read or written, and StorageError where
        an image cannot be stored: then nothing more is bought. On cancellation nothing more is
        submitted, a POST under way is given a few seconds, and what is known is written; the
        next run goes on from there.
        """
        started_s = self.clock.monotonic()
        by_key = _merged(wanted)
        pairs = [(item.request, item.partition_key) for item in by_key.values()]
        new = await _in_thread(
            partial(self.journal.plan, pairs, run_id=self.run_id, at=self.clock.now())
        )
        records = await _in_thread(self.journal.records, list(by_key))
        unfinished = {key: record for key, record in records.items() if self._unfinished(record)}
        rows = {key: item.rows for key, item in by_key.items()}
        progress = Progress.of(rows, records, unfinished)
        if not unfinished:
            self.on_progress(progress)
            return RunReport(new, progress, self.clock.monotonic() - started_s)
        async with self.connect() as client:
            session = _Session(self, client, by_key, progress)
            await session.carry_all(list(unfinished))
        return RunReport(
            new=new,
            progress=session.progress_now(),
            seconds=self.clock.monotonic() - started_s,
            left=session.left,
            stopped=session.steps.stopped,
            caps_reached=tuple(session.steps.caps_reached.values()),
            dearer=tuple(session.steps.dearer.values()),
            account_error=session.account_error,
            posts=session.steps.posts,
            asked=session.steps.asker.asked,
            reads=session.steps.asker.calls,
        )

    def _unfinished(self, record: Record) -> bool:
        if record.state is State.STORED:
            return self.file_is_missing(record)
        action = next_action(record, Trail(), self.clock.now(), self.policy, buying=True)
        return action != DONE

    def file_is_missing(self, record: Record) -> bool:
        """Whether a stored request's file is gone or has another size."""
        return record.image is None or not self.images.holds(record.image)


def _merged(wanted: Iterable[Wanted]) -> dict[str, Wanted]:
    by_key: dict[str, Wanted] = {}
    for item in wanted:
        known = by_key.get(item.request.request_key)
        by_key[item.request.request_key] = (
            item if known is None else replace(known, rows=known.rows + item.rows)
        )
    return by_key


@dataclass(order=True)
class _Item:
    """A request in the run's queue: not before when, and in which order."""

    not_before_s: float
    order: int
    record: Record = field(compare=False)
    trail: Trail = field(compare=False)


class _Session:
    """One run under way: its queue, its window, and the tasks that carry requests."""

    def __init__(
        self, runner: Runner, client: Client, wanted: Mapping[str, Wanted], progress: Progress
    ) -> None:
        self._runner = runner
        self._wanted = wanted
        self._journal = runner.journal
        self._clock = runner.clock
        self._owner = this_process(runner.run_id)
        self._writer = GroupCommit(
            runner.journal,
            owner=self._owner.owner,
            run_id=runner.run_id,
            caps=runner.caps,
            launch=runner.launch,
        )
        self.steps = Steps(
            client,
            self._writer,
            runner.images,
            run_id=runner.run_id,
            policy=runner.policy,
            clock=runner.clock,
            randomness=runner.randomness,
            window=Window.opening(runner.max_in_flight),
            latencies=runner.latencies,
            announce_stop=self._announce_stop,
        )
        self._queue: list[_Item] = []
        self._order = count()
        self._changed = anyio.Event()
        self._carried = 0  # requests in the hands of a carrier
        self._in_flight = 0  # of those, the ones that hold a place in the window
        self._fetching = 0  # of those, the ones whose image is on its way
        self._elsewhere: set[str] = set()  # requests that another run holds
        self._finished: set[str] = set()  # requests that this run is done with, and holds still
        self._resolutions = dict(runner.resolutions)
        self._client = client
        self._failure: JournalError | StorageError | None = None
        self.account_error: str | None = None
        self._progress = progress
        self.left: dict[str, str] = {}

    async def carry_all(self, keys: list[str]) -> None:
        """Claim what is unfinished, and carry it until nothing more can be done."""
        await _in_thread(self._journal.look_through)
        await _in_thread(self._journal.register, self._owner, self._clock.now())
        try:
            with self._writer:
                self._elsewhere = set(keys)
                await self._take_over()
                await self._read_account()
                await self._work()
                await self._read_account()
        except BaseException as error:
            with anyio.CancelScope(shield=True), suppress(JournalError):
                await self._release()
            if self.steps.unwritten:
                why = str(self._failure or error)
                raise PurchasesNotWritten(self.steps.unwritten, why) from error
            raise
        await self._release()

    async def _release(self) -> None:
        """Give up what is claimed; a journal that fails must not keep the next run from it."""
        has_ended(self._owner)
        await _in_thread(self._journal.release, self._owner.owner)

    async def _work(self) -> None:
        async with anyio.create_task_group() as background:
            background.start_soon(self.steps.asker.run)
            background.start_soon(self._guarded, self._beat)
            background.start_soon(self._guarded, self._watch_elsewhere)
            async with anyio.create_task_group() as carriers:
                try:
                    await self._feed(carriers)
                finally:
                    self.steps.end_submitting()
            background.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _feed(self, carriers: anyio.abc.TaskGroup) -> None:
        """Start carriers as the window has room, until there is nothing left to carry."""
        while self._queue or self._carried or self._elsewhere:
            self._tell()
            if self._failure is not None:
                # Nothing more is started. What is under way fails on its own next write.
                carriers.cancel_scope.cancel()
                return
            self._changed = anyio.Event()
            now_s = self._clock.monotonic()
            wait_s: float | None = None
            if not self._has_room():
                pass  # until a carrier changes something
            elif self._queue:
                window_s = self.steps.window.pause_until_s
                wait_s = max(self._queue[0].not_before_s, window_s) - now_s
                if wait_s <= 0:
                    self._start(carriers, heapq.heappop(self._queue))
                    continue
            with anyio.move_on_after(wait_s):
                await self._changed.wait()
        self._tell()

    def _has_room(self) -> bool:
        return self._in_flight < self.steps.window.size and self._fetching < _FETCH_BACKLOG

    def _start(self, carriers: anyio.abc.TaskGroup, item: _Item) -> None:
        partition_key = self._wanted[item.record.request_key].partition_key
        self._carried += 1
        self._in_flight += 1
        carriers.start_soon(self._carry, Carrier(item.record, item.trail, partition_key))

    async def _carry(self, carrier: Carrier) -> None:
        """Carry one request until it is finished, left, or must wait."""
        try:
            wait_s = await self._advance(carrier)
            if wait_s is not None:
                self._push(carrier.record, carrier.trail, wait_s)
        except TakenOver as error:
            self._finish(carrier.record, str(error))
        except (JournalError, StorageError) as error:
            self._failure = self._failure or error
        finally:
            self._leave_window(carrier)
            self._carried -= 1
            self._changed.set()

    async def _advance(self, carrier: Carrier) -> float | None:
        """Take step after step; returns the seconds to wait where it must be put back."""
        while True:
            wait_s = await self._step(carrier)
            if wait_s is None:
                return None
            if wait_s > _SHORT_S:
                return wait_s
            self._changed.set()
            if wait_s > 0:
                await self._clock.sleep(wait_s)

    async def _step(self, carrier: Carrier) -> float | None:  # noqa: C901, PLR0912 - an arm per action
        """Do the next thing once; None where there is nothing more to do in this run."""
        record, steps = carrier.record, self.steps
        if record.state is State.STORED and self._runner.file_is_missing(record):
            return await steps.file_missing(carrier)
        if record.state is State.UNKNOWN and record.request_key in self._resolutions:
            return await steps.resolve(carrier, self._resolutions.pop(record.request_key))
        buying = self._runner.buying and steps.stopped is None
        policy = self._runner.policy
        now = self._clock.now()
        match next_action(record, carrier.trail, now, policy, buying=buying):
            case Leave(reason=reason):
                self._finish(record, reason)
                return None
            case Submit() if not carrier.holds_place:
                return _ANEW_S
            case Submit():
                return await steps.submit(carrier, Event.SUBMITTING)
            case Replay():
                return await steps.submit(carrier, Event.REPLAYING)
            case FoundUnanswered():
                return await steps.found_unanswered(carrier)
            case Ask():
                if steps.is_overdue(record):
                    self._leave_window(carrier)
                return await steps.ask(carrier)
            case Fetch():
                self._leave_window(carrier)
                return await self._fetch(carrier)
            case Expire(code=code, message=message):
                return await steps.expire(carrier, code, message)
            case PlanAgain():
                return await steps.plan_again(carrier)
            case Defer():
                return await steps.defer(carrier)

    async def _fetch(self, carrier: Carrier) -> float:
        self._fetching += 1
        try:
            return await self.steps.fetch(carrier)
        finally:
            self._fetching -= 1
            self._changed.set()

    def _finish(self, record: Record, reason: str) -> None:
        self._finished.add(record.request_key)
        if reason:
            self.left[record.request_key] = reason
        rows = self._wanted[record.request_key].rows
        self._progress = self._progress.finished(record, rows, left=bool(reason))

    def _push(self, record: Record, trail: Trail, after_s: float) -> None:
        not_before_s = self._clock.monotonic() + after_s
        heapq.heappush(self._queue, _Item(not_before_s, next(self._order), record, trail))

    def _leave_window(self, carrier: Carrier) -> None:
        if carrier.holds_place:
            carrier.holds_place = False
            self._in_flight -= 1
            self._changed.set()

    def progress_now(self) -> Progress:
        """How far the run is."""
        return replace(
            self._progress, in_flight=self._in_flight, charged_units=self.steps.charged_units
        )

    def _tell(self) -> None:
        self._runner.on_progress(self.progress_now())

    async def _take_over(self) -> None:
        """Claim what others hold and have let go, and put it into the queue.

        Read again after the claim: another run may have carried it further.
        """
        mine = await _in_thread(
            self._journal.claim, list(self._elsewhere), self._owner.owner, self._clock.now()
        )
        found = await _in_thread(self._journal.records, mine)
        in_order = [found[key] for key in self._wanted if key in found]
        for record in sorted(in_order, key=_urgency):
            self._push(record, Trail(), 0.0)
        self._elsewhere -= mine
        self._changed.set()

    async def _announce_stop(self, error: AccountStopped) -> None:
        await _in_thread(
            self._journal.stop,
            self._runner.launch or self._runner.run_id,
            error.code,
            str(error),
            self._clock.now(),
        )

    async def _read_account(self) -> None:
        """Keep what the account says before and after, to hold the journal against."""
        try:
            said = await self._client.credits()
        except ApiError as error:
            self.account_error = str(error)
            return
        await _in_thread(self._journal.add_account_reading, self._runner.run_id, said)

    async def _watch_elsewhere(self) -> None:
        """Follow the requests that another run holds, and let go of what is finished.

        A run that waits holds nothing that it is done with, so that no two wait for each other.
        """
        while self._elsewhere:
            await self._clock.sleep(_ELSEWHERE_S)
            finished, self._finished = self._finished, set()
            await _in_thread(self._journal.let_go, finished, self._owner.owner)
            await self._take_over()

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have a journal that fails in the background end the run as it does elsewhere."""
        try:
            await work()
        except JournalError as error:
            self._failure = self._failure or error
            self._changed.set()

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(_HEARTBEAT_S)
            await _in_thread(self._journal.heartbeat, self._owner.owner, self._clock.now())


def _urgency(record: Record) -> tuple[bool, float]:
    """What is paid before what is to be bought, and the oldest first: links live for a day."""
    paid_at = record.completed_at or record.submitted_at or record.sent_at
    return paid_at is None, 0.0 if paid_at is None else paid_at.timestamp()


async def _in_thread(call: Callable[..., _T], *arguments: Any) -> _T:
    return await anyio.to_thread.run_sync(partial(call, *arguments))

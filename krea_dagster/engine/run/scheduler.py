"""One run under way: its queue, its window, and the tasks that carry requests.

One sliding window over all requests of the run: a request that must wait goes back into the same
queue, so that neither a retry nor the last few requests delay the others. Downloads and checks
overlap generation, outside the window.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from itertools import count
from typing import Final, TypeAlias

import anyio
import anyio.abc

from krea_dagster.engine.clock import wait_for_event
from krea_dagster.engine.journal.journal import NO_CAPS
from krea_dagster.engine.policy import (
    Action,
    Adopt,
    Expire,
    Fetch,
    Leave,
    MarkUnknown,
    Poll,
    Replay,
    Requeue,
    Submit,
    next_action,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Claim, Resolution
from krea_dagster.engine.run.claims import Claims
from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.fetch import FetchStep
from krea_dagster.engine.run.options import Client, RunOptions
from krea_dagster.engine.run.outages import Outages
from krea_dagster.engine.run.pace_sync import PaceSync
from krea_dagster.engine.run.poll import PollStep
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.engine.run.submit import Deferral, SubmitStep
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.run.worklist import WorkList
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import (
    ApiError,
    JournalError,
    PurchasesNotWritten,
    StorageError,
    TakenOver,
    TryLater,
)
from krea_dagster.models import evolve

#: A pause up to this long is slept through in place; a longer one goes back to the queue.
_SHORT_S: Final = 0.5
#: Finished images that may wait for their download before nothing new is started.
_FETCH_BACKLOG: Final = 64
#: With fewer requests than this in the queue, the next part is claimed.
_QUEUE_LOW: Final = 256
#: Purchases without an answer at once, if a cap or a budget bounds the run.
UNANSWERED_UNDER_CAP: Final = 4
#: Seconds between two calls of ``on_progress``.
_PROGRESS_EVERY_S: Final = 0.1

#: A run that does not wait stops submitting after this many seconds of 429s, or if the requested
#: pause is longer than this.
_RATE_LIMITED_S: Final = 10.0
_LONG_PAUSE_S: Final = 30.0

#: States of a request that certainly costs nothing so far.
_NOT_BOUGHT: Final = frozenset({State.PLANNED, State.DEFERRED})

#: States from which a request's next step is, or leads to, a POST.
_TO_SUBMIT: Final = frozenset(
    {State.PLANNED, State.DEFERRED, State.SUBMITTING, State.UNKNOWN, State.FAILED, State.REFUSED}
)

#: Items by the time before which they are not started, and by their order.
_Queue: TypeAlias = list[tuple[float, int, WorkItem]]


class RunScheduler:
    """Carries the requests of a run to their end, or to where a later run goes on.

    The only class that starts tasks for requests.
    """

    def __init__(
        self, options: RunOptions, client: Client, work: WorkList, outages: Outages
    ) -> None:
        self._options = options
        self._journal = options.journal
        self._clock = options.clock
        self._work = work
        self._outages = outages
        outages.changed = self._wake
        self._context = RunContext(options, client, work, outages, self._wake)
        self._in_thread, self._owner = self._context.in_thread, self._context.owner
        self._poller, self._in_flight = self._context.poller, self._context.in_flight
        self._in_flight.wants = work.unfinished if options.buying else 0
        self._pace_sync = PaceSync(self._context)
        self._poll = PollStep(self._context)
        self._submit = SubmitStep(self._context, self._poll)
        self._fetch = FetchStep(self._context)
        self._claims = Claims(self._context, self._poll, self._push)
        self._to_submit: _Queue = []
        self._to_collect: _Queue = []  # paid requests
        self._order = count()
        self._changed = asyncio.Event()
        self._carried = 0  # requests that a task carries
        self._in_window = 0  # of those, the ones that hold a place in the window
        self._downloads = 0  # of those, the ones whose image is being downloaded
        self._deferring: dict[Deferral, list[str]] = {}  # requests to be recorded as deferred
        self._resolutions = dict(options.resolutions)
        self._failure: JournalError | StorageError | None = None
        self._account_error: str | None = None
        self._told_at_s = 0.0
        self._left_there: set[str] = set()  # tasks that a run which does not wait leaves
        self._left_for_room = 0

    async def run(self) -> None:
        """Claim unfinished requests, and carry them until nothing more can be done."""
        await self._in_thread(self._journal.database.check_integrity)
        await self._in_thread(self._journal.claims.register, self._context.process)
        try:
            async with self._context.writer:
                await self._pace_sync.exchange()
                await self._claims.claim_part()
                await self._read_account()
                await self._pace_sync.exchange()  # with the runs that have begun since the first
                await self._work_off()
                await self._record_deferred()
                if self._outages.over is not None:
                    self._context.stop_buying(self._outages.over)
                else:
                    await self._read_account()
        except BaseException as error:
            # Tried once: the next run need not wait for claims that cannot be released.
            with anyio.CancelScope(shield=True), suppress(JournalError):
                await self._options.in_thread(self._journal.claims.release, self._owner)
            if self._submit.unwritten:
                why = str(self._failure or error)
                raise PurchasesNotWritten(self._submit.unwritten, why) from error
            raise
        await self._in_thread(self._journal.claims.release, self._owner)

    def report(self, seconds: float, recovered: Sequence[str]) -> RunReport:
        """Return how the run ended."""
        return RunReport(
            new=self._work.new,
            progress=self._progress(),
            seconds=seconds,
            left=self._work.left,
            left_reasons=self._work.left_reasons,
            at_stake_units=self._work.at_stake_units,
            stopped=self._context.stopped,
            caps_reached=tuple(self._submit.caps_reached.values()),
            price_increases=tuple(self._submit.price_increases.values()),
            account_error=self._account_error,
            posts=self._submit.posts,
            rate_limited=self._submit.rate_limited,
            tasks_read=self._poller.tasks_read,
            read_calls=self._poller.calls,
            missed_callbacks=self._poll.missed_callbacks,
            waited=self._options.policy.wait,
            left_for_room=self._left_for_room,
            recovered=recovered,
            same_files=self._fetch.same_files,
        )

    def _wake(self) -> None:
        self._changed.set()

    async def _work_off(self) -> None:
        async with anyio.create_task_group() as background:
            background.start_soon(self._poller.run)
            background.start_soon(self._guarded, self._claims.keep_alive)
            background.start_soon(self._pace_sync.run)
            background.start_soon(self._guarded, self._claims.watch_elsewhere)
            if self._poll.listener is not None:
                background.start_soon(self._guarded, self._poll.listener.run)
            async with anyio.create_task_group() as carriers:
                try:
                    await self._feed(carriers, background)
                except BaseException:
                    self._outages.give_up()
                    raise
                finally:
                    self._submit.end_submitting()
            background.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    # -- the queue ----------------------------------------------------------------------------

    async def _feed(self, carriers: anyio.abc.TaskGroup, background: anyio.abc.TaskGroup) -> None:
        """Start requests as the pace has room, until there is nothing left to carry."""
        while self._to_submit or self._to_collect or self._carried or self._claims.are_open:
            self._tell()
            if self._failure is not None:
                # Nothing more is started. What is under way fails on its own next write.
                carriers.cancel_scope.cancel()
                return
            self._changed = asyncio.Event()
            self._leave_all_deferred()
            queued = len(self._to_submit) + len(self._to_collect)
            if self._work.backlog and queued < _QUEUE_LOW and not self._claims.under_way:
                self._claims.under_way = True
                background.start_soon(self._guarded, self._claims.claim_part)
            await wait_for_event(self._changed, self._start_ready(carriers))
        self._tell(last=True)

    def _push(self, item: WorkItem, after_s: float = 0.0) -> None:
        not_before_s = self._clock.monotonic() + after_s
        queue = self._to_submit if item.record.state in _TO_SUBMIT else self._to_collect
        heapq.heappush(queue, (not_before_s, next(self._order), item))

    def _start_ready(self, carriers: anyio.abc.TaskGroup) -> float | None:
        """Start what may be started now; returns the seconds until time alone lets more start."""
        if self._outages.closed:
            return None
        now_s = self._clock.monotonic()
        waits_s = [self._start_collecting(carriers, now_s), self._start_submitting(carriers, now_s)]
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def _start_collecting(self, carriers: anyio.abc.TaskGroup, now_s: float) -> float | None:
        while self._to_collect and self._carried < self._max_carried:
            not_before_s, _, item = self._to_collect[0]
            if not_before_s > now_s:
                return not_before_s - now_s
            heapq.heappop(self._to_collect)
            self._start(carriers, item)
        return None

    def _start_submitting(self, carriers: anyio.abc.TaskGroup, now_s: float) -> float | None:
        self._poller.pressed, self._in_flight.wants = False, 0
        while (
            self._to_submit
            and self._downloads < _FETCH_BACKLOG
            and self._carried < self._max_carried
        ):
            not_before_s, _, item = self._to_submit[0]
            held = self._deferral_of(item)
            if held is not None:
                heapq.heappop(self._to_submit)
                self._deferring.setdefault(held, []).append(item.record.request_key)
                self._claims.finish(item.record, held.reason)
                continue
            if not_before_s > now_s:
                return not_before_s - now_s
            submits = self._will_submit(item)
            if submits and self._has_no_place(item.record):
                heapq.heappop(self._to_submit)
                self._leave_for_room(item.record)
                continue
            wait_s = self._wait_for_place_s(item.record, now_s) if submits else 0.0
            if wait_s > 0:
                self._in_flight.wants = len(self._to_submit) + len(self._work.backlog)
                return None if math.isinf(wait_s) else wait_s
            heapq.heappop(self._to_submit)
            self._start(carriers, item, submits=submits)
        return None

    @property
    def _max_carried(self) -> int:
        return self._options.max_in_flight + _FETCH_BACKLOG

    def _start(
        self, carriers: anyio.abc.TaskGroup, item: WorkItem, *, submits: bool = False
    ) -> None:
        self._carried += 1
        self._in_window += 1
        self._left_there.discard(item.record.request_key)
        item.holds_place = True
        item.since_s = item.not_yet_s = 0.0
        if submits:
            self._in_flight.grant_submit(item)
        carriers.start_soon(self._carry, item)

    def _wait_for_place_s(self, record: Record, now_s: float) -> float:
        """Return the seconds until a request may be submitted; infinite until an answer comes."""
        pace = self._in_flight.pace
        full = self._in_window >= pace.room
        if record.state in _NOT_BOUGHT:  # a repeat may have its place already
            full = full or pace.is_full(self._in_window + len(self._left_there))
        self._poller.pressed = full or pace.unclear
        few = pace.one_by_one and self._in_flight.submitting
        # Purchases under way were admitted at the old price. If it rises, a cap is passed by no
        # more than these cost more.
        capped = self._options.caps != NO_CAPS
        awaits_price = capped and self._in_flight.submitting >= UNANSWERED_UNDER_CAP
        return math.inf if full or few or awaits_price else pace.wait_s(now_s)

    def _deferral_of(self, item: WorkItem) -> Deferral | None:
        """Return why a request that was not bought stays so in this run, if that is certain."""
        if item.record.state not in _NOT_BOUGHT or item.retry.file is not None:
            return None
        return self._submit.deferral_of(item)

    def _leave_all_deferred(self) -> None:
        """Leave at once all requests that this run will not reach, without a step for each."""
        over = self._outages.over
        if over is not None:
            self._context.stop_buying(over)
            self._poller.fail_all(over)
            reason = f"left to a later run: {over}"
            for queue in (self._to_submit, self._to_collect):
                for _, _, item in queue:
                    self._claims.finish(item.record, reason)
                queue.clear()
            self._leave_unread(self._work.take(len(self._work.backlog)), reason)
        elif self._work.backlog_to_buy > 0 and (
            held := self._submit.all_deferred(self._work.qualities)
        ):
            keys = self._work.take_to_buy()
            if self._work.deferral_codes != {held.code}:
                self._deferring.setdefault(held, []).extend(keys)
            self._leave_unread(keys, held.reason)

    def _leave_unread(self, keys: Sequence[str], reason: str) -> None:
        self._work.leave_unread(keys, reason)
        if keys:
            self._wake()

    def _has_no_place(self, record: Record) -> bool:
        """Whether a run that does not wait leaves a purchase, because the server takes no more.

        The repeat of a purchase whose outcome is unknown may have a place already.
        """
        if self._options.policy.wait:
            return False
        pace = self._in_flight.pace
        # Not before one more was tried after the pause that the server asked for, if it is short.
        tried = pace.refused_in_row > 1 and self._submit.rate_limited_s > _RATE_LIMITED_S
        if tried or pace.wait_s(self._clock.monotonic()) > _LONG_PAUSE_S:
            return True
        return record.state in _NOT_BOUGHT and pace.is_full(len(self._left_there))

    def _leave_for_room(self, record: Record) -> None:
        before = "not bought yet" if record.state in _NOT_BOUGHT else "outcome still unknown"
        self._claims.finish(record, f"{before}: the server has as many tasks as it takes")
        self._left_for_room += 1

    def _will_submit(self, item: WorkItem) -> bool:
        if item.record.request_key in self._resolutions:
            return False
        return isinstance(self._next(item), Submit | Replay)

    def _next(self, item: WorkItem) -> Action:
        buying = self._options.buying and self._context.stopped is None
        # While a dependency was away, tasks could not be read.
        policy = self._options.policy
        policy = evolve(policy, patience_s=policy.patience_s + self._outages.away_s)
        return next_action(item.record, item.retry, self._clock.now(), policy, buying=buying)

    # -- one request --------------------------------------------------------------------------

    async def _carry(self, item: WorkItem) -> None:
        """Carry one request until it is finished, left, or must wait."""
        try:
            try:
                wait_s = await self._advance(item)
            finally:
                await self._context.write_noted(item)
            if wait_s is not None:
                self._push(item, wait_s)
        except TakenOver as error:
            self._claims.finish(item.record, str(error))
        except (JournalError, StorageError) as error:
            self._failure = self._failure or error
        finally:
            self._leave_window(item)
            self._in_flight.revoke_submit(item)
            self._carried -= 1
            self._changed.set()

    async def _advance(self, item: WorkItem) -> float | None:
        """Take step after step; returns the seconds to wait if it must be put back."""
        wait_s: float | None = 0.0
        while wait_s is not None and wait_s <= _SHORT_S:
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            if self._outages.over is not None:
                self._claims.finish(item.record, f"left to a later run: {self._outages.over}")
                return None
            action = self._next(item)
            may_submit = item.may_submit and not self._outages.closed
            needs_grant = isinstance(action, Submit | Replay) and not may_submit
            if needs_grant and item.record.request_key not in self._resolutions:
                return 0.0  # through the queue, because only the pace grants a POST
            if self._is_stopped(item):
                return 0.0  # through the queue, which leaves all that is deferred at once
            wait_s = await self._step(item, action)
            self._changed.set()  # the pace may have room now
        return wait_s

    def _is_stopped(self, item: WorkItem) -> bool:
        not_bought = item.record.state in _NOT_BOUGHT and item.retry.leave_reason is None
        return not_bought and item.retry.file is None and self._context.stopped is not None

    async def _step(self, item: WorkItem, action: Action) -> float | None:  # noqa: C901 - an arm per action
        """Take one step; returns None if there is nothing more to do in this run."""
        record = item.record
        missing = self._options.file_is_missing
        if record.state is State.STORED and await self._in_thread(missing, record):
            if isinstance(action, Leave) and action.reason:
                self._claims.finish(record, action.reason)
                return None
            return await self._fetch.restore(item)
        if (resolution := self._resolution(record, action)) is not None:
            return await self._resolve(item, resolution)
        match action:
            case Leave(reason=reason):
                self._claims.finish(record, reason)
                return None
            case Submit() | Replay():
                replays = isinstance(action, Replay)
                intent = Event.REPLAYING if replays else Event.SUBMITTING
                return await self._submit.submit(item, intent)
            case MarkUnknown(code=code, message=message):
                return await self._submit.mark_unknown(item, code, message)
            case Requeue():
                return await self._submit.requeue(item)
            case Poll():
                if self._options.policy.wait and self._poll.is_overdue(record):
                    self._leave_window(item)
                return await self._poll.poll(item)
            case Fetch():
                self._leave_window(item)
                return await self._download(item)
            case Adopt(name=name):
                return await self._fetch.adopt(item, name)
            case Expire(code=code, message=message):
                return await self._fetch.expire(item, code, message)

    def _resolution(self, record: Record, action: Action) -> Resolution | Claim | None:
        """Return a person's decision about an unknown outcome; without one, a callback's claim.

        A claim counts only if no repeat of the purchase would tell for certain.
        """
        if record.state is not State.UNKNOWN:
            return None
        decided = self._resolutions.pop(record.request_key, None)
        if decided is None and isinstance(action, Leave):
            return self._claims.callback_claims.pop(record.request_key, None)
        return decided

    async def _resolve(self, item: WorkItem, resolution: Resolution | Claim) -> float:
        if isinstance(resolution, Claim):
            return await self._poll.take_claim(item, resolution)
        return await self._submit.resolve(item, resolution)

    async def _download(self, item: WorkItem) -> float:
        self._downloads += 1
        try:
            return await self._fetch.fetch(item)
        finally:
            self._downloads -= 1
            self._changed.set()

    def _leave_window(self, item: WorkItem) -> None:
        if not self._options.policy.wait and item.record.state is State.SUBMITTED:
            self._left_there.add(item.record.request_key)  # it stays there, and still counts
        else:
            self._left_there.discard(item.record.request_key)
            self._in_flight.ended(item)
        if item.holds_place:
            item.holds_place = False
            self._in_window -= 1
            self._changed.set()

    # -- the account and the journal ----------------------------------------------------------

    def _progress(self) -> Progress:
        charged_units = self._poll.charged_units
        return self._work.progress.plus(in_flight=self._in_window, charged_units=charged_units)

    def _tell(self, *, last: bool = False) -> None:
        now_s = self._clock.monotonic()
        if last or now_s - self._told_at_s >= _PROGRESS_EVERY_S:
            self._told_at_s = now_s
            self._options.on_progress(self._progress())

    async def _record_deferred(self) -> None:
        if isinstance(self._context.stopped, TryLater):
            return  # it passes, so rows need no event
        for held, keys in self._deferring.items():
            defer = partial(
                self._journal.defer,
                keys,
                code=held.code,
                message=held.reason,
                owner=self._owner,
                run_id=self._options.run_id,
                at=self._clock.now(),
            )
            await self._in_thread(defer)

    async def _read_account(self) -> None:
        """Keep the account's credits before and after the run, to compare the journal with."""
        try:
            credits = await self._context.client.credits()
        except ApiError as error:
            self._account_error = str(error)
            return
        run_id, api_key = self._options.run_id, self._options.api_key
        await self._in_thread(self._journal.add_account_reading, run_id, credits, api_key)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """End the run with the journal's error if the journal fails in the background."""
        try:
            await work()
        except JournalError as error:
            self._failure = self._failure or error
            self._changed.set()

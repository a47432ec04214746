"""One run under way: its queue, its window, and the tasks that carry requests.

The only file that owns tasks. One sliding window over all requests of the run: whatever must
wait goes back into the same queue, so that neither a retry nor the last few hold anything up.
Downloads and checks overlap generation, outside the window.
"""

from __future__ import annotations

import asyncio
import heapq
import math
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import count, islice
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.abc

from krea_dagster.engine.alarm import wait
from krea_dagster.engine.frozen import changed
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.journal.group_commit import GroupCommit
from krea_dagster.engine.journal.journal import NO_CAPS
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.engine.journal.saved_answers import SavedAnswer, save_answer
from krea_dagster.engine.pace import Pace
from krea_dagster.engine.policy import (
    Action,
    Adopt,
    Ask,
    Expire,
    Fetch,
    Leave,
    MarkUnknown,
    PlanAgain,
    Replay,
    Submit,
    Trail,
    next_action,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Claim, Resolution
from krea_dagster.engine.run.fetch import Fetching
from krea_dagster.engine.run.in_flight import AtServer, Sharing
from krea_dagster.engine.run.outages import Outages
from krea_dagster.engine.run.poll import Asking
from krea_dagster.engine.run.poller import Asker
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.run.submit import Buying, Client, KeptBack
from krea_dagster.engine.run.work_item import Carrier, Desk
from krea_dagster.engine.run.worklist import Planned
from krea_dagster.engine.states import AT_STAKE, Event, State
from krea_dagster.errors import (
    AccountStopped,
    ApiError,
    JournalError,
    PurchasesNotWritten,
    RunStopped,
    StorageError,
    TakenOver,
    TryLater,
    UnwrittenPurchase,
)
from krea_dagster.models import is_task_id

if TYPE_CHECKING:
    from krea_dagster.engine.run.runner import Runner

#: A pause up to this long is slept through in place; a longer one goes back to the queue.
_SHORT_S: Final = 0.5
#: Finished images that may wait for their download before nothing new is started.
_FETCH_BACKLOG: Final = 64
#: Requests in hand: fewer than these, and the next part is claimed and read from the journal.
_IN_HAND: Final = 256
_PART: Final = 512
_HEARTBEAT_S: Final = 20.0
_ELSEWHERE_S: Final = 1.0
#: Purchases without an answer at once, where a cap or a budget bounds the run.
UNANSWERED_UNDER_CAP: Final = 4
#: Seconds between two words on progress.
_TELL_S: Final = 0.1

#: Seconds without a place at the server after which a run that does not wait buys no more, and the
#: pause that it does not sit out.
_TURNED_AWAY_S: Final = 10.0
_LONG_PAUSE_S: Final = 30.0

#: Requests that are left and named with their reason, and reasons that are counted.
_LEFT_NAMED: Final = 1000
_OTHER_REASONS: Final = "other reasons"

#: States of a purchase whose outcome is not known.
_OPEN: Final = frozenset({State.SUBMITTING, State.UNKNOWN})

#: States of a request that certainly costs nothing so far.
_NOT_BOUGHT: Final = frozenset({State.PLANNED, State.DEFERRED})

#: States from which a request's next step is, or leads to, a POST.
_TO_SUBMIT: Final = frozenset(
    {
        State.PLANNED,
        State.DEFERRED,
        State.SUBMITTING,
        State.UNKNOWN,
        State.FAILED,
        State.REFUSED,
    }
)


@dataclass(order=True)
class _Item:
    """A request in the run's queue: not before when, and in which order."""

    not_before_s: float
    order: int
    record: Record = field(compare=False)
    trail: Trail = field(compare=False)


class Session:
    """Carries the planned requests of a run to their end, or as far as they go."""

    def __init__(self, runner: Runner, client: Client, planned: Planned, outages: Outages) -> None:
        self._runner = runner
        self._planned = planned
        self._journal = runner.journal
        self._clock = runner.clock
        self._outages = outages
        outages.changed = self._wake
        self._in_thread = outages.patient(runner.in_thread)
        self._owner = new_owner(runner.run_id)
        self._images = runner.images
        self._writer = GroupCommit(
            runner.journal,
            owner=self._owner.owner,
            run_id=runner.run_id,
            caps=runner.caps,
            launch=runner.launch,
            root_id=runner.root.root_id,
            in_thread=self._in_thread,
        )
        desk = Desk(
            self._writer,
            run_id=runner.run_id,
            policy=runner.policy,
            clock=runner.clock,
            randomness=runner.randomness,
        )
        self.asker = Asker(client, runner.clock.monotonic, runner.latencies)
        pace = Pace(runner.max_in_flight, runner.max_per_s)
        wants = len(planned.unfinished) if runner.buying else 0
        self._at_server = AtServer(self.asker, pace, runner.clock, wants=wants)
        self._sharing = Sharing(
            self._at_server,
            runner.journal.paces,
            owner=self._owner.owner,
            api_key=runner.api_key or "",
            clock=runner.clock,
            in_thread=runner.in_thread,
            changed=self._wake,
        )
        self.buying = Buying(
            client,
            desk,
            self._at_server,
            outages=outages,
            announce_stop=self._announce_stop,
            keep=self._keep,
            confirm=self._confirm,
            table_id=runner.table_id,
            api_key=runner.api_key,
            restored=runner.root.adopts,
            callback_url_of=runner.callback_url_of,
        )
        self.asking = Asking(
            self.asker,
            desk,
            self._at_server,
            runner.journal.callbacks,
            in_thread=self._in_thread,
            outages=outages,
            stop=self._stop_buying,
            callback_url_of=runner.callback_url_of,
        )
        self._fetching = Fetching(client, runner.images, desk, outages)
        # Requests not claimed yet: what is paid, or may be, and then what is to be bought.
        self._backlog: deque[str] = deque(planned.unfinished)
        self._paid_backlog = planned.paid_count
        self._claiming = False
        self._to_submit: list[_Item] = []
        self._to_collect: list[_Item] = []  # what is paid
        self._order = count()
        self._changed = asyncio.Event()
        self._carried = 0  # requests in the hands of a carrier
        self._in_flight = 0  # of those, the ones that hold a place in the window
        self._downloads = 0  # of those, the ones whose image is on its way
        self._deferring: dict[KeptBack, list[str]] = {}  # what is to be noted as kept back
        self._elsewhere: deque[str] = deque()  # requests that another run holds
        self._elsewhere_since_s: float | None = None
        self._finished: set[str] = set()  # requests that this run is done with, and holds still
        self._resolutions = dict(runner.resolutions)
        self._claims: dict[str, Claim] = {}  # tasks that callbacks claim for unknown purchases
        self._client = client
        self._failure: JournalError | StorageError | None = None
        self.account_error: str | None = None
        self._progress = planned.progress
        self._told_at_s = 0.0
        self.left: dict[str, str] = {}
        self.left_reasons: Counter[str] = Counter()
        self.at_stake_units = 0
        self._left_there: set[str] = set()  # what a run that does not wait has at the server
        self.left_for_room = 0  # what it left, because the server took no more

    async def carry_all(self) -> None:
        """Claim what is unfinished, and carry it until nothing more can be done."""
        await self._in_thread(self._journal.check_integrity)
        await self._in_thread(self._journal.register, self._owner)
        try:
            async with self._writer:
                await self._sharing.exchange()
                await self._claim_part()
                await self._read_account()
                await self._sharing.exchange()  # with the runs that have begun since the first
                await self._work()
                await self._note_kept_back()
                if self._outages.over is not None:
                    self._stop_buying(self._outages.over)
                else:
                    await self._read_account()
        except BaseException as error:
            # Once: the next run need not wait for what this one cannot give up.
            with anyio.CancelScope(shield=True), suppress(JournalError):
                await self._runner.in_thread(self._journal.release, self._owner.owner)
            if self.buying.unwritten:
                why = str(self._failure or error)
                raise PurchasesNotWritten(self.buying.unwritten, why) from error
            raise
        await self._in_thread(self._journal.release, self._owner.owner)

    @property
    def same_files(self) -> list[str]:
        """What is said of files that several requests of this run got."""
        by_content: dict[str, list[str]] = {}
        for key, sha256 in self._fetching.stored.items():
            by_content.setdefault(sha256, []).append(key)
        return [
            f"{len(keys)} requests got one and the same file ({sha256[:12]}): "
            f"{', '.join(key[:12] for key in keys[:10])}"
            for sha256, keys in by_content.items()
            if len(keys) > 1
        ]

    def _stop_buying(self, stop: RunStopped) -> None:
        self.buying.stopped = self.buying.stopped or stop
        self._changed.set()

    def _wake(self) -> None:
        self._changed.set()

    async def _confirm(self, carrier: Carrier) -> bool:
        record = carrier.record
        asked_again = record.error_code in self._runner.policy.ask_again
        if not asked_again and await self._in_thread(self._may_have_two_tasks, record):
            reason = (
                "not bought again: its purchase was sent twice, and the task that failed may not "
                f"be the only one; `--retry {record.error_code}` buys it again all the same"
            )
            carrier.trail = changed(carrier.trail, final=reason)
            return False
        return await self.asking.may_be_bought_again(carrier)

    def _may_have_two_tasks(self, record: Record) -> bool:
        """Whether a purchase was repeated, and the server has not said that it knew the first."""
        repeated = known = False
        for _, event, data in self._journal.history(record.request_key):
            match event:
                case Event.SUBMITTING:
                    repeated = known = False
                case Event.REPLAYING:
                    repeated = True
                case Event.ACCEPTED:
                    known = data.get("replayed") is True
        return repeated and not known

    def _keep(self, bought: UnwrittenPurchase, values: Mapping[str, Any]) -> str:
        """Write what was bought where the next run finds it; returns where."""
        answer = SavedAnswer(
            self._journal.journal_id,
            bought.request_key,
            bought.idempotency_key,
            {name: value for name, value in values.items() if name != "answer"},
            values["answer"],
        )
        try:
            return save_answer(self._images.storage, answer)
        except OSError as error:
            return f"no place ({error})"

    async def _work(self) -> None:
        async with anyio.create_task_group() as background:
            background.start_soon(self.asker.run)
            background.start_soon(self._guarded, self._beat)
            background.start_soon(self._sharing.run)
            background.start_soon(self._guarded, self._watch_elsewhere)
            if self.asking.listener is not None:
                background.start_soon(self._guarded, self.asking.listener.run)
            async with anyio.create_task_group() as carriers:
                try:
                    await self._feed(carriers, background)
                except BaseException:
                    self._outages.give_up()
                    raise
                finally:
                    self.buying.end_submitting()
            background.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    # -- the queue ----------------------------------------------------------------------------

    async def _feed(self, carriers: anyio.abc.TaskGroup, background: anyio.abc.TaskGroup) -> None:
        """Start carriers as the pace has room, until there is nothing left to carry."""
        while self._has_work():
            self._tell()
            if self._failure is not None:
                # Nothing more is started. What is under way fails on its own next write.
                carriers.cancel_scope.cancel()
                return
            self._changed = asyncio.Event()
            self._leave_what_is_over()
            in_hand = len(self._to_submit) + len(self._to_collect)
            if self._backlog and in_hand < _IN_HAND and not self._claiming:
                self._claiming = True
                background.start_soon(self._guarded, self._claim_part)
            wait_s = self._start_ready(carriers)
            await wait(self._changed, wait_s)
        self._tell(last=True)

    def _has_work(self) -> bool:
        return bool(
            self._to_submit
            or self._to_collect
            or self._carried
            or self._backlog
            or self._claiming
            or self._elsewhere
        )

    def _start_ready(self, carriers: anyio.abc.TaskGroup) -> float | None:
        """Start what may be started now; returns the seconds until time alone lets more start."""
        if self._outages.closed:
            return None
        now_s = self._clock.monotonic()
        waits_s = [self._start_collecting(carriers, now_s), self._start_submitting(carriers, now_s)]
        return min((wait_s for wait_s in waits_s if wait_s is not None), default=None)

    def _start_collecting(self, carriers: anyio.abc.TaskGroup, now_s: float) -> float | None:
        while self._to_collect and self._carried < self._most_carried():
            wait_s = self._to_collect[0].not_before_s - now_s
            if wait_s > 0:
                return wait_s
            self._start(carriers, heapq.heappop(self._to_collect))
        return None

    def _start_submitting(self, carriers: anyio.abc.TaskGroup, now_s: float) -> float | None:
        self.asker.pressed, self._at_server.wants = False, 0
        while (
            self._to_submit
            and self._downloads < _FETCH_BACKLOG
            and self._carried < self._most_carried()
        ):
            item = self._to_submit[0]
            kept = self._kept_back(item)
            if kept is not None:
                heapq.heappop(self._to_submit)
                self._deferring.setdefault(kept, []).append(item.record.request_key)
                self._finish(item.record, kept.reason)
                continue
            wait_s = item.not_before_s - now_s
            if wait_s > 0:
                return wait_s
            submits = self._will_submit(item)
            if submits and self._is_left(item.record):
                self._leave(heapq.heappop(self._to_submit).record)
                continue
            wait_s = self._wait_for_place_s(item.record, now_s) if submits else 0.0
            if wait_s > 0:
                self._at_server.wants = len(self._to_submit) + len(self._backlog)
                return None if math.isinf(wait_s) else wait_s
            self._start(carriers, heapq.heappop(self._to_submit), submits=submits)
        return None

    def _wait_for_place_s(self, record: Record, now_s: float) -> float:
        """Seconds until a request may be submitted; endless where only an answer gives it leave."""
        pace = self._at_server.pace
        full = self._in_flight >= pace.room
        if record.state in _NOT_BOUGHT:  # a repeat may have its place already
            full = full or pace.is_full(self._in_flight + len(self._left_there))
        self.asker.pressed = full or pace.unclear
        few = pace.one_by_one and self._at_server.submitting
        if full or few or self._price_is_awaited():
            return math.inf
        return pace.wait_s(now_s)

    def _price_is_awaited(self) -> bool:
        """Whether so many purchases wait for an answer that a cap could be passed by much.

        What is under way was admitted at the old price: at a rise a cap is passed by no more than
        these cost more.
        """
        return self._runner.caps != NO_CAPS and self._at_server.submitting >= UNANSWERED_UNDER_CAP

    def _kept_back(self, item: _Item) -> KeptBack | None:
        """Why a request that was not bought stays so in this run, where that is certain."""
        record, key = item.record, item.record.request_key
        if record.state not in _NOT_BOUGHT or item.trail.file is not None:
            return None
        partition_key = self._planned.unfinished[key]
        return self.buying.kept_back(record, partition_key, self._planned.scopes(key))

    def _leave_what_is_over(self) -> None:
        """Leave all at once what this run will not come to: no call, event or wait for each."""
        over = self._outages.over
        if over is not None:
            if self.buying.stopped is None:
                self._stop_buying(over)
            self.asker.end(over)
            reason = f"left to a later run: {over}"
            for queue in (self._to_submit, self._to_collect):
                for item in queue:
                    self._finish(item.record, reason)
                queue.clear()
            self._leave_unread(self._backlog, reason)
            self._backlog.clear()
            return
        to_buy = len(self._backlog) - self._paid_backlog
        if to_buy > 0 and (kept := self.buying.all_kept_back(self._planned.qualities)):
            keys = [self._backlog.pop() for _ in range(to_buy)]
            if self._planned.kept_codes != {kept.code}:
                self._deferring.setdefault(kept, []).extend(keys)
            self._leave_unread(keys, kept.reason)

    def _leave_unread(self, keys: Iterable[str], reason: str) -> None:
        for key in keys:
            self._progress = self._progress.left_behind(self._planned.rows(key))
            self.at_stake_units += self._planned.at_stake.get(key, 0)
            self._note_left(key, reason)
            self._wake()

    def _is_left(self, record: Record) -> bool:
        """Whether a purchase is left to a later run, because only waiting would give it a place.

        The repeat of one whose outcome is unknown may have a place already.
        """
        if self._runner.policy.wait:
            return False
        pace = self._at_server.pace
        # Not before one more was tried after the pause that the server asked for, if it is short.
        tried = pace.refused_in_row > 1 and self.buying.turned_away_s > _TURNED_AWAY_S
        if tried or pace.wait_s(self._clock.monotonic()) > _LONG_PAUSE_S:
            return True
        return record.state in _NOT_BOUGHT and pace.is_full(len(self._left_there))

    def _leave(self, record: Record) -> None:
        not_bought = record.state in _NOT_BOUGHT
        before = "not bought yet" if not_bought else "outcome still unknown"
        self._finish(record, f"{before}: the server has as many tasks as it takes")
        self.left_for_room += 1

    def _most_carried(self) -> int:
        return self._runner.max_in_flight + _FETCH_BACKLOG

    def _will_submit(self, item: _Item) -> bool:
        if item.record.request_key in self._resolutions:
            return False
        return isinstance(self._next(item.record, item.trail), Submit | Replay)

    def _next(self, record: Record, trail: Trail) -> Action:
        buying = self._runner.buying and self.buying.stopped is None
        # While something was away, nobody could ask about a task.
        policy = self._runner.policy
        policy = changed(policy, patience_s=policy.patience_s + self._outages.away_s)
        return next_action(record, trail, self._clock.now(), policy, buying=buying)

    def _start(self, carriers: anyio.abc.TaskGroup, item: _Item, *, submits: bool = False) -> None:
        partition_key = self._planned.unfinished[item.record.request_key]
        self._carried += 1
        self._in_flight += 1
        self._left_there.discard(item.record.request_key)
        key = item.record.request_key
        carrier = Carrier(
            item.record,
            item.trail,
            partition_key,
            self._planned.scopes(key),
            self._planned.callback_url(key),
        )
        if submits:
            self._at_server.may_submit(carrier)
        carriers.start_soon(self._carry, carrier)

    def _push(self, record: Record, trail: Trail, after_s: float) -> None:
        not_before_s = self._clock.monotonic() + after_s
        queue = self._to_submit if record.state in _TO_SUBMIT else self._to_collect
        heapq.heappush(queue, _Item(not_before_s, next(self._order), record, trail))

    # -- one request --------------------------------------------------------------------------

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
            self._at_server.may_no_more_submit(carrier)
            self._carried -= 1
            self._changed.set()

    async def _advance(self, carrier: Carrier) -> float | None:
        """Take step after step; returns the seconds to wait where it must be put back."""
        wait_s: float | None = 0.0
        while wait_s is not None and wait_s <= _SHORT_S:
            if wait_s > 0:
                await self._clock.sleep(wait_s)
            if self._outages.over is not None:
                self._finish(carrier.record, f"left to a later run: {self._outages.over}")
                return None
            action = self._next(carrier.record, carrier.trail)
            may_submit = carrier.may_submit and not self._outages.closed
            leave_needed = isinstance(action, Submit | Replay) and not may_submit
            if leave_needed and carrier.record.request_key not in self._resolutions:
                return 0.0  # by way of the queue, because only the pace gives leave
            if self._is_stopped(carrier):
                return 0.0  # by way of the queue, where all that is kept back is left at once
            wait_s = await self._step(carrier, action)
            self._changed.set()  # the pace may have room now
        return wait_s

    def _is_stopped(self, carrier: Carrier) -> bool:
        not_bought = carrier.record.state in _NOT_BOUGHT and carrier.trail.final is None
        return not_bought and carrier.trail.file is None and self.buying.stopped is not None

    async def _step(self, carrier: Carrier, action: Action) -> float | None:  # noqa: C901 - an arm per action
        """Do the next thing once; None where there is nothing more to do in this run."""
        record = carrier.record
        missing = self._runner.file_is_missing
        if record.state is State.STORED and await self._in_thread(missing, record):
            if isinstance(action, Leave) and action.reason:
                self._finish(record, action.reason)
                return None
            return await self._fetching.not_here(carrier)
        if (resolution := self._resolution(record, action)) is not None:
            return await self._resolve(carrier, resolution)
        match action:
            case Leave(reason=reason):
                self._finish(record, reason)
                return None
            case Submit() | Replay() | MarkUnknown() | PlanAgain():
                return await self._buy(carrier, action)
            case Ask():
                if self._runner.policy.wait and self.asking.is_overdue(record):
                    self._leave_window(carrier)
                return await self.asking.ask(carrier)
            case Fetch():
                self._leave_window(carrier)
                return await self._fetch(carrier)
            case Adopt(name=name):
                return await self._fetching.adopt(carrier, name)
            case Expire(code=code, message=message):
                return await self._fetching.expire(carrier, code, message)

    async def _buy(
        self, carrier: Carrier, action: Submit | Replay | MarkUnknown | PlanAgain
    ) -> float:
        match action:
            case Submit():
                return await self.buying.submit(carrier, Event.SUBMITTING)
            case Replay():
                return await self.buying.submit(carrier, Event.REPLAYING)
            case MarkUnknown(code=code, message=message):
                return await self.buying.mark_unknown(carrier, code, message)
            case PlanAgain():
                return await self.buying.plan_again(carrier)

    def _resolution(self, record: Record, action: Action) -> Resolution | Claim | None:
        """What a person has decided about an unknown outcome; failing that, what a call claims.

        A claim counts only where no repeat of the purchase would tell for certain.
        """
        if record.state is not State.UNKNOWN:
            return None
        decided = self._resolutions.pop(record.request_key, None)
        if decided is None and isinstance(action, Leave):
            return self._claims.pop(record.request_key, None)
        return decided

    async def _resolve(self, carrier: Carrier, resolution: Resolution | Claim) -> float:
        if isinstance(resolution, Claim):
            return await self.asking.take_claim(carrier, resolution)
        return await self.buying.resolve(carrier, resolution)

    async def _fetch(self, carrier: Carrier) -> float:
        self._downloads += 1
        try:
            return await self._fetching.fetch(carrier)
        finally:
            self._downloads -= 1
            self._changed.set()

    def _finish(self, record: Record, reason: str) -> None:
        self._finished.add(record.request_key)
        if reason:
            self._note_left(record.request_key, reason)
            self.at_stake_units += record.committed_units if record.state in AT_STAKE else 0
        self._wake()  # it may have been the last one
        rows = self._planned.rows(record.request_key)
        self._progress = self._progress.finished(record, rows, left=bool(reason))

    def _note_left(self, key: str, reason: str) -> None:
        """Count a reason; texts that name their own task are bounded, to keep memory small."""
        if len(self.left) < _LEFT_NAMED:
            self.left[key] = reason
        known = reason in self.left_reasons or len(self.left_reasons) < _LEFT_NAMED
        self.left_reasons[reason if known else _OTHER_REASONS] += 1

    def _leave_window(self, carrier: Carrier) -> None:
        if not self._runner.policy.wait and carrier.record.state is State.SUBMITTED:
            self._left_there.add(carrier.record.request_key)  # it stays there, and counts on
        else:
            self._left_there.discard(carrier.record.request_key)
            self._at_server.ended(carrier)
        if carrier.holds_place:
            carrier.holds_place = False
            self._in_flight -= 1
            self._changed.set()

    # -- progress -----------------------------------------------------------------------------

    def progress_now(self) -> Progress:
        """How far the run is."""
        return changed(
            self._progress, in_flight=self._in_flight, charged_units=self.asking.charged_units
        )

    def _tell(self, *, last: bool = False) -> None:
        now_s = self._clock.monotonic()
        if last or now_s - self._told_at_s >= _TELL_S:
            self._told_at_s = now_s
            self._runner.on_progress(self.progress_now())

    # -- claims and the journal ---------------------------------------------------------------

    async def _claim_part(self) -> None:
        """Claim the next part of the backlog. What another run holds is looked at again later."""
        part = [self._backlog.popleft() for _ in range(min(_PART, len(self._backlog)))]
        self._paid_backlog = max(0, self._paid_backlog - len(part))
        await self._claim(part)
        self._claiming = False

    async def _claim(self, keys: list[str]) -> None:
        """Claim requests and put them into the queue.

        Read again after the claim: another run may have carried them further.
        """
        mine = await self._in_thread(self._journal.claim, keys, self._owner.owner)
        found = await self._in_thread(self._journal.records, mine)
        calls = await self._calls_about(found)
        files, elsewhere = await self._in_thread(self._look_for_files, found)
        for key in keys:
            if key in found:
                trail = Trail(
                    worth_asking=self.asking.worth_asking(found[key], calls),
                    file=files.get(key),
                    elsewhere=tuple(elsewhere.get(key, ())),
                )
                self._push(found[key], trail, 0.0)
            elif key not in mine:
                self._elsewhere.append(key)
        self._changed.set()

    def _look_for_files(
        self, found: Mapping[str, Record]
    ) -> tuple[dict[str, str], Mapping[str, Sequence[str]]]:
        """Which requests have a file in the storage root, or in another one, that may be theirs."""
        files: dict[str, str] = {}
        missing: list[str] = []
        for key, record in found.items():
            name = self._images.find(record, adopts=self._runner.root.adopts)
            if name is not None:
                files[key] = name
            elif record.state is State.STORED:
                missing.append(key)
        return files, self._runner.root.elsewhere(missing) if missing else {}

    async def _calls_about(self, found: Mapping[str, Record]) -> Mapping[str, ReceivedCallback]:
        """What was called about of requests whose next step may hang on it."""
        unknown = [key for key, record in found.items() if record.state in _OPEN]
        wait = self._runner.policy.wait
        left = [] if wait else [k for k, one in found.items() if one.state is State.SUBMITTED]
        if not unknown and not left:
            return {}
        calls = await self._in_thread(self._journal.callbacks.received, [*unknown, *left])
        claimed = {key: calls[key] for key in unknown if key in calls}
        taken = await self._in_thread(
            self._journal.known_task_ids, [c.task_id for c in claimed.values()]
        )
        for key, call in claimed.items():
            if call.task_id and call.task_id not in taken and is_task_id(call.task_id):
                self._claims[key] = Claim(call.task_id, call.first_at)
        return calls

    async def _watch_elsewhere(self) -> None:
        """Follow the requests that another run holds, and let go of what is finished.

        A run that waits holds nothing that it is done with, so that no two wait for each other.
        """
        while True:
            await self._clock.sleep(_ELSEWHERE_S)
            if not self._elsewhere:
                self._elsewhere_since_s = None
                continue
            now_s = self._clock.monotonic()
            if self._elsewhere_since_s is None:
                self._elsewhere_since_s = now_s
            waited_s = now_s - self._elsewhere_since_s
            if waited_s > self._runner.policy.patience_s or self._outages.over is not None:
                await self._leave_elsewhere()
                continue
            await self._let_go()
            # The longest waiting first; what is still held goes to the end again.
            part = list(islice(self._elsewhere, _PART))
            await self._claim(part)
            for _ in part:
                self._elsewhere.popleft()
            self._changed.set()

    async def _leave_elsewhere(self) -> None:
        """Leave what another run still holds, and say which."""
        keys = list(self._elsewhere)
        holders = await self._in_thread(self._journal.holders, keys)
        records = await self._in_thread(self._journal.records, keys)
        for key in keys:
            if key in records:
                holder = holders.get(key, "another run")
                self._finish(records[key], f"held by {holder}; a later run goes on with it")
        self._elsewhere.clear()
        self._changed.set()

    async def _let_go(self) -> None:
        finished, self._finished = self._finished, set()
        await self._in_thread(self._journal.unclaim, finished, self._owner.owner)

    async def _beat(self) -> None:
        while True:
            await self._clock.sleep(_HEARTBEAT_S)
            await self._in_thread(self._journal.heartbeat, self._owner.owner)
            await self._let_go()

    async def _announce_stop(self, error: AccountStopped) -> None:
        await self._in_thread(
            self._journal.stop,
            self._runner.launch or self._runner.run_id,
            error.code,
            str(error),
            self._clock.now(),
        )

    async def _note_kept_back(self) -> None:
        if isinstance(self.buying.stopped, TryLater):
            return  # it passes by itself, so that it is no news of any row
        for kept, keys in self._deferring.items():
            defer = partial(
                self._journal.defer,
                keys,
                code=kept.code,
                message=kept.reason,
                owner=self._owner.owner,
                run_id=self._runner.run_id,
                at=self._clock.now(),
            )
            await self._in_thread(defer)

    async def _read_account(self) -> None:
        """Keep what the account says before and after, to hold the journal against."""
        try:
            said = await self._client.credits()
        except ApiError as error:
            self.account_error = str(error)
            return
        await self._in_thread(self._journal.add_account_reading, self._runner.run_id, said)

    async def _guarded(self, work: Callable[[], Awaitable[None]]) -> None:
        """Have a journal that fails in the background end the run as it does elsewhere."""
        try:
            await work()
        except JournalError as error:
            self._failure = self._failure or error
            self._changed.set()

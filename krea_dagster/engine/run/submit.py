"""The submit step: one POST at a time, its intent on disk before it leaves.

What the answer says about money decides what is written: bought, certainly not charged, or
unknown. Nothing is repeated here; the policy decides what to do next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any, Final, NamedTuple

import anyio
import anyio.lowlevel

from krea_dagster.engine.budget import is_doubtful, scopes_of
from krea_dagster.engine.journal.commitments import DOUBTED_IN_ROW, price_doubted
from krea_dagster.engine.journal.saved_answers import SavedAnswer, save_answer
from krea_dagster.engine.policy import CONFLICT, NO_USABLE_ANSWER, RATE_LIMITED, task_error_wait_s
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import HasTask, Lost, NotBought, Resolution, SendAgain
from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.poll import PollStep
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import (
    AccountStopped,
    BuyingClosed,
    CapReached,
    IdempotencyConflict,
    NotCharged,
    NotSent,
    OutcomeUnknown,
    PurchasePending,
    Refused,
    RunStopped,
    SubmitError,
    TakenOver,
    TaskTaken,
    TryLater,
    TurnedAway,
    UnwrittenPurchase,
)
from krea_dagster.models import Submission, credits_from_units, credits_text

#: Seconds between repeats of a purchase that the server calls undecided: "wait a minute".
_PENDING_S: Final = 60.0


class Deferral(NamedTuple):
    """Why rows are not bought in this run: a code, and a sentence for people."""

    code: str
    reason: str


class SubmitStep:
    """The purchases of one run, and what it has learned from them.

    Each step takes an item, changes its record and retry state, and returns the seconds to wait
    before its next step. ``caps_reached`` has one sentence for each scope, ``price_increases`` for
    each quality; ``unwritten`` is what was bought and the journal did not take. Raises JournalError
    if an event cannot be written.
    """

    def __init__(self, context: RunContext, poll: PollStep) -> None:
        self._context = context
        self._options, self._policy = context.options, context.policy
        self._clock, self._in_flight = context.clock, context.in_flight
        self._record = context.record
        self._poll = poll
        self._doubted_in_row = 0
        self._posting: set[anyio.CancelScope] = set()
        self._ending = False
        self._refused_since_s: float | None = None
        self._unanswered = 0
        self._silent_since_s: float | None = None
        self.caps_reached: dict[str, str] = {}
        # What caps do not admit, by scope and quality, until a purchase gives its room back.
        self._full: dict[tuple[str, str], Deferral] = {}
        context.on_release = self._full.clear
        self.price_increases: dict[str, str] = {}
        self.unwritten: list[UnwrittenPurchase] = []
        self.posts = 0
        self.rate_limited = 0

    def end_submitting(self) -> None:
        """Give the POSTs under way a few seconds, after which their outcome is unknown.

        They are shielded from cancellation until then, because an answer that is not read
        may be an image that was paid for.
        """
        self._ending = True
        for scope in self._posting:
            scope.deadline = anyio.current_time() + self._policy.grace_s

    # -- one POST -----------------------------------------------------------------------------

    async def submit(self, item: WorkItem, intent: Event) -> float:
        """POST once: the intent is on disk before it leaves, and the answer before anything."""
        values: dict[str, Any] = {}
        if intent is not Event.REPLAYING:
            values = {
                "table_id": self._options.table_id,
                "partition_key": item.partition_key,
                "api_key": self._options.api_key,
                "scopes": item.scopes,
                "callback_url": self._callback_url(item),
                **({} if item.row is None else asdict(item.row)),
            }
        retried: SubmitError | None = None
        await anyio.lowlevel.checkpoint_if_cancelled()  # below, a stop is not heard
        with anyio.CancelScope(shield=True) as scope:
            self._posting.add(scope)
            try:
                # If the run stops here, a purchase that was not sent must not look as if it was.
                with anyio.CancelScope(shield=True):
                    await self._record(item, intent, values)
                    if self._ending:
                        return await self._take_back(item)
                self.posts += 1
                sent_at_s = self._clock.monotonic()
                answer = await self._post(item.record)
                # The grace of a stop is for the answer, not for writing it down.
                with anyio.CancelScope(shield=True):
                    retried = await self._answered(item, answer, sent_at_s)
            except BuyingClosed as closed:
                return await self._closed(item, closed)
            finally:
                self._posting.discard(scope)
                self._in_flight.revoke_submit(item)
        if retried is not None:
            return await self._failed(item, retried)
        if scope.cancelled_caught:
            # A stop's grace ended before the answer came.
            with anyio.CancelScope(shield=True):
                error = ("stopped", "the run was stopped before the answer came")
                await self._record(item, Event.OUTCOME_UNKNOWN, error=error)
        return 0.0

    def _callback_url(self, item: WorkItem) -> str | None:
        """Return the callback address of a purchase: its row's, or the receiver's."""
        url_of = self._options.callback_url_of
        if item.callback_url is not None or url_of is None:
            return item.callback_url
        return url_of(item.record.request_key)

    async def _take_back(self, item: WorkItem) -> float:
        """Take an intent back because the run was stopped."""
        if item.record.state is State.SUBMITTING:
            error = ("stopped", "the run was stopped before it was sent")
            await self._record(item, Event.TURNED_AWAY, error=error)
        return 0.0

    async def _closed(self, item: WorkItem, closed: BuyingClosed) -> float:
        """Hold a row back that a cap or the account does not admit; nothing was sent."""
        held = Deferral(closed.code, f"not bought: {closed}")
        if isinstance(closed, RunStopped):
            self._context.stop_buying(closed)
        elif isinstance(closed, CapReached):
            self.caps_reached.setdefault(closed.shown, str(closed))
            self._full[closed.scope, item.record.request.quality] = held
        record = item.record
        if record.state is not State.DEFERRED or record.error_code != closed.code:
            await self._record(item, Event.DEFERRED, error=(closed.code, str(closed)))
        item.retry.leave_reason = held.reason
        return 0.0

    def deferral_of(self, item: WorkItem) -> Deferral | None:
        """Return why a request is not bought in this run, if that is certain already."""
        if self._context.stopped is not None:
            return Deferral(self._context.stopped.code, self._why_stopped())
        if self._full:
            for scope in self._scopes(item.partition_key, item.scopes):
                if held := self._full.get((scope, item.record.request.quality)):
                    return held
        return None

    def all_deferred(self, qualities: Collection[str]) -> Deferral | None:
        """Return why no request of these qualities is bought in this run, in any partition."""
        if self._context.stopped is not None:
            return Deferral(self._context.stopped.code, self._why_stopped())
        if self._full and qualities:
            for scope in self._scopes("", ()):
                held = [self._full.get((scope, quality)) for quality in qualities]
                if all(held):
                    return held[0]
        return None

    def _scopes(self, partition_key: str, scopes: tuple[str, ...]) -> tuple[str, ...]:
        now, options = self._clock.now(), self._options
        return scopes_of(options.run_id, now, partition_key, scopes, table_id=options.table_id)

    async def _post(self, record: Record) -> Submission | SubmitError:
        try:
            return await self._context.client.submit(
                record.request,
                idempotency_key=str(record.idempotency_key),
                callback_url=record.callback_url,
            )
        except SubmitError as error:
            return error

    async def _answered(
        self, item: WorkItem, answer: Submission | SubmitError, sent_at_s: float
    ) -> SubmitError | None:
        """Write the answer to a POST; returns an error after which it is to be retried."""
        if isinstance(answer, Submission):
            self._in_flight.taken(item, sent_at_s)
            await self._accepted(item, answer)
            item.retry.submit_failures = 0
            self._refused_since_s = None
            self._unanswered, self._silent_since_s = 0, None
            return None
        if isinstance(answer, TurnedAway):
            self.rate_limited += 1
            self._in_flight.refused(sent_at_s, answer.retry_after_s or 0.0)
        return await self._rejected(item, answer)

    async def _accepted(self, item: WorkItem, submission: Submission) -> None:
        """Write what was bought, or keep in a file what cannot be written."""
        record, units = item.record, submission.credits_reserved_units
        # Not of a repeat: there the server recognises what this journal has sent.
        replayed = submission.replayed and record.state is State.SUBMITTING
        self._check_price(record, units)
        values = {
            "task_id": submission.task_id,
            "reserved_units": units,
            "billing_rule": submission.billing_rule,
            "user_group": submission.user_group,
            "replayed": replayed,
        }
        data = {"answer": dict(submission.answer), "replayed": submission.replayed}
        bought = UnwrittenPurchase(
            record.request_key,
            str(record.idempotency_key),
            submission.task_id,
            None if units is None else credits_from_units(units),
        )
        try:
            await self._record(item, Event.ACCEPTED, values, data)
        except TaskTaken as error:
            message = f"the server returned a task id that belongs to another purchase: {error}"
            await self._record(
                item, Event.OUTCOME_UNKNOWN, data=data, error=("task_id_repeated", message)
            )
            item.retry.leave_reason = f"outcome unknown, a person decides: {error}"
        except TakenOver as error:
            where = self._keep(bought, values, submission.answer)
            raise TakenOver(f"{error}; {bought} is kept in {where} for the next run") from error
        except Exception:  # also a bug of ours: the task's id is nowhere else
            self._keep(bought, values, submission.answer)
            self.unwritten.append(bought)
            raise

    def _keep(
        self, bought: UnwrittenPurchase, values: Mapping[str, Any], answer: Mapping[str, Any]
    ) -> str:
        """Write a purchase to a file for the next run; returns its place."""
        journal, storage = self._options.journal, self._options.images.storage
        kept = SavedAnswer(
            journal.database.journal_id,
            bought.request_key,
            bought.idempotency_key,
            values,
            dict(answer),
        )
        try:
            return save_answer(storage, kept)
        except OSError as error:
            return f"no place ({error})"

    def _check_price(self, record: Record, units: int | None) -> None:
        """Note a price above the expected one, and stop after several implausible ones."""
        quality = record.request.quality
        if units in (None, 0, record.expected_units):
            self._doubted_in_row = 0
            return
        expected = credits_text(record.expected_units)
        if is_doubtful(units, quality, {quality: record.expected_units}):
            self._doubted_in_row += 1
            self.price_increases[quality] = (
                f"EvoLink reports {credits_text(units)} credits for a {quality} image, "
                f"far from the {expected} that were expected: its charge counts as unknown, "
                f"and caps still count {expected}, until `krea-dagster accept price {quality}`"
            )
            if self._doubted_in_row >= DOUBTED_IN_ROW:
                self._context.stop_buying(price_doubted(quality, units, self._doubted_in_row))
            return
        self._doubted_in_row = 0
        if units > record.expected_units:
            self.price_increases[quality] = (
                f"{quality} costs {credits_text(units)} credits, and {expected} were expected"
            )

    async def _rejected(self, item: WorkItem, error: SubmitError) -> SubmitError | None:
        """Write what an error means for the money; returns it if the POST is to be retried.

        Only the error of a first POST can make it certain that nothing was charged.
        """
        said = (_code(error), str(error))
        is_first = item.record.state is not State.UNKNOWN
        conflict = isinstance(error, IdempotencyConflict)
        if conflict and is_first and not self._options.root.adopts:
            # A first POST certainly created nothing: another purchase has its key. In a journal
            # that has lost purchases, that one may be its own.
            await self._record(item, Event.REFUSED, {"charged_units": 0}, error=(CONFLICT, said[1]))
            return None
        certain = is_first and isinstance(error, NotCharged)
        event = _event_of(error) if certain else Event.OUTCOME_UNKNOWN
        values = {"charged_units": 0} if event is Event.REFUSED else None
        await self._record(item, event, values, error=said)
        match error:
            case TurnedAway():
                self._note_rate_limit(error)
            case AccountStopped():
                await self._account_stopped(error)
                if certain:
                    item.retry.leave_reason = self._why_stopped()
            case IdempotencyConflict() | Refused():
                if not certain:
                    item.retry.leave_reason = f"outcome unknown, a person decides: {error}"
            case _:
                return error
        return None

    async def _failed(self, item: WorkItem, error: SubmitError) -> float:
        """Wait for the API if it was away; otherwise count the failure, and pause."""
        if await self._context.api_was_away(error):
            return 0.0  # it was not the request that failed
        item.retry.submit_failures += 1
        at_least_s = error.retry_after_s or 0.0
        match error:
            case PurchasePending():
                at_least_s = max(at_least_s, _PENDING_S * self._policy.wait_scale)
            case OutcomeUnknown():
                self._slow_down(error)
        return self._context.backoff_s(item.retry.submit_failures, at_least_s=at_least_s)

    def _slow_down(self, error: SubmitError) -> None:
        """Treat a server that does not answer as overloaded: each further purchase is at stake.

        Without any answer for as long as the patience lasts, buying stops.
        """
        now_s, policy = self._clock.monotonic(), self._policy
        self._unanswered += 1
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        over = self._unanswered - policy.silence_tries
        if over < 0:
            return
        self._in_flight.silent(self._context.backoff_s(over + 1))
        silent_s = now_s - self._silent_since_s
        if silent_s > policy.patience_s:
            message = f"no purchase got a usable answer for {silent_s:.0f} s, the last: {error}"
            self._context.stop_buying(TryLater(NO_USABLE_ANSWER, message))

    def _note_rate_limit(self, error: TurnedAway) -> None:
        """Note a 429: the request has not failed, and the pace waits.

        Nothing more is bought if it has lasted for the patience, or is said to last longer.
        """
        if self._refused_since_s is None:
            self._refused_since_s = self._clock.monotonic()
        lasts_s = self.rate_limited_s
        if lasts_s + (error.retry_after_s or 0.0) > self._policy.patience_s:
            asks = f", and asks for {error.retry_after_s:g} s more" if error.retry_after_s else ""
            message = f"the server has taken nothing for {lasts_s:.0f} s{asks}: {error}"
            self._context.stop_buying(TryLater(RATE_LIMITED, message))

    @property
    def rate_limited_s(self) -> float:
        """Seconds since the server last took a purchase, while it answers with 429."""
        if self._refused_since_s is None:
            return 0.0
        return self._clock.monotonic() - self._refused_since_s

    async def _account_stopped(self, error: AccountStopped) -> None:
        """Stop this run, and the other runs of its launch."""
        if self._context.stopped is None:
            self._context.stop_buying(error)
            options = self._options
            launch, now = options.launch or options.run_id, self._clock.now()
            await self._context.in_thread(options.journal.stop, launch, error.code, str(error), now)

    def _why_stopped(self) -> str:
        """Return why nothing more is bought, for the people who read the manifest."""
        stopped = self._context.stopped
        by_account = isinstance(stopped, AccountStopped)
        why = "the account stopped the run" if by_account else "buying stopped"
        return f"not bought, {why}: {stopped}"

    # -- without a POST -----------------------------------------------------------------------

    async def mark_unknown(self, item: WorkItem, code: str, message: str) -> float:
        """Record that the outcome of a purchase is unknown."""
        data = {"task_id": item.record.task_id} if item.record.task_id else None
        await self._record(item, Event.OUTCOME_UNKNOWN, data=data, error=(code, message))
        return 0.0

    async def resolve(self, item: WorkItem, resolution: Resolution) -> float:
        """Apply a person's decision about an unknown outcome."""
        by = {"resolved_by": "a person", "decision": str(resolution)}
        match resolution:
            case NotBought():
                await self._record(item, Event.RELEASED, {"charged_units": 0}, by)
            case Lost():
                error = ("resolved_as_lost", "a person decided that it was charged and lost")
                await self._record(item, Event.EXPIRED, data=by, error=error)
            case HasTask(task_id=task_id):
                try:
                    await self._record(item, Event.ACCEPTED, {"task_id": task_id}, by)
                except TaskTaken as taken:
                    item.retry.leave_reason = f"outcome unknown, a person decides: {taken}"
            case SendAgain():
                item.retry.replay_decided = True
        return 0.0

    async def requeue(self, item: WorkItem) -> float:
        """Plan a request again whose task failed, cost nothing, and may succeed.

        After the pause for its error code, and only if its task has still failed then.
        """
        record, retry = item.record, item.retry
        code = record.error_code or ""
        pause_s = task_error_wait_s(code, self._context.random_fraction(), self._policy)
        if record.state is State.FAILED and not retry.waited:
            retry.waited = True
            if pause_s > 0:
                return pause_s
        if record.task_id is not None and not await self._confirm_failed(item):
            return 0.0
        await self._record(item, Event.PLANNED)
        retry.retried, retry.waited = True, False
        return 0.0

    async def _confirm_failed(self, item: WorkItem) -> bool:
        """Whether the task has certainly failed, and is the only one of its purchase."""
        code = item.record.error_code
        wanted = code in self._policy.retry_codes
        if not wanted and await self._context.in_thread(self._may_have_two_tasks, item.record):
            item.retry.leave_reason = (
                "not bought again: its purchase was sent twice, and the task that failed may not "
                f"be the only one; `--retry {code}` buys it again anyway"
            )
            return False
        return await self._poll.may_be_bought_again(item)

    def _may_have_two_tasks(self, record: Record) -> bool:
        """Whether a purchase was repeated, and the server did not recognise it. Blocks."""
        repeated = known = False
        for _, event, data in self._options.journal.history(record.request_key):
            match event:
                case Event.SUBMITTING:
                    repeated = known = False
                case Event.REPLAYING:
                    repeated = True
                case Event.ACCEPTED:
                    known = data.get("replayed") is True
        return repeated and not known


def _event_of(error: SubmitError) -> Event:
    """Return the event after an error which makes it certain that nothing was charged."""
    if isinstance(error, AccountStopped):
        return Event.DEFERRED
    return Event.REFUSED if isinstance(error, Refused) else Event.TURNED_AWAY


def _code(error: SubmitError) -> str:
    if error.code:
        return error.code
    if isinstance(error, NotSent):
        return "not_sent"
    return f"http_{error.status}" if error.status is not None else "no_answer"

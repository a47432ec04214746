"""Buys: one POST at a time, its intent on disk before it leaves, and its answer before anything.

What the answer says about money decides what is written: bought, certainly not charged, or
unknown. Nothing here repeats by itself; what to do next is the policy's to say.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import Any, Final, NamedTuple, Protocol

import anyio
import anyio.lowlevel

from krea_dagster.engine.budget import is_doubtful, scopes_of
from krea_dagster.engine.frozen import changed
from krea_dagster.engine.journal.commitments import DOUBTED_IN_ROW, price_doubted
from krea_dagster.engine.policy import CONFLICT, task_error_wait_s
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import HasTask, Lost, NotBought, Resolution, SendAgain
from krea_dagster.engine.run.in_flight import AtServer
from krea_dagster.engine.run.outages import Outages, Part
from krea_dagster.engine.run.poller import TaskReader
from krea_dagster.engine.run.work_item import Carrier, Desk, trouble
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import Downloader
from krea_dagster.errors import (
    AccountStopped,
    BuyingClosed,
    CapReached,
    IdempotencyConflict,
    JournalError,
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
from krea_dagster.models import (
    AccountCredits,
    ImageRequest,
    Submission,
    credits_from_units,
    credits_text,
)

#: The code of a run that ended because the server turned everything away.
TURNED_AWAY: Final = "turned_away"
#: As well, because no purchase got a usable answer.
NO_USABLE_ANSWER: Final = "no_usable_answer"

#: Seconds between repeats of a purchase that the server calls undecided: "wait a minute".
_PENDING_S: Final = 60.0


class KeptBack(NamedTuple):
    """Why rows are not bought in this run: a code, and a sentence for people."""

    code: str
    reason: str


class Client(TaskReader, Downloader, Protocol):
    """What the engine needs of KreaClient."""

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        """POST one request. Raises SubmitError."""

    async def credits(self) -> AccountCredits:
        """Read the account's credits. Raises ApiError."""


class Buying:
    """The purchases of one run, and what it has learned by them.

    Every method takes a carrier, changes its record and trail, and returns the seconds to wait
    before its next step. ``stopped`` is the answer that ended the buying, ``caps_reached`` what the
    caps said, by scope, ``dearer`` the prices above the expected, by quality, ``unwritten`` what
    was bought and the journal did not take. ``announce_stop`` tells the launch's other shards that
    the account stopped this one, ``keep`` writes what was bought and could not be written where the
    next run finds it, and returns where; ``confirm`` reads a failed task before its request is
    bought again. ``table_id`` and ``api_key`` (a fingerprint) are kept with each purchase.
    ``callback_url_of`` gives the address at which a request is called back, where there is a
    receiver. Raises JournalError where an event could not be written.
    """

    def __init__(
        self,
        client: Client,
        desk: Desk,
        at_server: AtServer,
        *,
        outages: Outages,
        announce_stop: Callable[[AccountStopped], Awaitable[None]],
        keep: Callable[[UnwrittenPurchase, Mapping[str, Any]], str] = lambda _, __: "",
        confirm: Callable[[Carrier], Awaitable[bool]],
        table_id: str = "",
        api_key: str | None = None,
        restored: bool = False,
        callback_url_of: Callable[[str], str] | None = None,
    ) -> None:
        self._client = client
        self._desk = desk
        self._at_server = at_server
        self._outages = outages
        self._announce_stop = announce_stop
        self._keep = keep
        self._confirm = confirm
        self._table_id = table_id
        self._api_key = api_key
        self._restored = restored
        self._doubted_in_row = 0
        self._callback_url_of = callback_url_of
        self._posting: set[anyio.CancelScope] = set()
        self._ending = False
        self._refused_since_s: float | None = None
        self._unanswered = 0
        self._silent_since_s: float | None = None
        self.stopped: AccountStopped | RunStopped | None = None
        self.caps_reached: dict[str, str] = {}
        # What caps do not admit, by scope and quality, until a purchase gives its room back.
        self._full: dict[tuple[str, str], KeptBack] = {}
        desk.on_release = self._full.clear
        self.dearer: dict[str, str] = {}
        self.unwritten: list[UnwrittenPurchase] = []
        self.posts = 0
        self.turned_away = 0

    def end_submitting(self) -> None:
        """Give the POSTs under way a few seconds, after which their outcome is unknown.

        They are shielded from cancellation until then, because an answer that is not read
        may be an image that was paid for.
        """
        self._ending = True
        for scope in self._posting:
            scope.deadline = anyio.current_time() + self._desk.policy.grace_s

    # -- one POST -----------------------------------------------------------------------------

    async def submit(self, carrier: Carrier, intent: Event) -> float:
        """POST once: the intent is on disk before it leaves, and the answer before anything."""
        values: dict[str, Any] = {}
        if intent is not Event.REPLAYING:
            values = {
                "table_id": self._table_id,
                "partition_key": carrier.partition_key,
                "api_key": self._api_key,
                "scopes": carrier.scopes,
                "callback_url": self._callback_url(carrier),
            }
        retried: SubmitError | None = None
        await anyio.lowlevel.checkpoint_if_cancelled()  # below, a stop is not heard
        with anyio.CancelScope(shield=True) as scope:
            self._posting.add(scope)
            try:
                # Whatever stops the run: what is not known to be sent is not left as if it were.
                with anyio.CancelScope(shield=True):
                    await self._desk.record(carrier, intent, values)
                    if self._ending:
                        return await self._not_sent_any_more(carrier)
                self.posts += 1
                sent_at_s = self._desk.clock.monotonic()
                answer = await self._post(carrier.record)
                # The grace of a stop is for the answer, not for writing it down.
                with anyio.CancelScope(shield=True):
                    retried = await self._answered(carrier, answer, sent_at_s)
            except BuyingClosed as closed:
                return await self._closed(carrier, closed)
            finally:
                self._posting.discard(scope)
                self._at_server.may_no_more_submit(carrier)
        if retried is not None:
            return await self._failed(carrier, retried)
        if scope.cancelled_caught:
            # A stop's grace ended before the answer came.
            with anyio.CancelScope(shield=True):
                said = trouble("stopped", "the run was stopped before the answer came")
                await self._desk.record(carrier, Event.OUTCOME_UNKNOWN, said)
        return 0.0

    def _callback_url(self, carrier: Carrier) -> str | None:
        """Where a purchase is called back: by its row, or by the receiver of this journal."""
        if carrier.callback_url is not None or self._callback_url_of is None:
            return carrier.callback_url
        return self._callback_url_of(carrier.record.request_key)

    async def _not_sent_any_more(self, carrier: Carrier) -> float:
        """Take an intent back that the run's stop overtook."""
        if carrier.record.state is State.SUBMITTING:
            said = trouble("stopped", "the run was stopped before it was sent")
            await self._desk.record(carrier, Event.TURNED_AWAY, said)
        return 0.0

    async def _closed(self, carrier: Carrier, closed: BuyingClosed) -> float:
        """Keep a row back that a cap or the account does not let in; nothing was sent."""
        kept = KeptBack(closed.code, f"not bought: {closed}")
        if isinstance(closed, RunStopped):
            self.stopped = self.stopped or closed
        elif isinstance(closed, CapReached):
            self.caps_reached.setdefault(closed.shown, str(closed))
            self._full[closed.scope, carrier.record.request.quality] = kept
        record = carrier.record
        if record.state is not State.DEFERRED or record.error_code != closed.code:
            await self._desk.record(carrier, Event.DEFERRED, trouble(closed.code, str(closed)))
        carrier.trail = changed(carrier.trail, final=kept.reason)
        return 0.0

    def kept_back(
        self, record: Record, partition_key: str, scopes: tuple[str, ...] = ()
    ) -> KeptBack | None:
        """Return why a request is not bought in this run, where that is certain already."""
        if self.stopped is not None:
            return KeptBack(self.stopped.code, self.why_kept_back())
        if self._full:
            for scope in self._scopes(partition_key, scopes):
                if kept := self._full.get((scope, record.request.quality)):
                    return kept
        return None

    def all_kept_back(self, qualities: Collection[str]) -> KeptBack | None:
        """Return why no request of these qualities is bought in this run, in any partition."""
        if self.stopped is not None:
            return KeptBack(self.stopped.code, self.why_kept_back())
        if self._full and qualities:
            for scope in self._scopes("", ()):
                kept = [self._full.get((scope, quality)) for quality in qualities]
                if all(kept):
                    return kept[0]
        return None

    def _scopes(self, partition_key: str, scopes: tuple[str, ...]) -> tuple[str, ...]:
        now = self._desk.clock.now()
        return scopes_of(self._desk.run_id, now, partition_key, scopes, table_id=self._table_id)

    async def _post(self, record: Record) -> Submission | SubmitError:
        try:
            return await self._client.submit(
                record.request,
                idempotency_key=str(record.idempotency_key),
                callback_url=record.callback_url,
            )
        except SubmitError as error:
            return error

    async def _answered(
        self, carrier: Carrier, answer: Submission | SubmitError, sent_at_s: float
    ) -> SubmitError | None:
        """Write what a POST was answered; returns an error after which it is to be retried."""
        if isinstance(answer, Submission):
            self._at_server.taken(carrier, sent_at_s)
            await self._accepted(carrier, answer)
            carrier.trail = changed(carrier.trail, submit_failures=0)
            self._refused_since_s = None
            self._unanswered, self._silent_since_s = 0, None
            return None
        is_first = carrier.record.state is not State.UNKNOWN
        if isinstance(answer, TurnedAway):
            self.turned_away += 1
            self._at_server.refused(sent_at_s, answer.retry_after_s or 0.0)
        if isinstance(answer, IdempotencyConflict) and is_first and not self._restored:
            # Of a first POST it is certain that it created nothing: another purchase has its key.
            # In a journal that has lost purchases that one may be its own.
            said = {**trouble(CONFLICT, str(answer)), "charged_units": 0}
            await self._desk.record(carrier, Event.REFUSED, said)
            return None
        if isinstance(answer, NotCharged) and is_first:
            return await self._not_charged(carrier, answer)
        return await self._outcome_unknown(carrier, answer)

    async def _accepted(self, carrier: Carrier, submission: Submission) -> None:
        """Write what was bought, or keep what could not be written for the run's last words."""
        record, units = carrier.record, submission.credits_reserved_units
        # Not of a repeat: there the server recognises what this journal has sent.
        replayed = submission.replayed and record.state is State.SUBMITTING
        self._look_at_price(record, units)
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
            await self._desk.record(carrier, Event.ACCEPTED, values, data)
        except TaskTaken as error:
            said = trouble(
                "task_id_repeated", f"the server named a task that cannot be its: {error}"
            )
            await self._desk.record(carrier, Event.OUTCOME_UNKNOWN, said, data)
            reason = f"outcome unknown, a person decides: {error}"
            carrier.trail = changed(carrier.trail, final=reason)
        except TakenOver as error:
            where = self._keep(bought, {**values, "answer": data["answer"]})
            raise TakenOver(f"{error}; {bought} is kept in {where} for the next run") from error
        except JournalError:
            self._keep(bought, {**values, "answer": data["answer"]})
            self.unwritten.append(bought)
            raise

    def _look_at_price(self, record: Record, units: int | None) -> None:
        """Note a price above the expected one, and stop where none can be believed."""
        quality = record.request.quality
        if units in (None, 0, record.expected_units):
            self._doubted_in_row = 0
            return
        expected = credits_text(record.expected_units)
        if is_doubtful(units, quality, {quality: record.expected_units}):
            self._doubted_in_row += 1
            self.dearer[quality] = (
                f"EvoLink says that a {quality} image costs {credits_text(units)} credits, which "
                f"is far from the {expected} that were expected: its charge counts as not known, "
                f"and caps go on to reckon with {expected}, until `krea-dagster accept price "
                f"{quality}`"
            )
            if self._doubted_in_row >= DOUBTED_IN_ROW and self.stopped is None:
                self.stopped = price_doubted(quality, units, self._doubted_in_row)
            return
        self._doubted_in_row = 0
        if units > record.expected_units:
            self.dearer[quality] = (
                f"{quality} costs {credits_text(units)} credits, and {expected} were expected"
            )

    # -- what the answer says of money --------------------------------------------------------

    async def _not_charged(self, carrier: Carrier, error: SubmitError) -> SubmitError | None:
        said = trouble(_code(error), str(error))
        match error:
            case AccountStopped():
                await self._desk.record(carrier, Event.DEFERRED, said)
                await self._account_stopped(error)
                carrier.trail = changed(carrier.trail, final=self.why_kept_back())
            case Refused():
                await self._desk.record(carrier, Event.REFUSED, {**said, "charged_units": 0})
            case TurnedAway():
                await self._desk.record(carrier, Event.TURNED_AWAY, said)
                self._turned_away(error)
            case _:
                await self._desk.record(carrier, Event.TURNED_AWAY, said)
                return error
        return None

    async def _outcome_unknown(self, carrier: Carrier, error: SubmitError) -> SubmitError | None:
        await self._desk.record(carrier, Event.OUTCOME_UNKNOWN, trouble(_code(error), str(error)))
        match error:
            case TurnedAway():
                self._turned_away(error)
            case IdempotencyConflict() | Refused():
                reason = f"outcome unknown, a person decides: {error}"
                carrier.trail = changed(carrier.trail, final=reason)
            case AccountStopped():
                await self._account_stopped(error)
            case _:
                return error
        return None

    async def _failed(self, carrier: Carrier, error: SubmitError) -> float:
        """Wait for the API where it was away; else count the failure, and pause."""
        if error.may_be_away and await self._outages.until_back(Part.API, error):
            return 0.0  # it was not the request that failed
        failures = carrier.trail.submit_failures + 1
        carrier.trail = changed(carrier.trail, submit_failures=failures)
        at_least_s = error.retry_after_s or 0.0
        match error:
            case PurchasePending():
                at_least_s = max(at_least_s, _PENDING_S * self._desk.policy.wait_scale)
            case OutcomeUnknown():
                self._slow_down(error)
        return self._desk.backoff_s(failures, at_least_s=at_least_s)

    def _slow_down(self, error: SubmitError) -> None:
        """Take a server that does not answer for overloaded: each further purchase is at stake.

        Without any answer for as long as the patience lasts, buying stops.
        """
        now_s = self._desk.clock.monotonic()
        self._unanswered += 1
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        over = self._unanswered - self._desk.policy.silence_tries
        if over < 0:
            return
        pause_s = self._desk.backoff_s(over + 1)
        self._at_server.silent(pause_s)
        if now_s - self._silent_since_s > self._desk.policy.patience_s and self.stopped is None:
            self.stopped = TryLater(
                NO_USABLE_ANSWER,
                f"no purchase got a usable answer for {now_s - self._silent_since_s:.0f} s, "
                f"the last: {error}",
            )

    def _turned_away(self, error: TurnedAway) -> None:
        """Take note of a 429: it is no failure of the request, and the pace waits.

        Nothing more is bought where it has lasted for the patience, or is said to last longer.
        """
        now_s = self._desk.clock.monotonic()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        lasts_s = now_s - self._refused_since_s
        if lasts_s + (error.retry_after_s or 0.0) > self._desk.policy.patience_s:
            asks = f", and asks for {error.retry_after_s:g} s more" if error.retry_after_s else ""
            self.stopped = self.stopped or TryLater(
                TURNED_AWAY, f"the server has taken nothing for {lasts_s:.0f} s{asks}: {error}"
            )

    @property
    def turned_away_s(self) -> float:
        """Seconds since which the server has taken nothing more."""
        if self._refused_since_s is None:
            return 0.0
        return self._desk.clock.monotonic() - self._refused_since_s

    async def _account_stopped(self, error: AccountStopped) -> None:
        if self.stopped is None:
            self.stopped = error
            await self._announce_stop(error)

    def why_kept_back(self) -> str:
        """Why nothing more is bought, for the people who read the manifest."""
        by_account = isinstance(self.stopped, AccountStopped)
        why = "the account stopped the run" if by_account else "buying stopped"
        return f"not bought, {why}: {self.stopped}"

    # -- without a POST -----------------------------------------------------------------------

    async def mark_unknown(self, carrier: Carrier, code: str, message: str) -> float:
        """Record that the outcome of a purchase is unknown."""
        kept = {"task_id": carrier.record.task_id} if carrier.record.task_id else None
        await self._desk.record(carrier, Event.OUTCOME_UNKNOWN, trouble(code, message), kept)
        return 0.0

    async def resolve(self, carrier: Carrier, resolution: Resolution) -> float:
        """Follow what a person has decided about an unknown outcome."""
        by = {"resolved_by": "a person", "decision": str(resolution)}
        match resolution:
            case NotBought():
                await self._desk.record(carrier, Event.RELEASED, {"charged_units": 0}, by)
            case Lost():
                said = trouble("resolved_as_lost", "a person decided that it was charged and lost")
                await self._desk.record(carrier, Event.EXPIRED, said, by)
            case HasTask(task_id=task_id):
                try:
                    await self._desk.record(carrier, Event.ACCEPTED, {"task_id": task_id}, by)
                except TaskTaken as error:
                    reason = f"outcome unknown, a person decides: {error}"
                    carrier.trail = changed(carrier.trail, final=reason)
            case SendAgain():
                carrier.trail = changed(carrier.trail, replay_decided=True)
        return 0.0

    async def plan_again(self, carrier: Carrier) -> float:
        """Put a request back whose task failed, cost nothing, and may succeed.

        After the pause that its error code asks for, and only if its task has still failed then.
        """
        record = carrier.record
        code = record.error_code or ""
        pause_s = task_error_wait_s(code, self._desk.fraction(), self._desk.policy)
        if record.state is State.FAILED and not carrier.trail.waited:
            carrier.trail = changed(carrier.trail, waited=True)
            if pause_s > 0:
                return pause_s
        if record.task_id is not None and not await self._confirm(carrier):
            return 0.0
        await self._desk.record(carrier, Event.PLANNED)
        carrier.trail = changed(carrier.trail, asked_again=True, waited=False)
        return 0.0


def _code(error: SubmitError) -> str:
    if error.code:
        return error.code
    if isinstance(error, NotSent):
        return "not_sent"
    return f"http_{error.status}" if error.status is not None else "no_answer"

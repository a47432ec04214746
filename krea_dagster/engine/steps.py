"""One step of one request: do it once, record its event, say how long to wait.

The three worlds of retry meet EvoLink here: buying, asking, fetching. What to do next is the
policy's to say, and when to do it the runner's.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Protocol

import anyio
import anyio.lowlevel

from krea_dagster.engine.asker import Answer, Asker, TaskReader
from krea_dagster.engine.changes import Change
from krea_dagster.engine.clock import Clock
from krea_dagster.engine.frozen import changed
from krea_dagster.engine.images import Downloader, ImageStore
from krea_dagster.engine.latency import Latencies, is_overdue
from krea_dagster.engine.listener import Calls, Listener
from krea_dagster.engine.looking import Awaited, Hint, chances, is_learned
from krea_dagster.engine.pace import InWork, Pace
from krea_dagster.engine.policy import Policy, Trail, backoff_s, task_error_wait_s
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import HasTask, Lost, NotBought, Resolution, SendAgain
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.writer import GroupCommit
from krea_dagster.errors import (
    AccessDenied,
    AccountStopped,
    ApiError,
    BuyingClosed,
    CapReached,
    DownloadError,
    IdempotencyConflict,
    ImageRejected,
    InsufficientCredits,
    JournalError,
    LinkDead,
    NotCharged,
    NotSent,
    OutcomeUnknown,
    PurchasePending,
    Refused,
    RunStopped,
    StorageError,
    SubmitError,
    TakenOver,
    TaskNotFound,
    TurnedAway,
    Unauthorized,
    UnwrittenPurchase,
)
from krea_dagster.models import (
    AccountCredits,
    ImageRequest,
    Submission,
    Task,
    credits_from_units,
    credits_text,
)

#: Seconds that a stop leaves to a POST under way, so that its task id is not lost.
_GRACE_S: Final = 10.0
#: Seconds between repeats of a purchase that the server calls undecided: "wait a minute".
_PENDING_S: Final = 60.0
#: By how much the quickest median seen is raised with every image.
_FORGET: Final = 1.001

#: States whose task has not been seen to end.
_UNSETTLED: Final = frozenset({State.SUBMITTED, State.EXPIRED})


class Client(TaskReader, Downloader, Protocol):
    """What the engine needs of KreaClient."""

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        """POST one request. Raises SubmitError."""

    async def credits(self) -> AccountCredits:
        """Read the account's credits. Raises ApiError."""


@dataclass
class Carrier:
    """A request in the hands of a task.

    ``callback_url`` is where its row wants its end told. ``holds_place``: it counts in the window.
    ``may_submit``: it may send one POST; the pace is kept by giving that out. ``since_s`` is when
    its task was submitted, by the run's clock, and ``not_yet_s`` its age when it had last not
    ended.
    """

    record: Record
    trail: Trail
    partition_key: str
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None
    holds_place: bool = True
    may_submit: bool = False
    since_s: float = 0.0
    not_yet_s: float = 0.0

    @property
    def awaited(self) -> Awaited:
        """Its task, as what is waited for."""
        return Awaited(self.record.request.quality, self.since_s, self.not_yet_s)


class Steps:
    """The steps of one run, and what the run has learned by them.

    Every method takes a carrier, changes its record and trail, and returns the seconds to wait
    before its next step. ``stopped`` is the answer that ended the buying, ``caps_reached`` what
    the caps said, by scope, ``dearer`` the prices above the expected, by quality, ``unwritten``
    what was bought and the journal did not take. ``announce_stop`` tells the launch's other
    shards that the account stopped this one. ``callback_url_of`` gives the address at which a
    request is called back, where there is a receiver, whose ``calls`` are then listened to;
    ``missed_callbacks`` counts the tasks that ended and were not called about. Raises JournalError
    where an event could not be written, and StorageError where an image could not.
    """

    def __init__(
        self,
        client: Client,
        writer: GroupCommit,
        images: ImageStore,
        *,
        run_id: str,
        policy: Policy,
        clock: Clock,
        randomness: random.Random,
        pace: Pace,
        latencies: Latencies,
        announce_stop: Callable[[AccountStopped], Awaitable[None]],
        calls: Calls,
        callback_url_of: Callable[[str], str] | None = None,
    ) -> None:
        self._client = client
        self._writer = writer
        self._images = images
        self._run_id = run_id
        self._policy = policy
        self._clock = clock
        self._random = randomness
        self._posting: set[anyio.CancelScope] = set()
        self._ending = False
        self._refused_since_s: float | None = None
        self._unanswered = 0
        self._silent_since_s: float | None = None
        self.asker = Asker(client, clock.monotonic, latencies)
        self._callback_url_of = callback_url_of
        self.listener = Listener(calls, self.asker, clock) if callback_url_of else None
        self.pace = pace
        self._submitting: set[str] = set()  # requests that were given leave to submit
        self._in_work: dict[str, Carrier] = {}  # requests whose task has not been seen to end
        self._quickest_s: dict[str, float] = {}  # the least that the median was, by quality
        self._announce_stop = announce_stop
        self.stopped: AccountStopped | RunStopped | None = None
        self.caps_reached: dict[str, str] = {}
        self.dearer: dict[str, str] = {}
        self.unwritten: list[UnwrittenPurchase] = []
        self.posts = 0
        self.turned_away = 0
        self.charged_units = 0
        self.missed_callbacks = 0

    def end_submitting(self) -> None:
        """Give the POSTs under way a few seconds, after which their outcome is unknown.

        They are shielded from cancellation until then, because an answer that is not read
        may be an image that was paid for.
        """
        self._ending = True
        for scope in self._posting:
            scope.deadline = anyio.current_time() + _GRACE_S

    # -- buying -------------------------------------------------------------------------------

    async def submit(self, carrier: Carrier, intent: Event) -> float:
        """POST once: the intent is on disk before it leaves, and the answer before anything."""
        values: dict[str, Any] = {}
        if intent is not Event.REPLAYING:
            values = {
                "partition_key": carrier.partition_key,
                "scopes": carrier.scopes,
                "callback_url": carrier.callback_url or self._callback_url(carrier.record),
            }
        await anyio.lowlevel.checkpoint_if_cancelled()  # below, a stop is not heard
        with anyio.CancelScope(shield=True) as scope:
            self._posting.add(scope)
            try:
                await self.record(carrier, intent, values)
                if self._ending:
                    return await self._not_sent_any_more(carrier)
                self.posts += 1
                return await self._post(carrier)
            except BuyingClosed as closed:
                return await self._closed(carrier, closed)
            finally:
                self._posting.discard(scope)
                self.may_no_more_submit(carrier)
        # Only reached where a stop's grace ended before the answer came.
        with anyio.CancelScope(shield=True):
            said = _said("stopped", "the run was stopped before the answer came")
            await self.record(carrier, Event.OUTCOME_UNKNOWN, said)
        return 0.0

    async def _not_sent_any_more(self, carrier: Carrier) -> float:
        """Take an intent back that the run's stop overtook."""
        if carrier.record.state is State.SUBMITTING:
            said = _said("stopped", "the run was stopped before it was sent")
            await self.record(carrier, Event.TURNED_AWAY, said)
        return 0.0

    async def _closed(self, carrier: Carrier, closed: BuyingClosed) -> float:
        """Keep a row back that a cap or the account does not let in; nothing was sent."""
        await self.record(carrier, Event.DEFERRED, _said(closed.code, str(closed)))
        if isinstance(closed, RunStopped):
            self.stopped = self.stopped or closed
        else:
            scope = closed.scope if isinstance(closed, CapReached) else ""
            self.caps_reached.setdefault(scope or closed.code, str(closed))
        carrier.trail = changed(carrier.trail, final=f"not bought: {closed}")
        return 0.0

    def may_submit(self, carrier: Carrier) -> None:
        """Give a carrier leave for one POST, by the pace."""
        carrier.may_submit = True
        self.pace = self.pace.sent(self._clock.monotonic())
        self._submitting.add(carrier.record.request_key)

    def may_no_more_submit(self, carrier: Carrier) -> None:
        """Take the leave back, or note that it was used."""
        carrier.may_submit = False
        self._submitting.discard(carrier.record.request_key)

    @property
    def submitting(self) -> int:
        """Requests that have leave to submit and no answer yet."""
        return len(self._submitting)

    def out_of_work(self, carrier: Carrier) -> None:
        """Note that a request's task has ended, or is not counted on to end any more."""
        self._in_work.pop(carrier.record.request_key, None)

    def _tasks_in_work(self, *, closely: bool) -> InWork:
        """The tasks at the server; ``closely``: with how many of them have probably ended."""
        known = len(self._in_work)
        if not closely or not known:
            return InWork(known, float(known), 0.0)
        awaited = [carrier.awaited for carrier in self._in_work.values()]
        ended = chances(self.asker.latencies, awaited, self._clock.monotonic())
        deviation = float((ended * (1.0 - ended)).sum()) ** 0.5
        return InWork(known, known - float(ended.sum()), deviation)

    async def _post(self, carrier: Carrier) -> float:
        record = carrier.record
        sent_at_s = self._clock.monotonic()
        try:
            submission = await self._client.submit(
                record.request,
                idempotency_key=str(record.idempotency_key),
                callback_url=record.callback_url,
            )
        except NotCharged as error:
            # Of a repeat it is certain, of the first try it is not.
            known = record.state is not State.UNKNOWN
            if isinstance(error, TurnedAway):
                self._pace_turned_away(error, sent_at_s)
            return await (self._not_charged if known else self._outcome_unknown)(carrier, error)
        except OutcomeUnknown as error:
            return await self._outcome_unknown(carrier, error)
        carrier.since_s, carrier.not_yet_s = sent_at_s, 0.0
        self._in_work[record.request_key] = carrier
        in_work = self._tasks_in_work(closely=self.pace.unclear)
        self.pace = self.pace.taken(sent_at_s, in_work, pressed=self.asker.pressed)
        await self._accepted(carrier, submission)
        carrier.trail = changed(carrier.trail, submit_failures=0)
        self._refused_since_s = None
        self._unanswered, self._silent_since_s = 0, None
        return 0.0

    async def _accepted(self, carrier: Carrier, submission: Submission) -> None:
        """Write what was bought, or keep what could not be written for the run's last words."""
        record, units = carrier.record, submission.credits_reserved_units
        if units is not None and units > record.committed_units:
            quality = record.request.quality
            self.dearer[quality] = (
                f"{quality} costs {credits_text(units)} credits, and "
                f"{credits_text(record.committed_units)} were expected"
            )
        values = {
            "task_id": submission.task_id,
            "reserved_units": units,
            "billing_rule": submission.billing_rule,
            "user_group": submission.user_group,
        }
        data = {"answer": dict(submission.answer), "replayed": submission.replayed}
        bought = UnwrittenPurchase(
            record.request_key,
            str(record.idempotency_key),
            submission.task_id,
            None if units is None else credits_from_units(units),
        )
        try:
            # The grace of a stop is for the answer, not for writing it down.
            with anyio.CancelScope(shield=True):
                await self.record(carrier, Event.ACCEPTED, values, data)
        except TakenOver as error:
            raise TakenOver(f"{error}; not written: {bought}") from error
        except JournalError:
            self.unwritten.append(bought)
            raise

    async def _not_charged(self, carrier: Carrier, error: SubmitError) -> float:
        said = _said(_code(error), str(error))
        match error:
            case AccountStopped():
                await self.record(carrier, Event.DEFERRED, said)
                await self._account_stopped(error)
                carrier.trail = changed(carrier.trail, final=self.why_kept_back())
                return 0.0
            case Refused():
                await self.record(carrier, Event.REFUSED, {**said, "charged_units": 0})
                return 0.0
            case TurnedAway():
                await self.record(carrier, Event.TURNED_AWAY, said)
                return self._turned_away(carrier, error)
            case _:
                await self.record(carrier, Event.TURNED_AWAY, said)
                failures = carrier.trail.submit_failures + 1
                carrier.trail = changed(carrier.trail, submit_failures=failures)
                return backoff_s(failures, self._fraction(), self._policy)

    async def _outcome_unknown(self, carrier: Carrier, error: SubmitError) -> float:
        await self.record(carrier, Event.OUTCOME_UNKNOWN, _said(_code(error), str(error)))
        if isinstance(error, TurnedAway):
            return self._turned_away(carrier, error)
        failures = carrier.trail.submit_failures + 1
        carrier.trail = changed(carrier.trail, submit_failures=failures)
        at_least_s = error.retry_after_s or 0.0
        match error:
            case IdempotencyConflict() | Refused():
                reason = f"outcome unknown, a person decides: {error}"
                carrier.trail = changed(carrier.trail, final=reason)
                return 0.0
            case AccountStopped():
                await self._account_stopped(error)
                return 0.0
            case OutcomeUnknown() if not isinstance(error, PurchasePending):
                self._slow_down(error)
            case PurchasePending():
                at_least_s = max(at_least_s, _PENDING_S * self._policy.wait_scale)
        return backoff_s(failures, self._fraction(), self._policy, at_least_s=at_least_s)

    def _slow_down(self, error: SubmitError) -> None:
        """Take a server that does not answer for overloaded: each further purchase is at stake.

        Without any answer for as long as the patience lasts, buying stops.
        """
        now_s = self._clock.monotonic()
        self._unanswered += 1
        if self._silent_since_s is None:
            self._silent_since_s = now_s
        over = self._unanswered - self._policy.silence_tries
        if over < 0:
            return
        pause_s = backoff_s(over + 1, self._fraction(), self._policy)
        self.pace = self.pace.silent(now_s, pause_s)
        if now_s - self._silent_since_s > self._policy.patience_s and self.stopped is None:
            self.stopped = RunStopped(
                "no_usable_answer",
                f"no purchase got a usable answer for {now_s - self._silent_since_s:.0f} s, "
                f"the last: {error}",
            )

    def _pace_turned_away(self, error: TurnedAway, sent_at_s: float) -> None:
        self.turned_away += 1
        now_s = self._clock.monotonic()
        in_work = self._tasks_in_work(closely=True)
        self.pace = self.pace.refused(now_s, sent_at_s, in_work, error.retry_after_s or 0.0)

    def _turned_away(self, carrier: Carrier, error: SubmitError) -> float:
        """A 429 is no failure of the request, so it uses up no try; the pace waits, and not it."""
        now_s = self._clock.monotonic()
        if self._refused_since_s is None:
            self._refused_since_s = now_s
        if now_s - self._refused_since_s > self._policy.patience_s:
            reason = f"turned away for {self._policy.patience_s:g} s: {error}"
            carrier.trail = changed(carrier.trail, final=reason)
        return 0.0

    async def _account_stopped(self, error: AccountStopped) -> None:
        if self.stopped is None:
            self.stopped = error
            await self._announce_stop(error)

    def why_kept_back(self) -> str:
        """Why nothing more is bought, for the people who read the manifest."""
        by_account = isinstance(self.stopped, AccountStopped)
        why = "the account stopped the run" if by_account else "buying stopped"
        return f"not bought, {why}: {self.stopped}"

    async def defer(self, carrier: Carrier) -> float:
        """Record that a request is kept back, because buying has stopped."""
        code = "" if self.stopped is None else self.stopped.code
        await self.record(carrier, Event.DEFERRED, _said(code, self.why_kept_back()))
        carrier.trail = changed(carrier.trail, final=self.why_kept_back())
        return 0.0

    async def found_unanswered(self, carrier: Carrier) -> float:
        """Record that a process died between its intent and the answer."""
        said = _said("no_answer_written", "a run ended between its POST and the answer")
        await self.record(carrier, Event.OUTCOME_UNKNOWN, said)
        return 0.0

    async def resolve(self, carrier: Carrier, resolution: Resolution) -> float:
        """Follow what a person has decided about an unknown outcome."""
        by = {"resolved_by": "a person", "decision": str(resolution)}
        match resolution:
            case NotBought():
                await self.record(carrier, Event.RELEASED, data=by)
            case Lost():
                said = _said("resolved_as_lost", "a person decided that it was charged and lost")
                await self.record(carrier, Event.EXPIRED, said, by)
            case HasTask(task_id=task_id):
                await self.record(carrier, Event.ACCEPTED, {"task_id": task_id}, by)
            case SendAgain():
                carrier.trail = changed(carrier.trail, replay_decided=True)
        return 0.0

    async def plan_again(self, carrier: Carrier) -> float:
        """Put a request back whose task failed, cost nothing, and may succeed."""
        code = carrier.record.error_code or ""
        await self.record(carrier, Event.PLANNED)
        carrier.trail = changed(carrier.trail, asked_again=True)
        return task_error_wait_s(code, self._fraction(), self._policy)

    # -- asking -------------------------------------------------------------------------------

    async def ask(self, carrier: Carrier) -> float:
        """Read the task when it has probably ended, and record what it says."""
        record = carrier.record
        awaited = self._awaited(carrier)
        listens = self.listener is not None and self._is_called(record)
        try:
            answer = await self.asker.ask(
                str(record.task_id), awaited, called_for=record.request_key if listens else None
            )
        except ApiError as error:
            return self._asked_in_vain(carrier, error)
        asks = carrier.trail.asks + 1
        carrier.trail = changed(
            carrier.trail, asks=asks, ask_failures=0, not_found=0, stale_link=False
        )
        task = answer.task
        match task:
            case Task(status="completed", results=(url, *_)):
                self._ended(carrier, answer)
                await self._task_completed(carrier, answer, url)
                return 0.0
            case Task(status="failed" | "cancelled") if _may_have_failed(record):
                self._ended(carrier, answer)
                await self._task_failed(carrier, task)
                return 0.0
        if record.state is State.SUBMITTED:
            carrier.not_yet_s = max(carrier.not_yet_s, answer.asked_at_s - carrier.since_s)
            return 0.0
        # No fresh link: the old one is tried again before the run gives up.
        failures = carrier.trail.fetch_failures + 1
        carrier.trail = changed(carrier.trail, fetch_failures=failures)
        return backoff_s(failures, self._fraction(), self._policy)

    def is_overdue(self, record: Record) -> bool:
        """Whether a task has taken far longer than its kind takes."""
        late = is_overdue(self.asker.latencies, record.request.quality, self._age_s(record))
        return record.state is State.SUBMITTED and late

    def _awaited(self, carrier: Carrier) -> Awaited | None:
        """What to wait for before its task is read; None where it is read at once."""
        record = carrier.record
        if record.state is not State.SUBMITTED:
            return None
        if not carrier.since_s:
            carrier.since_s = self._clock.monotonic() - self._age_s(record)
            unheard = self.listener is None or not self._is_called(record)
            if record.run_id != self._run_id and carrier.trail.asks == 0 and unheard:
                return None  # nobody knows how long it has been finished
        return carrier.awaited

    def _callback_url(self, record: Record) -> str | None:
        """Where a request is called back by the receiver of this journal, if there is one."""
        return self._callback_url_of(record.request_key) if self._callback_url_of else None

    def _is_called(self, record: Record) -> bool:
        """Whether the receiver will be told of its task's end: it was sent with that address."""
        submitted = record.state is State.SUBMITTED and record.callback_url is not None
        return submitted and record.callback_url == self._callback_url(record)

    def _ended(self, carrier: Carrier, answer: Answer) -> None:
        """Note that a task has ended, and whether it should have been called about."""
        self.out_of_work(carrier)
        if self.listener is None or carrier.record.state is not State.SUBMITTED:
            return
        key = carrier.record.request_key
        if answer.hint is Hint.SWEPT and not self.listener.was_called(key):
            self.missed_callbacks += 1
        self.listener.forget(key)

    async def _task_completed(self, carrier: Carrier, answer: Answer, url: str) -> None:
        record, task = carrier.record, answer.task
        if record.state not in _UNSETTLED or record.charged_units is not None:
            await self.record(carrier, Event.COMPLETED, {"result_url": url})
            return
        if record.run_id == self._run_id:
            self._learn(carrier, answer)
        charged = record.reserved_units
        if task.credits_used_units is not None:
            charged = task.credits_used_units
        values = {"result_url": url, "charged_units": charged}
        await self.record(carrier, Event.COMPLETED, values)
        self.charged_units += charged or 0

    def _learn(self, carrier: Carrier, answer: Answer) -> None:
        """Take note of how long an image took, and of a server that has become slow."""
        if answer.hint is Hint.SWEPT:
            return  # it may have ended long ago
        if answer.hint is Hint.CALLED:
            quiet_s = answer.quiet_at_s - carrier.since_s
            carrier.not_yet_s = max(carrier.not_yet_s, quiet_s)
        quality = carrier.record.request.quality
        now_s = self._clock.monotonic()
        asker = self.asker
        asker.latencies = asker.latencies.finished(
            quality, carrier.not_yet_s, now_s - carrier.since_s
        )
        if is_learned(asker.latencies, quality):
            median_s = asker.latencies.of(quality).median_s
            # Forgotten by and by: what was quick once may never be again.
            quickest_s = self._quickest_s.get(quality, median_s) * _FORGET
            self._quickest_s[quality] = quickest_s = min(median_s, quickest_s)
            self.pace = self.pace.slowed(now_s, median_s, quickest_s)

    async def _task_failed(self, carrier: Carrier, task: Task) -> None:
        code = task.failure.code if task.failure else "unknown_error"
        message = task.failure.message if task.failure else "the task failed without saying why"
        # Whether a cancelled task is charged is not documented: then the charge is not known.
        cancelled = task.status == "cancelled"
        if cancelled:
            # Whatever code came with it: one that may be repeated would be bought again.
            said = f": {code}: {message}" if task.failure else ""
            code, message = "request_cancelled", f"the task was cancelled at the server{said}"
        charged = None if cancelled else 0
        await self.record(carrier, Event.FAILED, {**_said(code, message), "charged_units": charged})
        failures = carrier.trail.task_failures + 1
        carrier.trail = changed(carrier.trail, task_failures=failures, asks=0)
        carrier.not_yet_s = 0.0

    def _asked_in_vain(self, carrier: Carrier, error: ApiError) -> float:
        trail = changed(carrier.trail, ask_failures=carrier.trail.ask_failures + 1)
        at_least_s = error.retry_after_s or 0.0
        match error:
            case TaskNotFound():
                # Apart, because what it leads to is an image given up as lost.
                trail = changed(trail, not_found=trail.not_found + 1)
                at_least_s = max(at_least_s, self._policy.gone_pause_s * self._policy.wait_scale)
            case Unauthorized() | AccessDenied() | InsufficientCredits():
                trail = changed(trail, final=f"detached: its task cannot be read: {error}")
        carrier.trail = trail
        return backoff_s(trail.ask_failures, self._fraction(), self._policy, at_least_s=at_least_s)

    # -- fetching -----------------------------------------------------------------------------

    async def fetch(self, carrier: Carrier) -> float:
        """Download, verify and publish the image, and record it."""
        record = carrier.record
        try:
            image = await self._images.fetch(self._client, str(record.result_url), record.request)
        except DownloadError as error:
            await self.record(carrier, Event.NOT_STORED, _said(error.code, str(error)))
            # A rejected image mostly comes again as it is: fewer looks are enough.
            weight = 2 if isinstance(error, ImageRejected) else 1
            carrier.trail = changed(
                carrier.trail,
                fetch_failures=carrier.trail.fetch_failures + weight,
                stale_link=True,
                link_dead=isinstance(error, LinkDead),
            )
            return backoff_s(carrier.trail.fetch_failures, self._fraction(), self._policy)
        except OSError as error:
            raise StorageError(
                f"could not store an image under {self._images.storage.locate('')}: {error}. "
                "Nothing more is bought until this is mended. What was paid for is in the journal, "
                "and the next run fetches it: do not wait longer than its links live, which is 24 "
                "hours."
            ) from error
        await self.record(
            carrier,
            Event.STORED,
            {
                "image_path": image.path,
                "image_sha256": image.sha256,
                "image_bytes": image.bytes,
                "image_format": image.format,
                "width": image.width,
                "height": image.height,
            },
        )
        return 0.0

    async def expire(self, carrier: Carrier, code: str, message: str) -> float:
        """Record that an image is paid and lost."""
        await self.record(carrier, Event.EXPIRED, _said(code, message))
        return 0.0

    async def file_missing(self, carrier: Carrier) -> float:
        """Record that a stored file is not there any more."""
        await self.record(carrier, Event.FILE_MISSING)
        # Counted, because a storage that changes what it is given would be filled for ever.
        failures = carrier.trail.fetch_failures + 1
        carrier.trail = changed(carrier.trail, fetch_failures=failures)
        return 0.0

    # -- the rest -----------------------------------------------------------------------------

    async def record(
        self,
        carrier: Carrier,
        event: Event,
        values: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an event of the carrier's request, durably."""
        carrier.record = await self._writer.append(
            Change(carrier.record.request_key, event, self._clock.now(), values or {}, data),
            known=carrier.record,
        )

    def _age_s(self, record: Record) -> float:
        since = record.submitted_at or self._clock.now()
        return (self._clock.now() - since) / timedelta(seconds=1)

    def _fraction(self) -> float:
        return self._random.random()


def _may_have_failed(record: Record) -> bool:
    return record.state in _UNSETTLED and record.charged_units is None


def _said(code: str, message: str) -> dict[str, Any]:
    return {"error_code": code, "error_message": message}


def _code(error: SubmitError) -> str:
    if error.code:
        return error.code
    if isinstance(error, NotSent):
        return "not_sent"
    return f"http_{error.status}" if error.status is not None else "no_answer"

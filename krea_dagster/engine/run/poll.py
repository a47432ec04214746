"""Asks: reads a task when it has probably ended, or was called about, and writes what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from krea_dagster.engine.budget import is_doubtful
from krea_dagster.engine.frozen import changed
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Claim, why_not_taken
from krea_dagster.engine.run.callback_listener import Calls, Listener
from krea_dagster.engine.run.in_flight import AtServer
from krea_dagster.engine.run.latency import is_overdue
from krea_dagster.engine.run.outages import Outages, Part
from krea_dagster.engine.run.poll_schedule import Awaited, Hint, worth_asking
from krea_dagster.engine.run.poller import Answer, Asker
from krea_dagster.engine.run.work_item import Carrier, Desk, trouble
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.threads import InThread
from krea_dagster.errors import (
    AccessDenied,
    ApiError,
    InputError,
    InsufficientCredits,
    KreaError,
    RunStopped,
    TaskNotFound,
    TaskTaken,
    Unauthorized,
)
from krea_dagster.models import Task

#: States whose task has not been seen to end.
_UNSETTLED: Final = frozenset({State.SUBMITTED, State.EXPIRED, State.FAILED})

#: The code of a task that was cancelled at the server, whatever it said itself.
_CANCELLED: Final = "request_cancelled"

#: So many tasks that are not known, and none that is, mean that the key is another account's.
_ALL_UNKNOWN: Final = 3


class Asking:
    """The questions of one run, and what their answers add up to.

    Every step takes a carrier, changes its record and trail, and returns the seconds to wait before
    its next step. ``callback_url_of`` gives the address at which a request is called back, where
    there is a receiver, whose ``calls`` are then listened to. ``stop`` ends the buying.
    ``charged_units`` is what this run's answers settled; ``missed_callbacks`` counts the tasks that
    ended and were not called about. Raises JournalError where an event could not be written.
    """

    def __init__(
        self,
        asker: Asker,
        desk: Desk,
        at_server: AtServer,
        calls: Calls,
        *,
        in_thread: InThread,
        outages: Outages,
        stop: Callable[[RunStopped], None],
        callback_url_of: Callable[[str], str] | None = None,
    ) -> None:
        self._stop = stop
        self._outages = outages
        self._unknown_tasks: set[str] = set()
        self._found_one = False
        self._asker = asker
        self._desk = desk
        self._at_server = at_server
        self._callback_url_of = callback_url_of
        self.listener = Listener(calls, asker, desk.clock, in_thread) if callback_url_of else None
        self.charged_units = 0
        self.missed_callbacks = 0

    async def ask(self, carrier: Carrier) -> float:
        """Read the task when it has probably ended, and record what it says."""
        record = carrier.record
        awaited = self._awaited(carrier)
        listens = self.is_called(record)
        lost = record.state is State.EXPIRED
        try:
            answer = await self._asker.ask(
                str(record.task_id),
                awaited,
                within_s=max(0.0, self._desk.policy.patience_s - self._desk.age_s(record)),
                called_for=record.request_key if listens and awaited else None,
            )
        except KreaError as error:
            if _may_be_away(error) and await self._outages.until_back(Part.API, error):
                return 0.0  # it was not the question that failed
            return self._asked_in_vain(carrier, error)
        self._found_one = True
        asks = carrier.trail.asks + 1
        carrier.trail = changed(
            carrier.trail,
            asks=asks,
            ask_failures=0,
            not_found=0,
            stale_link=False,
            revived=carrier.trail.revived or lost,
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
        if record.state is not State.COMPLETED:
            carrier.not_yet_s = max(carrier.not_yet_s, answer.asked_at_s - carrier.since_s)
            return 0.0
        # No fresh link: the old one is tried again before the run gives up.
        failures = carrier.trail.fetch_failures + 1
        carrier.trail = changed(carrier.trail, fetch_failures=failures)
        return self._desk.backoff_s(failures)

    def worth_asking(self, record: Record, calls: Mapping[str, ReceivedCallback]) -> bool:
        """Whether the task of an earlier run has probably ended."""
        if record.state is not State.SUBMITTED:
            return False
        called = record.request_key in calls if self.is_called(record) else None
        quality = record.request.quality
        return worth_asking(self._asker.latencies, quality, self._desk.age_s(record), called=called)

    def is_overdue(self, record: Record) -> bool:
        """Whether a task has taken far longer than its kind takes."""
        late = is_overdue(self._asker.latencies, record.request.quality, self._desk.age_s(record))
        return record.state is State.SUBMITTED and late

    async def take_claim(self, carrier: Carrier, claim: Claim) -> float:
        """Take up the task that a callback claims, where EvoLink says that it may be the one."""
        said = f"outcome unknown, a person decides: a callback claims task {claim.task_id}"
        try:
            answer = await self._claimed(claim.task_id, carrier.record)
        except KreaError as error:
            carrier.trail = changed(carrier.trail, final=f"{said}, which cannot be read: {error}")
            return 0.0
        if why := why_not_taken(claim, carrier.record, answer.task):
            carrier.trail = changed(carrier.trail, final=f"{said}, but {why}")
            return 0.0
        by = {"resolved_by": "a callback, confirmed by EvoLink", "called_at": str(claim.first_at)}
        try:
            await self._desk.record(carrier, Event.ACCEPTED, {"task_id": claim.task_id}, by)
        except TaskTaken as error:
            carrier.trail = changed(carrier.trail, final=f"{said}, but {error}")
        return 0.0

    async def _claimed(self, task_id: str, record: Record) -> Answer:
        """Read a claimed task once it has ended, or the patience is over."""
        since_s, patience_s = self._desk.clock.monotonic(), self._desk.policy.patience_s
        answer = await self._asker.ask(task_id)
        while answer.task.status in ("pending", "processing"):
            waited_s = answer.asked_at_s - since_s
            if waited_s >= patience_s:
                break
            awaited = Awaited(record.request.quality, since_s, max(0.0, waited_s))
            answer = await self._asker.ask(task_id, awaited, within_s=patience_s - waited_s)
        return answer

    async def may_be_bought_again(self, carrier: Carrier) -> bool:
        """Read a failed task once more before its request is bought again.

        Where it is completed after all, that is recorded. What cannot be read is left alone.
        """
        record = carrier.record
        try:
            answer = await self._asker.ask(str(record.task_id))
        except TaskNotFound:
            return True  # it has failed, and is forgotten by now
        except KreaError as error:
            reason = f"not bought again: its failed task cannot be read: {error}"
            carrier.trail = changed(carrier.trail, final=reason)
            return False
        match answer.task:
            case Task(status="completed", results=(url, *_)):
                await self._task_completed(carrier, answer, url)
                return False
            case Task(status="failed"):
                return True
            case Task(status="cancelled") if record.error_code == _CANCELLED:
                return True  # only a person asks again for what may have been charged
        reason = f"not bought again: its task failed, and is {answer.task.status} now"
        carrier.trail = changed(carrier.trail, final=reason)
        return False

    def is_called(self, record: Record) -> bool:
        """Whether the receiver will be told of its task's end: it was sent with that address."""
        if record.state is not State.SUBMITTED or self._callback_url_of is None:
            return False
        return record.callback_url == self._callback_url_of(record.request_key)

    def _awaited(self, carrier: Carrier) -> Awaited | None:
        """What to wait for before its task is read; None where it is read at once."""
        record = carrier.record
        if record.state is not State.SUBMITTED:
            return None
        if not carrier.since_s:
            carrier.since_s = self._desk.clock.monotonic() - self._desk.age_s(record)
            unheard = not self.is_called(record)
            if record.run_id != self._desk.run_id and carrier.trail.asks == 0 and unheard:
                return None  # nobody knows how long it has been finished
        return carrier.awaited

    def _ended(self, carrier: Carrier, answer: Answer) -> None:
        """Note that a task has ended, and whether it should have been called about."""
        self._at_server.ended(carrier)
        if self.listener is None or carrier.record.state is not State.SUBMITTED:
            return
        key = carrier.record.request_key
        if answer.hint is Hint.SWEPT and not self.listener.was_called(key):
            self.missed_callbacks += 1
        self.listener.forget(key)

    async def _task_completed(self, carrier: Carrier, answer: Answer, url: str) -> None:
        record, task = carrier.record, answer.task
        settled = record.charged_units is not None and record.state is not State.FAILED
        if record.state not in _UNSETTLED or settled:
            await self._desk.record(carrier, Event.COMPLETED, {"result_url": url})
            return
        if record.run_id == self._desk.run_id:
            self._at_server.learn(carrier, answer)
        charged = _charge(record, task)
        values = {"result_url": url, "charged_units": charged}
        await self._desk.record(carrier, Event.COMPLETED, values)
        self.charged_units += charged or 0

    async def _task_failed(self, carrier: Carrier, task: Task) -> None:
        code = task.failure.code if task.failure else "unknown_error"
        message = task.failure.message if task.failure else "the task failed without saying why"
        # Whether a cancelled task is charged is not documented: then the charge is not known.
        cancelled = task.status == "cancelled"
        if cancelled:
            # Whatever code came with it: one that may be repeated would be bought again.
            said = f": {code}: {message}" if task.failure else ""
            code, message = _CANCELLED, f"the task was cancelled at the server{said}"
        charged = None if cancelled else 0
        await self._desk.record(
            carrier, Event.FAILED, {**trouble(code, message), "charged_units": charged}
        )
        failures = carrier.trail.task_failures + 1
        carrier.trail = changed(carrier.trail, task_failures=failures, asks=0)
        carrier.not_yet_s = 0.0

    def _not_found(self, record: Record) -> None:
        """Note a task that is not known and should be: several, and no other, mean a wrong key."""
        if record.api_key is not None and record.api_key in self._desk.policy.account_keys:
            return  # bought with this account's key: what the server forgot says nothing of the key
        age_s = self._desk.age_s(record)
        if record.state is State.SUBMITTED and age_s < self._desk.policy.gone_after_s:
            self._unknown_tasks.add(str(record.task_id))
        if len(self._unknown_tasks) >= _ALL_UNKNOWN and not self._found_one:
            self._stop(
                RunStopped(
                    "tasks_not_found",
                    f"none of {len(self._unknown_tasks)} tasks that were asked about is known to "
                    "the server with this API key: is it a key of another account? Nothing more "
                    "is bought, and nothing is given up",
                )
            )

    def _asked_in_vain(self, carrier: Carrier, error: KreaError) -> float:
        trail = changed(carrier.trail, ask_failures=carrier.trail.ask_failures + 1)
        at_least_s = getattr(error, "retry_after_s", None) or 0.0
        match error:
            case TaskNotFound():
                self._not_found(carrier.record)
                # Apart, because what it leads to is an image given up as lost.
                trail = changed(trail, not_found=trail.not_found + 1)
                at_least_s = max(
                    at_least_s, self._desk.policy.gone_pause_s * self._desk.policy.wait_scale
                )
            case Unauthorized() | AccessDenied() | InsufficientCredits():
                trail = changed(trail, final=f"detached: its task cannot be read: {error}")
            case InputError():
                trail = changed(trail, final=f"its task cannot be read: {error}")
        carrier.trail = trail
        if carrier.record.state is State.EXPIRED:
            return 0.0  # asked about once in a run
        return self._desk.backoff_s(trail.ask_failures, at_least_s=at_least_s)


def _may_be_away(error: KreaError) -> bool:
    return isinstance(error, ApiError) and error.may_be_away


def _charge(record: Record, task: Task) -> int | None:
    """What a completed task was charged, in units; None where that cannot be believed or told."""
    if record.replayed:
        return 0  # another journal has bought it
    charged = record.reserved_units
    if task.credits_used_units is not None:
        charged = task.credits_used_units
    known = {record.request.quality: record.expected_units}
    if charged and is_doubtful(charged, record.request.quality, known):
        return None
    return charged


def _may_have_failed(record: Record) -> bool:
    return record.state in (State.SUBMITTED, State.EXPIRED) and record.charged_units is None

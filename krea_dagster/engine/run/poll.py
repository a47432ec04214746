"""The poll step: reads a task when it has probably ended, and records its state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from krea_dagster.engine.budget import is_doubtful
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.policy import TASKS_NOT_FOUND
from krea_dagster.engine.record import Record
from krea_dagster.engine.resolution import Claim, why_not_taken
from krea_dagster.engine.run.callback_listener import CallbackListener
from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.latency import is_overdue
from krea_dagster.engine.run.poll_schedule import PendingTask, PollReason, worth_polling
from krea_dagster.engine.run.poller import TaskRead
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import (
    AccessDenied,
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

#: The code of a task that was cancelled at the server, in place of the server's own.
_CANCELLED: Final = "request_cancelled"

#: If this many tasks are not known, and none is, the key is another account's.
_ALL_UNKNOWN: Final = 3


class PollStep:
    """The reads of one run, and what their results add up to.

    Each step takes an item, changes its record and retry state, and returns the seconds to wait
    before its next step. ``charged_units`` is what this run's reads settled; ``missed_callbacks``
    counts the tasks that ended without a callback. Raises JournalError if an event cannot be
    written.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._options, self._policy = context.options, context.policy
        self._clock, self._record = context.clock, context.record
        self._poller = context.poller
        self._unknown_tasks: set[str] = set()
        self._found_one = False
        self._callback_url_of = context.options.callback_url_of
        self.listener = CallbackListener(context) if self._callback_url_of else None
        self.charged_units = 0
        self.missed_callbacks = 0

    async def poll(self, item: WorkItem) -> float:
        """Read the task when it has probably ended, and record its state."""
        record, retry = item.record, item.retry
        pending = self._pending(item)
        expects_callback = self.expects_callback(record)
        lost = record.state is State.EXPIRED
        try:
            read = await self._poller.read(
                str(record.task_id),
                pending,
                within_s=max(0.0, self._policy.patience_s - self._context.age_s(record)),
                callback_key=record.request_key if expects_callback and pending else None,
            )
        except KreaError as error:
            if await self._context.api_was_away(error):
                return 0.0  # it was not the read that failed
            return self._failed(item, error)
        self._found_one = True
        retry.polls += 1
        retry.poll_failures = retry.not_found = 0
        retry.stale_link = False
        retry.revived = retry.revived or lost
        match read.task:
            case Task(status="completed", results=(url, *_)):
                self._ended(item, read)
                await self._task_completed(item, read, url)
                return 0.0
            case Task(status="failed" | "cancelled") if _may_have_failed(record):
                self._ended(item, read)
                await self._task_failed(item, read.task)
                return 0.0
        if record.state is not State.COMPLETED:
            item.not_yet_s = max(item.not_yet_s, read.read_at_s - item.since_s)
            return 0.0
        # No fresh link: the old one is tried again before the run gives up.
        retry.fetch_failures += 1
        return self._context.backoff_s(retry.fetch_failures)

    def worth_polling(self, record: Record, calls: Mapping[str, ReceivedCallback]) -> bool:
        """Whether the task of an earlier run has probably ended."""
        if record.state is not State.SUBMITTED:
            return False
        called = record.request_key in calls if self.expects_callback(record) else None
        latencies, quality = self._poller.latencies, record.request.quality
        return worth_polling(latencies, quality, self._context.age_s(record), called=called)

    def is_overdue(self, record: Record) -> bool:
        """Whether a task has taken far longer than its kind takes."""
        latencies, quality = self._poller.latencies, record.request.quality
        late = is_overdue(latencies, quality, self._context.age_s(record))
        return record.state is State.SUBMITTED and late

    async def take_claim(self, item: WorkItem, claim: Claim) -> float:
        """Record the task that a callback claims, if EvoLink confirms that it may be the one."""
        reason = f"outcome unknown, a person decides: a callback claims task {claim.task_id}"
        try:
            read = await self._claimed(claim.task_id, item.record)
        except KreaError as error:
            item.retry.leave_reason = f"{reason}, which cannot be read: {error}"
            return 0.0
        if why := why_not_taken(claim, item.record, read.task):
            item.retry.leave_reason = f"{reason}, but {why}"
            return 0.0
        by = {"resolved_by": "a callback, confirmed by EvoLink", "called_at": str(claim.first_at)}
        try:
            await self._record(item, Event.ACCEPTED, {"task_id": claim.task_id}, by)
        except TaskTaken as error:
            item.retry.leave_reason = f"{reason}, but {error}"
        return 0.0

    async def _claimed(self, task_id: str, record: Record) -> TaskRead:
        """Read a claimed task once it has ended, or the patience is over."""
        since_s, patience_s = self._clock.monotonic(), self._policy.patience_s
        read = await self._poller.read(task_id)
        while read.task.status in ("pending", "processing"):
            waited_s = read.read_at_s - since_s
            if waited_s >= patience_s:
                break
            pending = PendingTask(record.request.quality, since_s, max(0.0, waited_s))
            read = await self._poller.read(task_id, pending, within_s=patience_s - waited_s)
        return read

    async def may_be_bought_again(self, item: WorkItem) -> bool:
        """Read a failed task once more before its request is bought again.

        If it is completed after all, that is recorded. If it cannot be read, it is left.
        """
        record = item.record
        try:
            read = await self._poller.read(str(record.task_id))
        except TaskNotFound:
            return True  # it has failed, and is forgotten by now
        except KreaError as error:
            reason = f"not bought again: its failed task cannot be read: {error}"
            item.retry.leave_reason = reason
            return False
        match read.task:
            case Task(status="completed", results=(url, *_)):
                await self._task_completed(item, read, url)
                return False
            case Task(status="failed"):
                return True
            case Task(status="cancelled") if record.error_code == _CANCELLED:
                return True  # only a person requests again what may have been charged
        reason = f"not bought again: its task failed, and is {read.task.status} now"
        item.retry.leave_reason = reason
        return False

    def expects_callback(self, record: Record) -> bool:
        """Whether the receiver will be called when the task ends: it was sent with its address."""
        if record.state is not State.SUBMITTED or self._callback_url_of is None:
            return False
        return record.callback_url == self._callback_url_of(record.request_key)

    def _pending(self, item: WorkItem) -> PendingTask | None:
        """Return the task to wait for, None if it is read at once."""
        record = item.record
        if record.state is not State.SUBMITTED:
            return None
        if not item.since_s:
            item.since_s = self._clock.monotonic() - self._context.age_s(record)
            earlier = record.run_id != self._options.run_id
            if earlier and item.retry.polls == 0 and not self.expects_callback(record):
                return None  # it may have ended long ago
        return item.pending

    def _ended(self, item: WorkItem, read: TaskRead) -> None:
        """Note that a task has ended, and whether its callback is missing."""
        self._context.in_flight.ended(item)
        if self.listener is None or item.record.state is not State.SUBMITTED:
            return
        key = item.record.request_key
        if read.reason is PollReason.TIMEOUT and not self.listener.was_called(key):
            self.missed_callbacks += 1
        self.listener.forget(key)

    async def _task_completed(self, item: WorkItem, read: TaskRead, url: str) -> None:
        record = item.record
        settled = record.charged_units is not None and record.state is not State.FAILED
        if record.state not in _UNSETTLED or settled:
            await self._record(item, Event.COMPLETED, {"result_url": url})
            return
        if record.run_id == self._options.run_id:
            self._context.in_flight.learn(item, read)
        charged = _charge(record, read.task)
        values = {"result_url": url, "charged_units": charged}
        if record.state is State.SUBMITTED:
            # The image is fetched at once. Until it is there, a read of the task tells the same.
            self._context.record_with_next(item, Event.COMPLETED, values)
        else:
            await self._record(item, Event.COMPLETED, values)
        self.charged_units += charged or 0

    async def _task_failed(self, item: WorkItem, task: Task) -> None:
        code = task.failure.code if task.failure else "unknown_error"
        message = task.failure.message if task.failure else "the task failed without saying why"
        charged: int | None = 0
        if task.status == "cancelled":
            # Not documented: whether a cancelled task is charged. And its own code may be one that
            # is bought again.
            charged = None
            own = f": {code}: {message}" if task.failure else ""
            code, message = _CANCELLED, f"the task was cancelled at the server{own}"
        await self._record(item, Event.FAILED, {"charged_units": charged}, error=(code, message))
        item.retry.task_failures += 1
        item.retry.polls = 0
        item.not_yet_s = 0.0

    def _failed(self, item: WorkItem, error: KreaError) -> float:
        """Count a read that failed, and pause."""
        retry, policy = item.retry, self._policy
        retry.poll_failures += 1
        at_least_s = getattr(error, "retry_after_s", None) or 0.0
        match error:
            case TaskNotFound():
                self._not_found(item.record)
                # Counted apart, because it leads to an image given up as lost.
                retry.not_found += 1
                at_least_s = max(at_least_s, policy.gone_pause_s * policy.wait_scale)
            case Unauthorized() | AccessDenied() | InsufficientCredits():
                retry.leave_reason = f"detached: its task cannot be read: {error}"
            case InputError():
                retry.leave_reason = f"its task cannot be read: {error}"
        if item.record.state is State.EXPIRED:
            return 0.0  # read once in a run
        return self._context.backoff_s(retry.poll_failures, at_least_s=at_least_s)

    def _not_found(self, record: Record) -> None:
        """Note a task that should be known: if several are not, and none is, the key is wrong."""
        if record.api_key is not None and record.api_key in self._policy.account_keys:
            return  # bought with this account's key: a forgotten task does not make the key wrong
        age_s = self._context.age_s(record)
        if record.state is State.SUBMITTED and age_s < self._policy.gone_after_s:
            self._unknown_tasks.add(str(record.task_id))
        if len(self._unknown_tasks) >= _ALL_UNKNOWN and not self._found_one:
            self._context.stop_buying(
                RunStopped(
                    TASKS_NOT_FOUND,
                    f"none of {len(self._unknown_tasks)} tasks is known to the server with this "
                    "API key: is it a key of another account? Nothing more is bought, and no task "
                    "is given up",
                )
            )


def _charge(record: Record, task: Task) -> int | None:
    """Return what a completed task was charged, in units; None if implausible or not known."""
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

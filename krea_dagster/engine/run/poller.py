"""Reads tasks when it is worth it, many in one call if the server can.

A read is in one place, ``TaskPoller._reads``, from the call of ``read`` until its return. There it
waits for its time, waits for its callback (``callback_key``), or is under way (``under_way``). One
loop looks at all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import anyio
import anyio.abc

from krea_dagster.engine.clock import wait_for_event
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.poll_schedule import (
    BATCH,
    PendingTask,
    PollReason,
    chances,
    is_learned,
    pause_s,
    scout_due_s,
    select_reads,
)
from krea_dagster.errors import KreaError, NoUsableAnswer
from krea_dagster.models import Task

#: Calls under way at once.
_MAX_CALLS: Final = 12
#: Tasks in the first batch read, which shows whether the server has it. If not, tasks are read one
#: by one.
_TRIAL: Final = 2
#: Seconds that a read may take beyond the time at which it is due. A client ends its calls long
#: before.
_READ_TIMEOUT_S: Final = 600.0


class TaskReader(Protocol):
    """The part of KreaClient that reads tasks."""

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server has the batch read now; None until it was tried."""

    async def task(self, task_id: str) -> Task:
        """Read one task."""

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Read many tasks; those that the server left out are missing."""


class TaskRead(NamedTuple):
    """A task as it was read, and when the call was made, in the clock's seconds.

    If its callback was expected, ``reason`` is why it was read, and ``quiet_at_s`` when no callback
    had come yet.
    """

    task: Task
    read_at_s: float
    reason: PollReason | None = None
    quiet_at_s: float = 0.0


@dataclass(eq=False)
class PendingRead:
    """A read that is waited for, at the latest until ``due_s``.

    ``callback_key`` is the key of the request whose callback is waited for.
    """

    task_id: str
    pending: PendingTask | None
    result: asyncio.Future[TaskRead]
    due_s: float
    callback_key: str | None = None
    under_way: bool = False
    reason: PollReason | None = None
    quiet_at_s: float = 0.0

    def succeed(self, task: Task, read_at_s: float) -> None:
        """Return the task to the caller, unless it has left."""
        if not self.result.done():
            self.result.set_result(TaskRead(task, read_at_s, self.reason, self.quiet_at_s))

    def fail(self, error: Exception) -> None:
        """Raise the error in the caller, unless it has left."""
        if not self.result.done():
            self.result.set_exception(error)


class TaskPoller:
    """Reads tasks for callers that wait for one each.

    ``monotonic`` is the clock, in seconds. ``latencies`` tells when a task has probably ended, and
    learns from what is read. ``run`` must be under way for anything to be read.
    """

    def __init__(
        self, client: TaskReader, monotonic: Callable[[], float], latencies: Latencies
    ) -> None:
        self._client = client
        self._monotonic = monotonic
        self.latencies = latencies
        #: Whether places in the window are wanted, so that early reads are worth it.
        self.pressed = False
        # In the order in which they came. Two may be of one task.
        self._reads: dict[PendingRead, None] = {}
        self._arrived = asyncio.Event()
        self._slots = asyncio.Semaphore(_MAX_CALLS)
        self._trying = False
        self._pausing = False
        #: Tasks read so far, and the calls that it took.
        self.tasks_read = 0
        self.calls = 0

    async def read(
        self,
        task_id: str,
        pending: PendingTask | None = None,
        *,
        within_s: float = 0.0,
        callback_key: str | None = None,
    ) -> TaskRead:
        """Return the task once it has probably ended, or at once without ``pending``.

        ``within_s`` is when it is read at the latest. With ``callback_key``, a callback for that
        request is expected, and the task is read when ``wake`` says so. Raises ApiError, also if no
        call comes to an end.
        """
        result: asyncio.Future[TaskRead] = asyncio.get_running_loop().create_future()
        read = PendingRead(task_id, pending, result, self._monotonic() + within_s, callback_key)
        error = NoUsableAnswer(f"no read of task {task_id} has come to an end")
        timer = result.get_loop().call_later(within_s + _READ_TIMEOUT_S, read.fail, error)
        self._reads[read] = None
        if pending is None or not self._pausing:
            self._arrived.set()
        try:
            return await result
        finally:
            timer.cancel()
            del self._reads[read]

    def awaiting_callback(self) -> Mapping[str, PendingRead]:
        """Return the reads that wait for a callback, by the keys of their requests."""
        return {one.callback_key: one for one in self._reads if one.callback_key is not None}

    def wake(self, read: PendingRead, reason: PollReason, quiet_at_s: float) -> None:
        """Make a read now that waits for a callback."""
        read.callback_key, read.pending = None, None
        read.reason, read.quiet_at_s = reason, quiet_at_s
        self._arrived.set()

    def fail_all(self, error: KreaError) -> None:
        """Raise an error in all callers: nothing is read any more."""
        for read in self._reads:
            read.fail(error)

    async def run(self) -> None:
        """Read what is worth it, until cancelled."""
        async with anyio.create_task_group() as calls:
            while True:
                self._arrived.clear()
                wait_s = self._start_calls(calls)
                # What comes during the pause has rarely ended, and does not wake the loop.
                self._pausing = wait_s is not None
                await wait_for_event(self._arrived, wait_s)

    # -- what to read -------------------------------------------------------------------------

    def _start_calls(self, calls: anyio.abc.TaskGroup) -> float | None:
        """Start what is due; returns the seconds until more may be, None for never."""
        if self._trying:
            return None
        now_s = self._monotonic()
        waiting = [one for one in self._reads if not one.under_way]
        chosen = self._due(waiting, now_s)
        batch = self._client.batch_supported is not False and len(chosen) > 1
        if batch:
            self._trying = self._client.batch_supported is None
            chosen = chosen[: _TRIAL if self._trying else BATCH]
            calls.start_soon(self._read_batch, chosen, calls)
        for one in chosen:
            self.tasks_read += 1
            one.under_way = True
            if not batch:
                calls.start_soon(self._read_one, one)
        left = [one for one in waiting if not one.under_way]
        timed = [one.pending for one in left if one.pending and one.callback_key is None]
        waits_s = [max(0.0, one.due_s - now_s) for one in left]
        if timed:
            waits_s.append(pause_s(self.latencies, timed, now_s))
        return min(waits_s, default=None)

    def _due(self, waiting: Sequence[PendingRead], now_s: float) -> list[PendingRead]:
        """Return the reads to make now: first what is due in any case, then what has ended."""
        urgent: list[PendingRead] = []
        others: list[tuple[PendingRead, PendingTask]] = []
        scouted: set[str] = set()
        for one in waiting:
            task = one.pending
            if task is None or now_s >= one.due_s:
                urgent.append(one)
            elif one.callback_key is not None:
                continue
            elif not is_learned(self.latencies, task.quality) and task.quality not in scouted:
                # The oldest of a kind shows how long its kind takes.
                scouted.add(task.quality)
                if scout_due_s(task) <= now_s:
                    urgent.append(one)
            else:
                others.append((one, task))
        likely = chances(self.latencies, [task for _, task in others], now_s)
        batch = self._client.batch_supported is not False
        ended = select_reads(likely, pressed=self.pressed, batch=batch)
        return urgent + [others[at][0] for at in ended]

    # -- calls --------------------------------------------------------------------------------

    async def _read_batch(self, reads: Sequence[PendingRead], calls: anyio.abc.TaskGroup) -> None:
        try:
            async with self._slots:
                self.calls += 1
                read_at_s = self._monotonic()
                found = await self._client.tasks([one.task_id for one in reads])
        except KreaError as error:
            for one in reads:
                one.fail(error)
            return
        finally:
            self._trying = False
            self._arrived.set()
        for one in reads:
            task = found.get(one.task_id)
            if task is None or _needs_single_read(task):
                calls.start_soon(self._read_one, one)
            else:
                one.succeed(task, read_at_s)

    async def _read_one(self, read: PendingRead) -> None:
        try:
            async with self._slots:
                self.calls += 1
                read_at_s = self._monotonic()
                read.succeed(await self._client.task(read.task_id), read_at_s)
        except KreaError as error:
            read.fail(error)


def _needs_single_read(task: Task) -> bool:
    """Whether only the documented read of one task is trusted: no link, or a failure.

    After a failure the image may be bought again.
    """
    return task.status in ("failed", "cancelled") or (
        task.status == "completed" and not task.results
    )

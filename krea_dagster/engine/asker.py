"""Reads tasks when it is worth it, many in one call where the server can."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Final, NamedTuple, Protocol

import anyio
import anyio.abc

from krea_dagster.engine.alarm import wait
from krea_dagster.engine.latency import Latencies
from krea_dagster.engine.looking import (
    BATCH,
    Awaited,
    Hint,
    chances,
    due_s,
    is_learned,
    pause_s,
    scout_due_s,
    together,
)
from krea_dagster.errors import KreaError
from krea_dagster.models import Task

#: Reads under way at once.
_READS: Final = 12
#: Tasks in the first batch read, which shows whether the server has it: where it does not, they
#: are read one by one.
_TRIAL: Final = 2
#: A task that fell due and is less likely to have ended than was thought waits at least so long.
_LATER_S: Final = 0.01


class TaskReader(Protocol):
    """The part of KreaClient that is needed here."""

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server has the batch read; None until it was tried."""

    async def task(self, task_id: str) -> Task:
        """Read one task."""

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Read many; those that the server left out are missing."""


class Answer(NamedTuple):
    """What a read said of a task, and when it was asked, in the clock's seconds.

    Where its callback was waited for, ``hint`` is why it was asked, and ``quiet_at_s`` when nobody
    had called yet.
    """

    task: Task
    asked_at_s: float
    hint: Hint | None = None
    quiet_at_s: float = 0.0


@dataclass(eq=False)
class _Waiting:
    task_id: str
    awaited: Awaited | None
    answer: asyncio.Future[Answer]
    scout: bool = False
    taken: bool = False
    hint: Hint | None = None
    quiet_at_s: float = 0.0


class Asker:
    """Answers ``ask`` with one task, whichever read brought it.

    ``monotonic`` is the clock, in seconds. ``latencies`` says when a task has probably ended,
    and learns from it. ``run`` must be under way in a task group for anything to be answered.
    """

    def __init__(
        self, client: TaskReader, monotonic: Callable[[], float], latencies: Latencies
    ) -> None:
        self._client = client
        self._monotonic = monotonic
        self.latencies = latencies
        self._pressed = False
        # All that is waited for, in the order in which it came. Two may wait for one task.
        self._waiting: dict[_Waiting, None] = {}
        self._listening: dict[str, _Waiting] = {}  # by request key
        # When each falls due by itself, where places in the window are wanted and where not.
        self._due: dict[bool, list[tuple[float, int, _Waiting]]] = {False: [], True: []}
        self._scouts: set[str] = set()
        self._order = count()
        self._arrived = asyncio.Event()
        self._reads = asyncio.Semaphore(_READS)
        self._trying = False
        self._pausing = False
        #: Tasks read so far, and the calls that it took.
        self.asked = 0
        self.calls = 0

    @property
    def pressed(self) -> bool:
        """Whether places in the window are wanted, so that it is worth asking early."""
        return self._pressed

    @pressed.setter
    def pressed(self, pressed: bool) -> None:
        if pressed != self._pressed:
            self._pressed = pressed
            self._arrived.set()

    async def ask(
        self, task_id: str, awaited: Awaited | None = None, *, called_for: str | None = None
    ) -> Answer:
        """Return the task once it has probably ended, or at once without ``awaited``.

        ``called_for`` is the key of a request that will be called about: then the task is asked
        about when ``wake`` says so. Raises ApiError.
        """
        waiting = _Waiting(task_id, awaited, asyncio.get_running_loop().create_future())
        if called_for is not None and awaited is not None:
            self._listening[called_for] = waiting
            try:
                return await waiting.answer
            finally:
                if self._listening.get(called_for) is waiting:
                    del self._listening[called_for]
        self._put(waiting)
        return await waiting.answer

    @property
    def listening(self) -> dict[str, Awaited]:
        """The tasks whose callbacks are waited for, by request key."""
        return {key: one.awaited for key, one in self._listening.items() if one.awaited}

    def wake(self, request_key: str, hint: Hint, quiet_at_s: float) -> None:
        """Have a task asked about whose callback was waited for; nothing where nobody waits."""
        waiting = self._listening.pop(request_key, None)
        if waiting is not None:
            waiting.awaited, waiting.hint, waiting.quiet_at_s = None, hint, quiet_at_s
            self._put(waiting)

    def _put(self, waiting: _Waiting) -> None:
        """Put a task among those that are asked about by themselves."""
        awaited = waiting.awaited
        self._waiting[waiting] = None
        if awaited is not None:
            quality = awaited.quality
            if quality not in self._scouts and not is_learned(self.latencies, quality):
                self._scouts.add(quality)
                waiting.scout = True
        first = sum(self._push(waiting, pressed) for pressed in self._due) > 0
        # In a batch, what has just come has hardly ended, so it does not wake the loop.
        if first or awaited is None or not self._pausing:
            self._arrived.set()

    async def run(self) -> None:
        """Read what is worth it, for ever."""
        async with anyio.create_task_group() as reads:
            while True:
                self._arrived.clear()
                wait_s = self._start_reads(reads)
                await wait(self._arrived, wait_s)

    # -- what to read -------------------------------------------------------------------------

    def _start_reads(self, reads: anyio.abc.TaskGroup) -> float | None:
        """Start what is due; returns the seconds until something may be, None for never."""
        now_s = self._monotonic()
        self._pausing = False
        if self._client.batch_supported is False:
            for waiting in self._take_due(now_s):
                self._begin([waiting])
                reads.start_soon(self._read_one, waiting)
            due = self._due[self._pressed]
            return max(0.0, due[0][0] - now_s) if due else None
        if self._trying:
            return None
        batch = self._take_together(now_s)
        if batch:
            self._begin(batch)
            if len(batch) == 1:
                reads.start_soon(self._read_one, batch[0])
            else:
                reads.start_soon(self._read_together, batch)
        if not self._waiting:
            return None
        self._pausing = True
        waited_for = [w.awaited for w in self._waiting]
        return pause_s(self.latencies, {task.quality for task in waited_for if task})

    def _take_together(self, now_s: float) -> list[_Waiting]:
        """The tasks of the next batch read: what is due at once, and what has probably ended."""
        for waiting in [w for w in self._waiting if w.answer.done()]:
            del self._waiting[waiting]  # its caller was cancelled
        urgent = [w for w in self._waiting if self._is_urgent(w, now_s)]
        others = [w for w in self._waiting if w.awaited is not None and not w.scout]
        likely = chances(self.latencies, [w.awaited for w in others if w.awaited], now_s)
        batch = urgent[:BATCH]
        batch += [others[at] for at in together(likely, pressed=self._pressed)]
        if self._client.batch_supported is None and len(batch) > 1:
            self._trying = True
            return batch[:_TRIAL]
        return batch[:BATCH]

    def _is_urgent(self, waiting: _Waiting, now_s: float) -> bool:
        if waiting.awaited is None:
            return True
        return waiting.scout and scout_due_s(waiting.awaited) <= now_s

    def _take_due(self, now_s: float) -> list[_Waiting]:
        """The tasks that are due by themselves."""
        due = self._due[self._pressed]
        found = []
        while due and due[0][0] <= now_s:
            _, _, waiting = heapq.heappop(due)
            if waiting.taken or waiting.answer.done():
                self._waiting.pop(waiting, None)
                continue
            # What was learned since it was put there may have made it later.
            if self._due_s(waiting, self._pressed) > now_s + _LATER_S:
                self._push(waiting, self._pressed)
            else:
                waiting.taken = True
                found.append(waiting)
        return found

    def _push(self, waiting: _Waiting, pressed: bool) -> bool:
        """Put it where it falls due by itself; returns whether it is the first there."""
        due = self._due[pressed]
        heapq.heappush(due, (self._due_s(waiting, pressed), next(self._order), waiting))
        return due[0][2] is waiting

    def _due_s(self, waiting: _Waiting, pressed: bool) -> float:
        if waiting.awaited is None:
            return 0.0
        at_s = due_s(self.latencies, waiting.awaited, pressed=pressed)
        return min(at_s, scout_due_s(waiting.awaited)) if waiting.scout else at_s

    def _begin(self, batch: Sequence[_Waiting]) -> None:
        self.asked += len(batch)
        for waiting in batch:
            waiting.taken = True
            self._waiting.pop(waiting, None)
            if waiting.scout and waiting.awaited is not None:
                self._scouts.discard(waiting.awaited.quality)
        if len(self._due[not self._pressed]) > 4 * len(self._waiting) + BATCH:
            self._forget_taken()

    def _forget_taken(self) -> None:
        for pressed, due in self._due.items():
            kept = [entry for entry in due if not entry[2].taken]
            heapq.heapify(kept)
            self._due[pressed] = kept

    # -- reading ------------------------------------------------------------------------------

    async def _read_together(self, batch: Sequence[_Waiting]) -> None:
        asked_at_s = self._monotonic()
        try:
            async with self._reads:
                self.calls += 1
                found = await self._client.tasks([waiting.task_id for waiting in batch])
        except KreaError as error:
            for waiting in batch:
                _fail(waiting, error)
            return
        finally:
            self._trying = False
            self._arrived.set()
        for waiting in batch:
            task = found.get(waiting.task_id)
            if task is None or _needs_single_read(task):
                await self._read_one(waiting)
            elif not waiting.answer.done():
                waiting.answer.set_result(_answer(waiting, task, asked_at_s))

    async def _read_one(self, waiting: _Waiting) -> None:
        try:
            async with self._reads:
                self.calls += 1
                asked_at_s = self._monotonic()
                task = await self._client.task(waiting.task_id)
        except KreaError as error:
            _fail(waiting, error)
            return
        if not waiting.answer.done():
            waiting.answer.set_result(_answer(waiting, task, asked_at_s))


def _needs_single_read(task: Task) -> bool:
    """Whether only the documented read of one task is believed: no link, or a failure.

    After a failure the image may be bought again.
    """
    return task.status in ("failed", "cancelled") or (
        task.status == "completed" and not task.results
    )


def _answer(waiting: _Waiting, task: Task, asked_at_s: float) -> Answer:
    return Answer(task, asked_at_s, waiting.hint, waiting.quiet_at_s)


def _fail(waiting: _Waiting, error: KreaError) -> None:
    if not waiting.answer.done():
        waiting.answer.set_exception(error)

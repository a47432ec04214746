"""Reads tasks when it is worth it, many in one call where the server can.

A question is in one place, ``Asker._questions``, from the call of ``ask`` until its return. There
it waits for its time, waits for its callback (``called_for``), or is being read (``reading``). One
loop looks at all of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, Protocol

import anyio
import anyio.abc

from krea_dagster.engine.alarm import wait
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.poll_schedule import (
    BATCH,
    Awaited,
    Hint,
    chances,
    is_learned,
    pause_s,
    scout_due_s,
    to_read,
)
from krea_dagster.errors import KreaError, NoUsableAnswer
from krea_dagster.models import Task

#: Reads under way at once.
_READS: Final = 12
#: Tasks in the first batch read, which shows whether the server has it: where it does not, they
#: are read one by one.
_TRIAL: Final = 2
#: Seconds that a read may take beyond the time at which a question is due in any case: a client
#: ends its calls long before.
_READ_S: Final = 600.0


class TaskReader(Protocol):
    """The part of KreaClient that is needed here."""

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server has the batch read now; None until it was tried."""

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
class Question:
    """One question about a task. ``due_s`` is when it is asked in any case.

    ``called_for`` is the key of the request whose callback is waited for.
    """

    task_id: str
    awaited: Awaited | None
    answer: asyncio.Future[Answer]
    due_s: float
    called_for: str | None = None
    reading: bool = False
    hint: Hint | None = None
    quiet_at_s: float = 0.0

    def answered(self, task: Task, asked_at_s: float) -> None:
        """Give the answer, unless the caller has left."""
        if not self.answer.done():
            self.answer.set_result(Answer(task, asked_at_s, self.hint, self.quiet_at_s))

    def failed(self, error: Exception) -> None:
        """Give the error, unless the caller has left."""
        if not self.answer.done():
            self.answer.set_exception(error)


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
        #: Whether places in the window are wanted, so that it is worth asking early.
        self.pressed = False
        # All of them, in the order in which they came. Two may be about one task.
        self._questions: dict[Question, None] = {}
        self._arrived = asyncio.Event()
        self._reads = asyncio.Semaphore(_READS)
        self._trying = False
        self._pausing = False
        #: Tasks read so far, and the calls that it took.
        self.asked = 0
        self.calls = 0

    async def ask(
        self,
        task_id: str,
        awaited: Awaited | None = None,
        *,
        within_s: float = 0.0,
        called_for: str | None = None,
    ) -> Answer:
        """Return the task once it has probably ended, or at once without ``awaited``.

        ``within_s`` is when it is read at the latest. ``called_for`` is the key of a request that
        will be called about: then it is read when ``wake`` says so. Raises ApiError, also where no
        read comes to an end.
        """
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        question = Question(task_id, awaited, answer, self._monotonic() + within_s, called_for)
        none = NoUsableAnswer(f"no read of task {task_id} has come to an end")
        alarm = answer.get_loop().call_later(within_s + _READ_S, question.failed, none)
        self._questions[question] = None
        if awaited is None or not self._pausing:
            self._arrived.set()
        try:
            return await answer
        finally:
            alarm.cancel()
            del self._questions[question]

    def listening(self) -> Mapping[str, Question]:
        """Return the questions that wait for their callback, by the keys of their requests."""
        return {one.called_for: one for one in self._questions if one.called_for is not None}

    def wake(self, question: Question, hint: Hint, quiet_at_s: float) -> None:
        """Have a question asked whose callback was waited for."""
        question.called_for, question.awaited = None, None
        question.hint, question.quiet_at_s = hint, quiet_at_s
        self._arrived.set()

    def end(self, error: KreaError) -> None:
        """Answer all questions with an error: none will be answered any more."""
        for question in self._questions:
            question.failed(error)

    async def run(self) -> None:
        """Read what is worth it, for ever."""
        async with anyio.create_task_group() as reads:
            while True:
                self._arrived.clear()
                wait_s = self._start_reads(reads)
                # What comes meanwhile has hardly ended, and does not wake the loop.
                self._pausing = wait_s is not None
                await wait(self._arrived, wait_s)

    # -- what to read -------------------------------------------------------------------------

    def _start_reads(self, reads: anyio.abc.TaskGroup) -> float | None:
        """Start what is due; returns the seconds until more may be, None for never."""
        if self._trying:
            return None
        now_s = self._monotonic()
        waiting = [one for one in self._questions if not one.reading]
        chosen = self._due(waiting, now_s)
        together = self._client.batch_supported is not False and len(chosen) > 1
        if together:
            self._trying = self._client.batch_supported is None
            chosen = chosen[: _TRIAL if self._trying else BATCH]
            reads.start_soon(self._read_together, chosen, reads)
        for one in chosen:
            self.asked += 1
            one.reading = True
            if not together:
                reads.start_soon(self._read_one, one)
        left = [one for one in waiting if not one.reading]
        timed = [one.awaited for one in left if one.awaited and one.called_for is None]
        waits_s = [max(0.0, one.due_s - now_s) for one in left]
        if timed:
            waits_s.append(pause_s(self.latencies, timed, now_s))
        return min(waits_s, default=None)

    def _due(self, waiting: Sequence[Question], now_s: float) -> list[Question]:
        """Return the questions to ask now: what must be asked first, then what has ended."""
        urgent: list[Question] = []
        others: list[tuple[Question, Awaited]] = []
        scouted: set[str] = set()
        for one in waiting:
            task = one.awaited
            if task is None or now_s >= one.due_s:
                urgent.append(one)
            elif one.called_for is not None:
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
        ended = to_read(likely, pressed=self.pressed, batch=batch)
        return urgent + [others[at][0] for at in ended]

    # -- reading ------------------------------------------------------------------------------

    async def _read_together(
        self, questions: Sequence[Question], reads: anyio.abc.TaskGroup
    ) -> None:
        try:
            async with self._reads:
                self.calls += 1
                asked_at_s = self._monotonic()
                found = await self._client.tasks([one.task_id for one in questions])
        except KreaError as error:
            for one in questions:
                one.failed(error)
            return
        finally:
            self._trying = False
            self._arrived.set()
        for one in questions:
            task = found.get(one.task_id)
            if task is None or _needs_single_read(task):
                reads.start_soon(self._read_one, one)
            else:
                one.answered(task, asked_at_s)

    async def _read_one(self, question: Question) -> None:
        try:
            async with self._reads:
                self.calls += 1
                asked_at_s = self._monotonic()
                question.answered(await self._client.task(question.task_id), asked_at_s)
        except KreaError as error:
            question.failed(error)


def _needs_single_read(task: Task) -> bool:
    """Whether only the documented read of one task is believed: no link, or a failure.

    After a failure the image may be bought again.
    """
    return task.status in ("failed", "cancelled") or (
        task.status == "completed" and not task.results
    )

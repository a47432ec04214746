"""Gathers the questions about tasks that fall due together, so that one read answers many."""

from __future__ import annotations

import asyncio
import heapq
from collections.abc import Callable, Sequence
from itertools import count
from typing import Final, Protocol

import anyio
import anyio.abc

from krea_dagster.errors import ApiError
from krea_dagster.models import Task

#: Tasks per batch read: the server's limit.
BATCH: Final = 50

#: Questions due within this many seconds go together.
_TOGETHER_S: Final = 0.15

#: Reads under way at once.
_READS: Final = 8


class TaskReader(Protocol):
    """The part of KreaClient that is needed here."""

    @property
    def batch_supported(self) -> bool | None:
        """Whether the server has the batch read; None until it was tried."""

    async def task(self, task_id: str) -> Task:
        """Read one task."""

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        """Read many; those that the server left out are missing."""


class Asker:
    """Answers ``ask`` with one task, whichever read brought it.

    ``monotonic`` is the clock of the due times, in seconds. ``run`` must be under way in a
    task group for anything to be answered.
    """

    def __init__(self, client: TaskReader, monotonic: Callable[[], float]) -> None:
        self._client = client
        self._monotonic = monotonic
        self._due: list[tuple[float, int, str, asyncio.Future[Task]]] = []
        self._order = count()
        self._arrived = asyncio.Event()
        self._reads = anyio.CapacityLimiter(_READS)
        #: Tasks read so far, and the calls that it took.
        self.asked = 0
        self.calls = 0

    async def ask(self, task_id: str, at_s: float) -> Task:
        """Return the task as it is at ``at_s`` or a little later. Raises ApiError."""
        answer: asyncio.Future[Task] = asyncio.get_running_loop().create_future()
        heapq.heappush(self._due, (at_s, next(self._order), task_id, answer))
        self._arrived.set()
        return await answer

    async def run(self) -> None:
        """Read what falls due, for ever."""
        async with anyio.create_task_group() as reads:
            while True:
                wait_s = self._due[0][0] - self._monotonic() if self._due else None
                if wait_s is not None and wait_s <= 0:
                    self._start_reads(reads, self._take())
                    continue
                self._arrived.clear()
                with anyio.move_on_after(wait_s):
                    await self._arrived.wait()

    def _take(self) -> dict[str, asyncio.Future[Task]]:
        until_s = self._monotonic() + _TOGETHER_S
        batch: dict[str, asyncio.Future[Task]] = {}
        while self._due and self._due[0][0] <= until_s and len(batch) < BATCH:
            _, _, task_id, answer = heapq.heappop(self._due)
            batch[task_id] = answer
        return batch

    def _start_reads(
        self, reads: anyio.abc.TaskGroup, batch: dict[str, asyncio.Future[Task]]
    ) -> None:
        self.asked += len(batch)
        if self._client.batch_supported is not False and len(batch) > 1:
            reads.start_soon(self._read_together, batch)
            return
        for task_id, answer in batch.items():
            reads.start_soon(self._read_one, task_id, answer)

    async def _read_together(self, batch: dict[str, asyncio.Future[Task]]) -> None:
        try:
            async with self._reads:
                self.calls += 1
                found = await self._client.tasks(list(batch))
        except ApiError as error:
            for answer in batch.values():
                _fail(answer, error)
            return
        for task_id, answer in batch.items():
            task = found.get(task_id)
            if task is None or (task.status == "completed" and not task.results):
                # Left out, or without its link: only the single read says more.
                await self._read_one(task_id, answer)
            elif not answer.done():
                answer.set_result(task)

    async def _read_one(self, task_id: str, answer: asyncio.Future[Task]) -> None:
        try:
            async with self._reads:
                self.calls += 1
                task = await self._client.task(task_id)
        except ApiError as error:
            _fail(answer, error)
            return
        if not answer.done():
            answer.set_result(task)


def _fail(answer: asyncio.Future[Task], error: ApiError) -> None:
    if not answer.done():
        answer.set_exception(error)

"""Reads of tasks: each comes to an end."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import anyio
import anyio.lowlevel
import pytest

from krea_dagster.engine.run import poller
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.poll_schedule import PendingTask, PollReason
from krea_dagster.engine.run.poller import TaskPoller, TaskRead
from krea_dagster.errors import NoUsableAnswer
from krea_dagster.models import Task

pytestmark = pytest.mark.anyio

KNOWN = Latencies.known({"1K": 0.02})


def ended(task_id: str) -> Task:
    return Task(task_id, "completed", 100, (f"https://files.test/{task_id}.png",))


class Server:
    """A server whose tasks have all ended, with or without the batch read."""

    def __init__(self, batch: bool | None = None) -> None:
        self.batch_supported = batch
        self.singles: list[str] = []
        self.batches: list[Sequence[str]] = []

    async def task(self, task_id: str) -> Task:
        self.singles.append(task_id)
        return ended(task_id)

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        self.batches.append(task_ids)
        return {task_id: ended(task_id) for task_id in task_ids}


@asynccontextmanager
async def polling(server: Server) -> AsyncIterator[TaskPoller]:
    one = TaskPoller(server, time.monotonic, KNOWN)
    async with anyio.create_task_group() as group:
        group.start_soon(one.run)
        with anyio.fail_after(60):
            yield one
        group.cancel_scope.cancel()


def awaited() -> PendingTask:
    return PendingTask("1K", time.monotonic())


async def ask_all(one: TaskPoller, task_ids: Sequence[str]) -> list[TaskRead]:
    answers: list[TaskRead] = []

    async def read(task_id: str) -> None:
        answers.append(await one.read(task_id, awaited(), within_s=60.0))

    async with anyio.create_task_group() as group:
        for task_id in task_ids:
            group.start_soon(read, task_id)
    return answers


@pytest.mark.parametrize("batch", [True, False, None])
async def test_two_reads_of_one_task_both_return(batch: bool | None) -> None:
    async with polling(Server(batch)) as one:
        answers = await ask_all(one, ["task-a", "task-a", "task-b"])
    assert sorted(answer.task.task_id for answer in answers) == ["task-a", "task-a", "task-b"]


async def test_a_batch_read_that_comes_and_goes_leaves_no_read_waiting() -> None:
    server = Server(True)
    async with polling(server) as one:
        for batch in (True, False, None, False, True):
            server.batch_supported = batch
            ids = [f"task-{batch}-{number}" for number in range(20)]
            async with anyio.create_task_group() as group:
                group.start_soon(ask_all, one, ids)
                await anyio.lowlevel.checkpoint()
                server.batch_supported = batch is not True
    assert server.singles
    assert server.batches


async def test_a_task_without_a_schedule_is_read_at_once() -> None:
    async with polling(Server()) as one:
        assert (await one.read("task-a")).task == ended("task-a")


async def test_a_task_whose_callback_is_expected_is_read_when_it_comes() -> None:
    server = Server()
    async with polling(server) as one, anyio.create_task_group() as group:

        async def call() -> None:
            while "key" not in one.awaiting_callback():
                await anyio.lowlevel.checkpoint()
            one.wake(one.awaiting_callback()["key"], PollReason.CALLBACK, 1.0)

        group.start_soon(call)
        answer = await one.read("task-a", awaited(), within_s=60.0, callback_key="key")
    assert (answer.reason, answer.quiet_at_s) == (PollReason.CALLBACK, 1.0)


async def test_a_task_is_read_at_the_end_of_its_patience_without_a_callback() -> None:
    async with polling(Server()) as one:
        answer = await one.read("task-a", awaited(), within_s=0.05, callback_key="key")
    assert answer.reason is None


async def test_a_call_that_never_ends_fails_its_read(monkeypatch: pytest.MonkeyPatch) -> None:
    class Silent(Server):
        async def task(self, task_id: str) -> Task:  # noqa: ARG002 - as a reader has it
            await anyio.sleep_forever()
            raise AssertionError

    monkeypatch.setattr(poller, "_READ_TIMEOUT_S", 0.05)
    async with polling(Silent(False)) as one:
        with pytest.raises(NoUsableAnswer, match="no read of task task-a has come to an end"):
            await one.read("task-a", awaited(), within_s=0.0)
        assert not one.awaiting_callback()


async def test_all_reads_fail_once_the_run_is_over() -> None:
    async with polling(Server()) as one, anyio.create_task_group() as group:

        async def fail_all() -> None:
            await anyio.lowlevel.checkpoint()
            one.fail_all(NoUsableAnswer("over"))

        group.start_soon(fail_all)
        with pytest.raises(NoUsableAnswer, match="over"):
            await one.read("task-a", awaited(), within_s=60.0, callback_key="key")

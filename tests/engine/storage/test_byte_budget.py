"""Work is admitted by its bytes and in turn, and a cancelled waiter costs nothing."""

from __future__ import annotations

import asyncio

import anyio
import pytest

from krea_dagster.engine.storage.byte_budget import ByteBudget

pytestmark = pytest.mark.anyio


async def test_work_is_admitted_within_the_budget_and_all_gets_its_turn() -> None:
    budget, most, done = ByteBudget(100), 0, 0

    async def work(size: int) -> None:
        nonlocal most, done
        async with budget.take(size):
            most = max(most, budget.used_bytes)
            await anyio.lowlevel.checkpoint()
            done += 1

    async with anyio.create_task_group() as group:
        for number in range(60):
            group.start_soon(work, 10 + number % 40)
    assert (done, budget.used_bytes) == (60, 0)
    assert 50 < most <= 100


async def test_work_larger_than_the_budget_runs_alone() -> None:
    budget = ByteBudget(100)
    async with budget.take(1):
        big = asyncio.ensure_future(_hold(budget, 1000))
        await asyncio.sleep(0)
        assert budget.used_bytes == 1
    assert await big == 1000


async def _hold(budget: ByteBudget, size: int) -> int:
    async with budget.take(size):
        return budget.used_bytes


async def test_small_work_does_not_overtake_large_work() -> None:
    budget, order = ByteBudget(100), list[int]()

    async def work(size: int) -> None:
        async with budget.take(size):
            order.append(size)

    async with budget.take(90), anyio.create_task_group() as group:
        for size in (50, 5, 6):
            group.start_soon(work, size)
        await anyio.lowlevel.checkpoint()
        assert order == []
        group.cancel_scope.cancel()  # those that wait leave
    assert budget.used_bytes == 0
    async with anyio.create_task_group() as group:
        for size in (50, 5, 6):
            group.start_soon(work, size)
    assert order == [50, 5, 6]


async def test_a_cancelled_waiter_lets_the_next_pass() -> None:
    budget = ByteBudget(100)
    async with budget.take(60):
        large = asyncio.ensure_future(_hold(budget, 90))
        small = asyncio.ensure_future(_hold(budget, 40))
        await asyncio.sleep(0)
        large.cancel()
        assert await small == 100
    assert budget.used_bytes == 0


async def test_a_waiter_cancelled_at_its_turn_returns_its_bytes() -> None:
    budget = ByteBudget(100)
    async with budget.take(100):
        waiting = asyncio.ensure_future(_hold(budget, 100))
        await asyncio.sleep(0)
    waiting.cancel()  # its turn has come, and it has not heard of it
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert budget.used_bytes == 0

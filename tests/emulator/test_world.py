"""The state survives a restart exactly, and is usable without HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.emulator import StateInUseError, World
from krea_dagster.emulator.contract import ErrorResponse, Order
from krea_dagster.emulator.model import Account, CreateResult
from tests.emulator.harness import Clock

KEY = "key-0000000000000001"


@contextlib.contextmanager
def opened(state: Path, clock: Clock, **settings: Any) -> Iterator[World]:
    world = World(state, clock=clock, **{"latency_s": 2.0, "latency_jitter": 0.0, **settings})
    world.add_account("emulator", 10_000_000)
    try:
        yield world
    finally:
        world.close()


def account(world: World) -> Account:
    found = world.account("emulator")
    assert found is not None
    return found


def create(world: World, prompt: str = "a fox", **settings: Any) -> CreateResult:
    return world.create(account(world), Order(prompt, seed=7), **settings)


def test_a_restart_on_the_same_folder_keeps_everything(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as world:
        first = create(world, idempotency_key=KEY).task
        create(world, "undecided", idempotency_key="u" * 16, undecided_s=60)
        world.script("no_results", arg=3)
        world.script("fail", 2, match="bear")
        late = create(world, "late").task
        clock.move(10)
        assert world.count_read_at_end(late) == 0
        world.rendered(first, "a" * 64)
        link = world.link_path(first).rpartition("/")[2]
        assert world.file(link).fetched == 0
        world.count("create", "200")
        before = world.stats()
    with opened(tmp_path, clock) as world:
        assert world.stats() == before
        assert before["unconsumed_faults"] == [
            {"name": "fail", "n": 2, "match": "bear", "arg": "service_error"}
        ]
        again = create(world, idempotency_key=KEY)
        assert (again.replayed, again.task.task_id) == (True, first.task_id)
        with pytest.raises(ErrorResponse, match="idempotency_conflict"):
            create(world, "a bear", idempotency_key=KEY)
        with pytest.raises(ErrorResponse, match="paid_outcome_unknown"):
            create(world, "undecided", idempotency_key="u" * 16)
        assert world.task(late.task_id, account(world)).reads_at_end == 1
        assert [one.fault.name for one in world.task(late.task_id, account(world)).faults] == [
            "no_results"
        ]
        assert world.file(link).fetched == 1


def test_the_credits_of_an_existing_account_are_not_granted_again(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as world:
        create(world)
    with opened(tmp_path, clock) as world:
        world.add_account("emulator", 99)
        assert account(world).remaining == 10_000_000 - 4_500


def test_a_task_settles_while_the_emulator_is_stopped(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock) as world:
        create(world)
        assert world.stats()["held_units"] == 4_500
    clock.move(10)
    with opened(tmp_path, clock) as world:
        stats = world.stats()
        assert (stats["held_units"], stats["charged_units"]) == (0, 4_500)
        assert stats["tasks"][0]["completed_at"] == 1_800_000_002.0


def test_the_sums_of_the_statistics_agree_at_every_time(tmp_path: Path) -> None:
    clock = Clock()
    with opened(tmp_path, clock, latency_jitter=0.9, seed=3) as world:
        for name in ("fail", "cancelled", "stuck", "slow_task"):
            world.set_rate(name, 0.2)
        for n in range(60):
            create(world, f"{n % 50}")
            clock.move(0.1)
            stats = world.stats()
            ended = ("failed", "cancelled")
            tasks = stats["tasks"]
            assert stats["reserved_units"] == 4_500 * len(tasks)
            assert stats["charged_units"] == sum(task["charged_units"] for task in tasks)
            assert stats["returned_units"] == 4_500 * sum(t["status"] in ended for t in tasks)
            waiting = ("pending", "processing")
            assert stats["in_flight"] == sum(task["status"] in waiting for task in tasks)
            assert stats["held_units"] == 4_500 * stats["in_flight"]


def test_the_sums_agree_although_the_clock_moves_between_reads(tmp_path: Path) -> None:
    class Running(Clock):
        def __call__(self) -> float:
            self.move(0.05)
            return self.now_s

    with opened(tmp_path, Running()) as world:
        for n in range(100):
            create(world, f"{n}")
        stats = world.stats(tasks=False)
        assert stats["charged_units"] > 0
        assert stats["held_units"] == 4_500 * stats["in_flight"]


def test_the_same_seed_gives_the_same_tasks_and_a_restart_gives_new_ones(tmp_path: Path) -> None:
    def ids(folder: str, seed: int) -> list[str]:
        with opened(tmp_path / folder, Clock(), seed=seed) as world:
            return [create(world, f"{n}").task.task_id for n in range(5)]

    first = ids("a", 1)
    assert ids("b", 1) == first
    assert ids("c", 2) != first
    assert not set(ids("a", 1)) & set(first)


def test_the_latency_varies_by_the_jitter(tmp_path: Path) -> None:
    with opened(tmp_path, Clock(), latency_s=10.0, latency_jitter=0.3) as world:
        took = []
        for n in range(100):
            task = create(world, f"{n}").task
            assert task.ready_at is not None
            took.append(task.ready_at - task.created_at)
    assert 7.0 <= min(took) < 8.0
    assert 12.0 < max(took) <= 13.0


def test_a_missing_seed_is_drawn_and_kept(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as world:
        drawn = [
            world.create(account(world), Order("a fox", seed=seed)).task.used_seed
            for seed in (None, 0)
        ]
    assert all(1 <= seed <= 1_048_576 for seed in drawn)
    assert len(set(drawn)) == 2


def test_two_emulators_cannot_share_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("krea_dagster.emulator.state_file.LOCK_WAIT_S", 0.0)
    with opened(tmp_path, Clock()), pytest.raises(StateInUseError, match="in use"):
        World(tmp_path, clock=Clock())


def test_a_failed_transaction_changes_nothing(tmp_path: Path) -> None:
    with opened(tmp_path, Clock()) as world:
        with contextlib.suppress(RuntimeError), world.transaction():
            create(world)
            raise RuntimeError
        assert world.stats()["creates"] == 0
        assert account(world).held == 0
        create(world)
        assert world.stats()["creates"] == 1

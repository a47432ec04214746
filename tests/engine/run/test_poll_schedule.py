"""When tasks are read: early if places are wanted, late if not."""

from __future__ import annotations

import numpy as np
import pytest

from krea_dagster.engine.run.latency import Floats, Latencies
from krea_dagster.engine.run.poll_schedule import (
    BATCH,
    PendingTask,
    PollReason,
    chances,
    pause_s,
    poll_reason,
    scout_due_s,
    select_reads,
    timeout_due_s,
    worth_polling,
)

KNOWN = Latencies.known({"1K": 2.0, "2K": 7.0})


def due_s(task: PendingTask, *, pressed: bool) -> float:
    """When a single task is read."""
    return next(
        float(now_s)
        for now_s in np.arange(task.since_s, task.since_s + 60.0, 0.02)
        if select_reads(chances(KNOWN, [task], float(now_s)), pressed=pressed, batch=False)
    )


def together(ended: Floats, *, pressed: bool) -> list[int]:
    return select_reads(ended, pressed=pressed, batch=True)


def test_a_task_is_read_earlier_if_places_in_the_window_are_wanted() -> None:
    task = PendingTask("1K", since_s=100.0)
    pressed, calm = due_s(task, pressed=True), due_s(task, pressed=False)
    assert 101.0 < pressed < 102.1 < calm < 104.0


def test_an_unfinished_task_is_read_again_soon() -> None:
    task = PendingTask("1K", since_s=100.0, not_yet_s=2.0)
    assert 102.0 < due_s(task, pressed=True) < 102.5


def test_each_quality_is_waited_for_as_long_as_it_takes() -> None:
    tasks = [PendingTask("1K", 0.0), PendingTask("2K", 0.0)]
    small, large = chances(KNOWN, tasks, now_s=3.0)
    assert small > 0.8
    assert large < 0.1


def test_a_scout_is_read_at_growing_ages_to_learn_how_long_its_kind_takes() -> None:
    assert scout_due_s(PendingTask("1K", 10.0)) == pytest.approx(10.1)
    assert scout_due_s(PendingTask("1K", 10.0, not_yet_s=1.0)) == pytest.approx(11.5)


def test_a_batch_is_read_once_it_finds_enough() -> None:
    ended = np.full(40, 0.05)
    assert together(ended, pressed=True) == []
    ended[:4] = 0.9
    assert together(ended, pressed=True)[:4] == [0, 1, 2, 3]
    assert together(ended, pressed=False) == [], "there it can wait for more"
    assert together(np.full(40, 0.5), pressed=False) == list(range(40))


def test_a_batch_holds_what_the_server_takes_and_the_likeliest_first() -> None:
    ended = np.linspace(0.0, 1.0, 120)
    assert together(ended, pressed=True) == list(range(119, 119 - BATCH, -1))


def test_the_last_few_tasks_are_read_although_they_are_few() -> None:
    assert together(np.array([0.95]), pressed=False) == [0]
    assert together(np.array([0.5]), pressed=False) == []


def test_without_tasks_nothing_is_selected() -> None:
    assert chances(KNOWN, [], now_s=0.0).size == 0
    assert together(np.zeros(0), pressed=True) == []


def test_pauses_grow_with_the_age_of_the_tasks() -> None:
    young, old = PendingTask("1K", since_s=100.0), PendingTask("1K", since_s=0.0)
    assert pause_s(KNOWN, [young, old], now_s=100.0) == pytest.approx(0.04, abs=0.001)
    assert pause_s(KNOWN, [old], now_s=40.0) == pytest.approx(0.8)
    assert pause_s(KNOWN, [old], now_s=1000.0) == 1.0


# -- with callbacks ---------------------------------------------------------------------------

CALLBACK = PendingTask("1K", since_s=100.0)


def hinted(task: PendingTask = CALLBACK, **given: float) -> PollReason | None:
    values = {"calls": 0, "seen": 0, "read_at_s": float("-inf"), "now_s": 101.0, **given}
    return poll_reason(KNOWN, task, **values)  # type: ignore[arg-type]  # counts are whole


def test_a_task_is_read_once_for_each_new_callback() -> None:
    assert hinted() is None
    assert hinted(calls=1) is PollReason.CALLBACK
    assert hinted(calls=1, seen=1, read_at_s=50.0) is None
    assert hinted(calls=3, seen=1, read_at_s=50.0) is PollReason.CALLBACK


def test_a_storm_of_callbacks_for_one_task_costs_one_read_in_two_seconds() -> None:
    assert hinted(calls=9, seen=1, read_at_s=99.5) is None
    assert hinted(calls=9, seen=1, read_at_s=98.9) is PollReason.CALLBACK


def test_a_task_without_a_callback_is_read_after_a_timeout() -> None:
    due_at_s = timeout_due_s(KNOWN, CALLBACK)
    assert due_at_s == pytest.approx(113.0, abs=0.5), "5 s and four times the median of 2 s"
    assert hinted(now_s=due_at_s - 0.1) is None
    assert hinted(now_s=due_at_s + 0.1) is PollReason.TIMEOUT
    again_s = timeout_due_s(KNOWN, PendingTask("1K", since_s=100.0, not_yet_s=20.0))
    assert again_s == pytest.approx(140.0), "and then at twice the age at which it had not ended"


def test_a_run_that_does_not_wait_reads_tasks_with_a_callback_or_that_have_probably_ended() -> None:
    assert worth_polling(KNOWN, "1K", 0.1, called=True)
    assert not worth_polling(KNOWN, "1K", 5.0, called=False), "its call is still to be expected"
    assert worth_polling(KNOWN, "1K", 14.0, called=False), "its call was missed"
    assert not worth_polling(KNOWN, "1K", 1.0, called=None)
    assert worth_polling(KNOWN, "1K", 5.0, called=None), "no callback is expected"

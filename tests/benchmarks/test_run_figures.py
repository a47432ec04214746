"""The figures of a run, and the schedule bound: the best client reaches it, and none is faster."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.account import Account, AccountLimits, CreateCall
from benchmarks.run_figures import (
    bound_of_s,
    earliest_starts_s,
    figures_of,
    most_at_once,
    schedule_bound_s,
)

#: Times are whole ticks of a 64th of a second, so that floating point adds them up exactly.
TICK_S = 1 / 64


def make_stats(
    *creates: tuple[float, str, str], late_s: float = 0.0, **more: Any
) -> dict[str, Any]:
    """A record of these create calls; every task takes 2 s and is downloaded ``late_s`` later."""
    taken = [create for create in creates if create[1] == "accepted"]
    return {
        "limits": {"rate": None, "burst": 20, "concurrent": None},
        "first_post_s": creates[0][0],
        "last_download_s": max(at_s for at_s, _, _ in taken) + 2.0 + late_s,
        "single_reads": 0,
        "batch_reads": 0,
        "creates": [
            {"at_s": at_s, "outcome": outcome, "worker": worker}
            for at_s, outcome, worker in creates
        ],
        "tasks": [
            {
                "number": number,
                "created_s": at_s,
                "latency_s": 2.0,
                "done_s": at_s + 2.0,
                "downloaded_s": at_s + 2.0 + late_s,
            }
            for number, (at_s, _, _) in enumerate(taken)
        ],
        **more,
    }


def test_the_makespan_is_from_the_first_post_to_the_last_image() -> None:
    creates = (100.0, "429", "w"), (101.0, "accepted", "w"), (105.0, "accepted", "w")
    found = figures_of(make_stats(*creates, late_s=1.0), images=2)
    assert (found.makespan_s, found.bound_s, found.ratio) == (8.0, 2.0, 4.0)


def test_refusals_count_overall_and_after_the_first_ten_seconds() -> None:
    found = figures_of(
        make_stats(
            (0.0, "429", "w"),
            (9.0, "429", "w"),
            (10.5, "accepted", "w"),
            (11.0, "429", "w"),
            (12.0, "accepted", "w"),
            (13.0, "accepted", "w"),
        ),
        images=3,
    )
    assert found.turned_away == pytest.approx(3 / 6)
    assert found.turned_away_later == pytest.approx(1 / 4)


def test_reads_are_counted_per_image() -> None:
    both = make_stats((0.0, "accepted", "w"), (0.0, "accepted", "w"), single_reads=3, batch_reads=1)
    found = figures_of(both, images=2)
    assert (found.single_reads, found.batch_reads) == (1.5, 0.5)


def test_a_run_that_bought_twice_or_lost_an_image_has_no_figures() -> None:
    twice = make_stats((0.0, "accepted", "w"), (0.0, "accepted", "w"))
    with pytest.raises(ValueError, match="2 tasks were created for 1 images"):
        figures_of(twice, images=1)
    twice["tasks"][1]["downloaded_s"] = None
    with pytest.raises(ValueError, match="1 of 2 images were never downloaded"):
        figures_of(twice, images=2)


def test_the_most_at_once_counts_tasks_that_overlap() -> None:
    at = [0.0, 1.0, 1.5, 2.0, 9.0]
    assert most_at_once(make_stats(*((at_s, "accepted", "w") for at_s in at))) == 3


# -- the schedule bound -----------------------------------------------------------------------


def test_without_limits_all_tasks_run_at_once() -> None:
    assert schedule_bound_s([2.0, 5.0, 3.0], AccountLimits()) == 5.0


def test_no_tasks_take_no_time() -> None:
    assert schedule_bound_s([], AccountLimits(rate=20)) == 0.0


def test_with_one_place_tasks_run_in_sequence() -> None:
    assert schedule_bound_s([2.0, 5.0, 3.0], AccountLimits(concurrent=1)) == 10.0


def test_a_place_is_free_as_soon_as_the_first_of_the_tasks_ends() -> None:
    limits = AccountLimits(concurrent=2)
    assert earliest_starts_s([4.0, 1.0, 1.0, 1.0], limits) == [0.0, 0.0, 1.0, 2.0]


def test_a_bucket_gives_its_burst_at_once_and_then_one_token_at_a_time() -> None:
    starts = earliest_starts_s([9.0] * 6, AccountLimits(rate=4, burst=3))
    assert starts == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75]


def test_a_bucket_fills_up_to_its_burst_while_no_place_is_free() -> None:
    starts = earliest_starts_s([10.0] * 6, AccountLimits(rate=1, burst=2, concurrent=2))
    assert starts == [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]


def test_the_bound_of_a_large_run_is_set_by_the_rate() -> None:
    """2,000 tasks at 20 a second: 1,980 wait for a token, and the last for its end."""
    bound_s = schedule_bound_s([2.0] * 2000, AccountLimits(rate=20, burst=20, concurrent=64))
    assert bound_s == pytest.approx(1980 / 20 + 2.0)


latencies = st.lists(st.integers(0, 100).map(lambda ticks: ticks * TICK_S), max_size=12)
limits = st.builds(
    AccountLimits,
    rate=st.sampled_from([None, 1.0, 2.0, 4.0, 8.0]),
    burst=st.integers(1, 4),
    concurrent=st.none() | st.integers(1, 4),
)


@settings(max_examples=200, deadline=None)
@given(latencies=latencies, limits=limits)
def test_a_client_that_tries_at_every_moment_is_as_fast_as_the_bound(
    latencies: list[float], limits: AccountLimits
) -> None:
    account = served(latencies, limits, tries=lambda: True)
    assert makespan_s(account) == schedule_bound_s(latencies, limits)
    assert bound_of_s(account.stats(brief=False)) == pytest.approx(makespan_s(account))


@settings(max_examples=200, deadline=None)
@given(latencies=latencies, limits=limits, seed=st.integers(0, 1000))
def test_no_client_is_faster_than_the_bound(
    latencies: list[float], limits: AccountLimits, seed: int
) -> None:
    draw = random.Random(seed)
    account = served(latencies, limits, tries=lambda: draw.random() < 0.3)
    assert makespan_s(account) >= schedule_bound_s(latencies, limits)


def served(latencies: list[float], limits: AccountLimits, *, tries: Callable[[], bool]) -> Account:
    """An account at which a client got all its images; ``tries`` says when it submits."""
    account = Account(limits, lambda number: latencies[number], "task-unified-0000000000-")
    for tick in count():
        while len(account.tasks) < len(latencies) and tries():
            call = CreateCall(b"", "1:1", "1K", "", "client")
            if account.create(tick * TICK_S, call)[0] == "429":
                break
        if len(account.tasks) == len(latencies):
            break
    return account


def makespan_s(account: Account) -> float:
    ends = [task.done_s for task in account.tasks.values()]
    return max(ends) - account.counts.creates[0][0] if ends else 0.0

"""The schedule bound: no client is faster on that account, and the best one is just as fast."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.account import Account, Limits, Order
from benchmarks.bound import bound_of_s, earliest_starts_s, schedule_bound_s

#: Times are whole ticks of a 64th of a second, so that floating point adds them up exactly.
TICK_S = 1 / 64


def test_without_limits_everything_runs_at_once() -> None:
    assert schedule_bound_s([2.0, 5.0, 3.0], Limits()) == 5.0


def test_nothing_takes_no_time() -> None:
    assert schedule_bound_s([], Limits(rate=20)) == 0.0


def test_one_place_puts_one_after_the_other() -> None:
    assert schedule_bound_s([2.0, 5.0, 3.0], Limits(concurrent=1)) == 10.0


def test_a_place_is_free_as_soon_as_the_first_of_the_tasks_ends() -> None:
    assert earliest_starts_s([4.0, 1.0, 1.0, 1.0], Limits(concurrent=2)) == [0.0, 0.0, 1.0, 2.0]


def test_a_bucket_gives_its_burst_at_once_and_then_one_token_after_the_other() -> None:
    starts = earliest_starts_s([9.0] * 6, Limits(rate=4, burst=3))
    assert starts == [0.0, 0.0, 0.0, 0.25, 0.5, 0.75]


def test_a_bucket_fills_up_to_its_burst_while_no_place_is_free() -> None:
    starts = earliest_starts_s([10.0] * 6, Limits(rate=1, burst=2, concurrent=2))
    assert starts == [0.0, 0.0, 10.0, 10.0, 20.0, 20.0]


def test_fixed_windows_give_their_share_at_the_beginning_of_each_second() -> None:
    starts = earliest_starts_s([9.0] * 5, Limits(rate=2, limiter="fixed"))
    assert starts == [0.0, 0.0, 1.0, 1.0, 2.0]


def test_a_sliding_window_gives_a_place_a_second_after_it_was_taken() -> None:
    limits = Limits(rate=2, limiter="sliding", concurrent=1)
    assert earliest_starts_s([0.25, 0.25, 0.5, 0.0], limits) == [0.0, 0.25, 1.0, 1.5]


def test_the_bound_of_the_issue_is_set_by_the_rate() -> None:
    """2,000 tasks at 20 a second: 1,980 wait for a token, and the last for its end."""
    bound_s = schedule_bound_s([2.0] * 2000, Limits(rate=20, burst=20, concurrent=64))
    assert bound_s == pytest.approx(1980 / 20 + 2.0)


latencies = st.lists(st.integers(0, 100).map(lambda ticks: ticks * TICK_S), max_size=12)
limits = st.builds(
    Limits,
    rate=st.sampled_from([None, 1.0, 2.0, 4.0, 8.0]),
    burst=st.integers(1, 4),
    limiter=st.sampled_from(["bucket", "fixed", "sliding"]),
    concurrent=st.none() | st.integers(1, 4),
)


@settings(max_examples=200, deadline=None)
@given(latencies=latencies, limits=limits)
def test_a_client_that_tries_at_every_moment_is_as_fast_as_the_bound(
    latencies: list[float], limits: Limits
) -> None:
    account = served(latencies, limits, tries=lambda: True)
    assert makespan_s(account) == schedule_bound_s(latencies, limits)
    assert bound_of_s(account.report(brief=False)) == pytest.approx(makespan_s(account))


@settings(max_examples=200, deadline=None)
@given(latencies=latencies, limits=limits, seed=st.integers(0, 1000))
def test_no_client_is_faster_than_the_bound(
    latencies: list[float], limits: Limits, seed: int
) -> None:
    draw = random.Random(seed)
    account = served(latencies, limits, tries=lambda: draw.random() < 0.3)
    assert makespan_s(account) >= schedule_bound_s(latencies, limits)


def served(latencies: list[float], limits: Limits, *, tries: Callable[[], bool]) -> Account:
    """An account at which a client got all its images; it tries at the moments that are given."""
    account = Account(limits, lambda number, _: latencies[number], "task-unified-0000000000-")
    for tick in count():
        while len(account.tasks) < len(latencies) and tries():
            order = Order(b"", "1:1", "1K", "", "client")
            if account.create(tick * TICK_S, order)[0] == "429":
                break
        if len(account.tasks) == len(latencies):
            break
    return account


def makespan_s(account: Account) -> float:
    ends = [task.done_s for task in account.tasks.values()]
    return max(ends) - account.books.creates[0][0] if ends else 0.0

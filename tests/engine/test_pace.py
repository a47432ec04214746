"""How fast tasks are submitted, and how many at once: against accounts of every kind."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.pace import InWork, Limit, Pace
from tests.engine.account_simulation import Account, Run, SharedJournal, World, makespan

IMAGES = 600

#: Kinds of limits, and how far from the optimum a run may end.
LIMITED: dict[str, tuple[Account, float]] = {
    "20 a second, saved up to 20": (Account(rate=20, at_once=64), 1.05),
    "20 a second, saved up to 5": (Account(rate=20, burst=5, at_once=64), 1.05),
    "20 in any second": (Account(rate=20, sliding=True, at_once=64), 1.20),
    "20 a second, Retry-After": (Account(rate=20, at_once=64, retry_after_s=1.0), 1.08),
    "32 at once": (Account(at_once=32), 1.12),
    "32 at once, Retry-After": (Account(at_once=32, retry_after_s=1.0), 1.20),
    "32 at once, of half a second": (Account(at_once=32, latency_s=(0.4, 0.6)), 1.30),
}


def share_refused(run: Run, after_s: float = 10.0) -> float:
    """Return the share of POSTs answered by 429, after the first seconds."""
    posts = [at_s for at_s in run.posts_s if at_s > after_s]
    return sum(at_s > after_s for at_s in run.refused_s) / len(posts)


@pytest.mark.parametrize("batch", [False, True], ids=["single reads", "batch reads"])
@pytest.mark.parametrize("name", LIMITED)
def test_a_run_that_knows_no_limit_finds_it(name: str, batch: bool) -> None:
    account, most = LIMITED[name]
    assert makespan(account.afresh(), Run(IMAGES, batch=batch)) <= most


@pytest.mark.parametrize(("batch", "reads"), [(False, 1.3), (True, 0.1)])
def test_under_a_limit_on_the_rate_few_are_refused_and_each_is_read_about_once(
    batch: bool, reads: float
) -> None:
    run = Run(IMAGES, batch=batch)
    makespan(Account(rate=20, at_once=64), run)
    assert share_refused(run) <= 0.02
    assert run.reads / IMAGES <= reads
    assert run.pace.limit is Limit.RATE


@pytest.mark.parametrize(("batch", "reads"), [(False, 2.5), (True, 0.3)])
def test_a_limit_on_the_number_at_once_is_filled_and_not_flooded(batch: bool, reads: float) -> None:
    run = Run(IMAGES, batch=batch)
    makespan(Account(at_once=32), run)
    assert run.pace.limit is Limit.AT_ONCE
    assert 30 <= run.pace.room <= 38
    assert share_refused(run) <= 0.08
    assert run.reads / IMAGES <= reads


def test_two_runs_with_one_key_share_it_without_a_journal() -> None:
    runs = [Run(1000, batch=True), Run(1000, batch=True, starts_s=0.2)]
    assert makespan(Account(rate=20, at_once=64), *runs) <= 1.08
    first_s = min(run.finished_s for run in runs)
    shares = [sum(at_s <= first_s for at_s in run.taken_s) for run in runs]
    assert min(shares) / sum(shares) >= 0.4


def test_a_run_that_starts_later_gets_a_share_and_nothing_is_wasted() -> None:
    runs = [Run(800, batch=True), Run(400, batch=True, starts_s=10.0)]
    assert makespan(Account(rate=20, at_once=64), *runs) <= 1.15
    middle = [at_s for at_s in runs[1].taken_s if 20.0 < at_s < 30.0]
    assert len(middle) >= 30, "of 200 in these ten seconds"


def sharing(account: Account, images: int, runs: int) -> tuple[float, float, float]:
    """Return the time, the 429s per image, and the lowest rate to the mean, for parallel runs."""
    shared = SharedJournal()
    parts = [
        Run(images // runs, batch=True, starts_s=0.01 * n, shared=shared, owner=f"{n * 7 % 10}")
        for n in range(runs)
    ]
    world = World(account, parts)
    world.go()
    rates = [run.images / (run.finished_s - run.starts_s) for run in parts]
    refused = sum(len(run.refused_s) for run in parts)
    assert shared.exchanges <= 2.5 * (world.now_s + 4) * runs, "about two a second"
    return world.now_s, refused / images, min(rates) / (sum(rates) / runs)


@pytest.mark.parametrize(("runs", "most_refused"), [(2, 0.15), (4, 0.15), (8, 0.25)])
def test_runs_that_share_a_journal_share_the_account_evenly_and_as_fast_as_one(
    runs: int, most_refused: float
) -> None:
    account = Account(rate=10, at_once=24, latency_s=(0.9, 1.1))
    alone_s, _, _ = sharing(account.afresh(), 160, 1)
    together_s, refused, slowest = sharing(account.afresh(), 160, runs)
    assert together_s <= 1.15 * alone_s
    assert refused <= most_refused
    assert slowest >= 0.6


@pytest.mark.parametrize("runs", [2, 8])
def test_places_are_shared_evenly(runs: int) -> None:
    account = Account(at_once=32)
    alone_s, _, _ = sharing(account.afresh(), 800, 1)
    together_s, refused, slowest = sharing(account.afresh(), 800, runs)
    assert together_s <= 1.4 * alone_s
    assert refused <= 0.15
    assert slowest >= 0.8


def test_a_single_run_with_a_journal_is_as_fast_as_one_without() -> None:
    account = Account(rate=20, at_once=64)
    ratio = makespan(account.afresh(), Run(IMAGES, batch=True, shared=SharedJournal(), owner="a"))
    assert ratio <= 1.05


def test_random_refusals_do_not_lower_the_pace() -> None:
    run = Run(IMAGES, batch=True)
    assert makespan(Account(at_once=64, refuse_by_chance=0.05), run) <= 2.0


def test_without_limits_the_window_opens_to_max_in_flight() -> None:
    account, run = Account(), Run(400, batch=True, most=50)
    makespan(account, run)
    assert account.most_seen == 50
    assert run.refused_s == []


def test_a_rate_that_the_user_knows_is_kept() -> None:
    account, run = Account(), Run(100, batch=True)
    run.pace = Pace(256, most_per_s=10.0)
    makespan(account, run)
    assert run.posts_s[-1] >= 9.8
    gaps_s = [b - a for a, b in zip(run.posts_s, run.posts_s[1:], strict=False)]
    assert sum(gap_s < 0.05 for gap_s in gaps_s) <= 2


# -- single rules -----------------------------------------------------------------------------


def busy(tasks: int) -> InWork:
    return InWork(tasks, float(tasks), 0.0)


def opened(pace: Pace, times: int) -> Pace:
    for number in range(times):
        pace = pace.taken(100.0 + number, busy(number + 1), pressed=True)
    return pace


def test_the_window_starts_small_and_opens_by_one_with_every_task_that_is_taken() -> None:
    assert Pace(64).room == 8
    assert opened(Pace(64), 8).room == 16
    assert opened(Pace(64), 1000).room == 64
    assert Pace(3).room == 3


def test_the_longest_retry_after_of_a_burst_counts() -> None:
    pace = Pace(8).refused(100.0, 99.0, busy(4), 5.0)
    assert pace.wait_s(100.0) == 5.0
    assert pace.refused(100.5, 99.0, busy(4), 20.0).wait_s(100.5) == 20.0
    assert pace.refused(100.5, 99.0, busy(4), 1.0).wait_s(100.5) == 4.5
    assert pace.refused(100.5, 99.0, busy(4), 0.0).wait_s(100.5) == 4.5


def test_after_a_first_refusal_one_is_tried_at_a_time_until_the_reason_is_clear() -> None:
    pace = opened(Pace(64), 40).refused(200.0, 199.0, busy(40), 0.0)
    assert pace.limit is Limit.UNCLEAR
    assert pace.one_by_one


def test_a_server_that_takes_more_although_nothing_has_ended_limits_the_rate() -> None:
    pace = opened(Pace(64), 20).refused(200.0, 199.0, busy(20), 0.0)
    for number in range(3):
        pace = pace.taken(200.1 + number / 10, busy(21 + number), pressed=True)
    assert pace.limit is Limit.RATE


def test_a_server_that_takes_nothing_until_something_ends_is_full() -> None:
    pace = opened(Pace(64), 40)
    for number in range(8):
        pace = pace.refused(200.0 + number / 5, 199.9 + number / 5, busy(32), 0.0)
    assert pace.limit is Limit.AT_ONCE
    assert 30 <= pace.room <= 32


def test_one_burst_of_refusals_counts_once() -> None:
    pace = Pace(64, limit=Limit.AT_ONCE, window=40.0)
    once = pace.refused(10.0, 9.0, busy(40), 0.0)
    assert once.room < 40
    assert once.refused(10.1, 9.5, busy(40), 0.0).window == once.window


def test_a_server_that_becomes_slow_gets_fewer_tasks() -> None:
    pace = opened(Pace(64), 64)
    assert pace.slowed(300.0, median_s=3.0, best_s=2.0).room == 64
    slower = pace.slowed(300.0, median_s=5.0, best_s=2.0)
    assert slower.room == 57
    assert slower.slowed(302.0, 5.0, 2.0).room == 57, "once per latency"
    assert slower.slowed(306.0, 5.0, 2.0).room == 51


@given(
    most=st.integers(1, 4096),
    per_s=st.none() | st.floats(0.01, 1000),
    events=st.lists(
        st.tuples(
            st.booleans(),
            st.floats(0, 60),
            st.floats(0, 10),
            st.integers(0, 5000),
            st.floats(0, 1),
            st.sampled_from([0.0, 1.0, 60.0]),
        ),
        max_size=60,
    ),
)
def test_there_is_always_room_for_one_and_never_for_more_than_max_in_flight(
    most: int, per_s: float | None, events: list[tuple[bool, float, float, int, float, float]]
) -> None:
    pace, now_s = Pace(most, per_s), 0.0
    for taken, after_s, ago_s, known, share, wait_s in events:
        now_s += after_s
        in_work = InWork(known, known * share, known**0.5)
        if taken:
            now_s += pace.wait_s(now_s)  # nothing is sent before its time
            pace = pace.sent(now_s).taken(now_s - ago_s, in_work, pressed=True)
        else:
            pace = pace.refused(now_s, now_s - ago_s, in_work, wait_s)
        assert 1 <= pace.room <= most
        assert 0.0 <= pace.wait_s(now_s) < 400.0


def test_a_server_that_refuses_for_hours_is_tried_at_bounded_pauses() -> None:
    pace, now_s = Pace(64), 0.0
    for _ in range(3000):
        now_s += 1.0
        pace = pace.refused(now_s, now_s, busy(5), 0.0)
    assert 0.0 < pace.wait_s(now_s) < 2.0


def test_a_server_that_does_not_answer_is_tried_one_at_a_time_until_it_takes_one() -> None:
    pace = opened(Pace(64), 64).silent(200.0, 5.0)
    assert pace.wait_s(200.0) == 5.0
    assert pace.one_by_one
    assert not pace.taken(206.0, busy(65), pressed=True).one_by_one

"""What each run of an account may send, by the leases of the others."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.pace import ALONE, InWork, Limit, Pace
from krea_dagster.engine.pace_sharing import (
    LEASE_S,
    Lease,
    PaceEvent,
    PaceExchange,
    PaceHistory,
    SharedPace,
    dump_history,
    load_history,
    share_of,
)

FULL = Pace(64, limit=Limit.AT_ONCE, window=24.0)
NO_TASKS = InWork(0, 0.0, 0.0)


def room(pace: Pace, mine: Lease, *others: Lease, turn: int = 0) -> int:
    share = share_of(pace, mine, others, 100.0, turn)
    return Pace(64, share=share, limit=pace.limit, window=pace.window).room


def test_places_are_divided_evenly_among_runs_that_want_them() -> None:
    mine, other = Lease("a", 0, 100), Lease("b", 0, 100)
    assert room(FULL, mine) == 24
    assert room(FULL, mine, other) == 12
    assert room(FULL, mine, other, Lease("c", 0, 100)) == 8


def test_places_that_one_run_does_not_want_go_to_the_others() -> None:
    assert room(FULL, Lease("a", 0, 100), Lease("b", 2, 0)) == 22


def test_a_new_run_waits_until_the_others_give_places_back() -> None:
    assert room(FULL, Lease("b", 0, 100), Lease("a", 24, 100)) == 0


@given(
    window=st.floats(1, 300),
    wants=st.lists(st.integers(1, 400), min_size=1, max_size=12),
    turn=st.integers(0, 10_000),
)
def test_all_runs_together_have_the_window_and_no_more(
    window: float, wants: list[int], turn: int
) -> None:
    leases = [Lease(f"{n:03}", 0, want) for n, want in enumerate(wants)]
    pace = Pace(500, limit=Limit.AT_ONCE, window=window)
    rooms = []
    for mine in leases:
        others = [lease for lease in leases if lease is not mine]
        share = share_of(pace, mine, others, 100.0, turn)
        left = int(window) - share.elsewhere
        rooms.append(min(left, mine.wants))
    assert min(rooms) >= 0
    assert abs(sum(rooms) - min(int(window), sum(wants))) <= 1
    assert max(rooms) - min(rooms) <= 1 or min(wants) < max(rooms)


def test_with_fewer_places_than_runs_each_has_its_turn() -> None:
    pace = Pace(64, limit=Limit.AT_ONCE, window=2.0)
    leases = [Lease(f"{n}", 0, 10) for n in range(8)]
    had = {
        mine.owner
        for turn in range(40)
        for mine in leases
        if room(pace, mine, *(one for one in leases if one is not mine), turn=turn)
    }
    assert len(had) == 8


def test_while_each_answer_matters_only_one_run_tries() -> None:
    pace = Pace(64, limit=Limit.UNCLEAR, window=20.0)
    rooms = [room(pace, Lease(a, 0, 9), Lease(b, 0, 9)) for a, b in (("a", "b"), ("b", "a"))]
    assert sorted(count > 0 for count in rooms) == [False, True]


def test_the_rate_is_shared_by_runs_that_send() -> None:
    pace = Pace(64, limit=Limit.RATE, rate_per_s=10.0, window=float("inf"), rate_at_s=100.0)
    mine = Lease("a", 0, 100)
    assert share_of(pace, mine, [Lease("b", 0, 100)], 100.0, 0).of_rate == 0.5
    assert share_of(pace, mine, [Lease("b", 5, 0)], 100.0, 0).of_rate == 1.0
    assert share_of(pace, mine, [Lease("b", 5, 1)], 100.0, 0).of_rate == pytest.approx(0.8)


def answers() -> list[PaceEvent]:
    taken = [PaceEvent(10.0 + n / 100, "taken", 0.005, InWork(n, n, 0.0)) for n in range(30)]
    refusals = [PaceEvent(10.3 + n, "refused", 0.005, InWork(30, 30.0, 0.0)) for n in range(6)]
    return [*taken, *refusals]


def test_events_that_arrive_late_and_unordered_give_the_same_pace() -> None:
    ordered = PaceHistory(Pace(64), ()).with_events(answers(), 11.0).with_events((), 60.0)
    mixed = PaceHistory(Pace(64), ()).with_events(answers()[::2], 11.0)
    mixed = mixed.with_events(answers()[1::2], 12.0).with_events((), 60.0)
    assert mixed == ordered
    assert ordered.events == ()


def test_a_stored_history_is_loaded_with_another_clock() -> None:
    told = PaceHistory(Pace(1_000_000), ()).with_events(answers(), 17.0)
    found = load_history(dump_history(told, 17.0), 1.0, 5000.0)
    assert found.learned().limit is told.learned().limit
    assert found.learned().window == told.learned().window
    assert found.events[-1].at_s == pytest.approx(told.events[-1].at_s + 5000.0 - 18.0)


@pytest.mark.parametrize("age_s", [-0.1, 301.0, float("nan")])
def test_a_history_of_the_future_or_an_old_one_is_ignored(age_s: float) -> None:
    told = PaceHistory(FULL, ())
    assert load_history(dump_history(told, 0.0), age_s, 50.0) == PaceHistory(Pace(1_000_000), ())


def test_a_run_whose_journal_is_away_goes_on_alone_and_writes_its_events_later() -> None:
    shared = SharedPace(Pace(64))
    mine, other = Lease("a", 0, 9), Lease("b", 4, 9)
    shared.exchanged(PaceExchange(Pace(64), mine, [other], 0, 0.0), 100.0)
    assert shared.pace.room == 4
    shared.learn(PaceEvent(101.0, "taken", 0.1, NO_TASKS, pressed=True))
    shared.missed(101.0)
    assert shared.pace.share != ALONE
    shared.missed(101.0 + LEASE_S)
    assert shared.pace.share == ALONE
    assert shared.pace.room == 9
    assert len(shared.untold()) == 1

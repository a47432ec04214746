"""Which days, stops and levels of spend are unusual, compared with the days before them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from datetime import date, timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.account_years import simulate
from krea_dagster.spend.warnings.anomaly import (
    THRESHOLD,
    Anomaly,
    Usual,
    find_new_levels,
    find_stops,
    find_unusual_days,
    usual_of_peers,
)

FIRST = date(2025, 1, 6)  # a Monday
GRAIN = 18_000


def day(number: int) -> date:
    return FIRST + timedelta(days=number)


def days_of(values: Sequence[int]) -> dict[date, int]:
    return {day(number): units for number, units in enumerate(values)}


def week(weeks: int, workday: int = 1_000_000, weekend: int = 100_000) -> list[int]:
    return ([workday] * 5 + [weekend] * 2) * weeks


def unusual(values: Sequence[int], threshold: float = THRESHOLD) -> list[Anomaly]:
    return find_unusual_days(days_of(values), day(len(values) - 1), GRAIN, threshold)


# -- properties -----------------------------------------------------------------------------------

weeks = st.lists(st.integers(0, 50_000_000), min_size=7, max_size=7)


@given(pattern=weeks, length=st.integers(1, 60), threshold=st.floats(1, 10))
def test_an_account_that_is_the_same_each_week_has_no_finding(
    pattern: list[int], length: int, threshold: float
) -> None:
    spent = days_of(pattern * length)
    last = max(spent)
    assert find_unusual_days(spent, last, GRAIN, threshold) == []
    assert find_stops(spent, last, threshold) == []
    assert find_new_levels(spent, last, GRAIN, threshold) == []


@given(seed=st.integers(0, 1_000), order=st.randoms(use_true_random=False))
def test_the_order_in_which_days_are_given_does_not_matter(seed: int, order: random.Random) -> None:
    spent = simulate("bursty", 2_000, seed).spent()
    items = list(spent.items())
    order.shuffle(items)
    last = max(spent)
    assert find_unusual_days(dict(items), last, GRAIN, 3) == find_unusual_days(
        spent, last, GRAIN, 3
    )
    assert find_stops(dict(items), last, 3) == find_stops(spent, last, 3)
    assert find_new_levels(dict(items), last, GRAIN, 3) == find_new_levels(spent, last, GRAIN, 3)


@given(seed=st.integers(0, 1_000), number=st.integers(70, 330))
def test_a_workday_of_ten_times_its_spend_is_found_in_a_smooth_year(seed: int, number: int) -> None:
    year = simulate("smooth", 20_000, seed)
    planted = next(one for one in range(number, 365) if year.day(one).weekday() < 5)
    spent = year.with_times(planted, 10).spent()
    found = find_unusual_days(spent, max(spent), GRAIN)
    assert any(year.day(planted) in anomaly.usual for anomaly in found)


@given(seed=st.integers(0, 1_000), until=st.integers(60, 364))
def test_what_is_said_of_a_day_does_not_depend_on_later_days(seed: int, until: int) -> None:
    year = simulate("bursty", 20_000, seed)
    spent, last = year.spent(), year.day(until)
    early = {one for found in find_unusual_days(spent, last, GRAIN, 3) for one in found.usual}
    late = {one for found in find_unusual_days(spent, max(spent), GRAIN, 3) for one in found.usual}
    assert early == {one for one in late if one <= last}


@given(units=st.integers(0, 10**9), more=st.integers(1, 10**9), expected=st.integers(0, 10**9))
def test_more_spend_is_a_greater_surprise(units: int, more: int, expected: int) -> None:
    usual = Usual(expected, 0.3)
    assert usual.surprise(units + more, GRAIN) >= usual.surprise(units, GRAIN)


# -- unusual days -----------------------------------------------------------------------------


def test_a_day_of_five_times_its_weekday_is_found_with_what_is_usual() -> None:
    values = week(12)
    values[70] = 5_000_000
    (found,) = unusual(values)
    assert found == Anomaly(5_000_000, {day(70): 1_000_000})
    assert found.excess_units == 4_000_000


def test_nothing_is_unusual_in_the_first_four_weeks() -> None:
    values = week(4)
    values[20] = 50_000_000
    assert unusual(values) == []


def test_a_day_that_costs_no_more_than_an_earlier_one_is_usual() -> None:
    values = week(20)
    values[10] = 5_000_000
    values[100] = 5_000_000
    assert unusual(values) == []


def test_a_lower_threshold_finds_smaller_differences() -> None:
    values = week(12)
    values[70] = 1_700_000
    assert unusual(values) == []
    assert [one.since for one in unusual(values, 3)] == [day(70)]


def test_unusual_days_of_one_week_are_one_finding() -> None:
    values = week(12)
    values[70] = values[71] = values[74] = 5_000_000
    (found,) = unusual(values)
    assert (found.since, found.until, found.units) == (day(70), day(74), 15_000_000)
    assert list(found.usual) == [day(70), day(71), day(74)]


def test_what_stays_for_more_than_a_week_is_said_once_and_then_usual() -> None:
    values = week(12) + [5_000_000] * 90
    (found,) = unusual(values)
    assert (found.since, found.until, found.is_settled) == (day(84), day(91), True)


def test_an_unusual_day_does_not_hide_the_next_one() -> None:
    values = week(16)
    values[70] = values[85] = values[100] = 5_000_000
    assert len(unusual(values)) == 3


def test_where_most_days_have_no_purchase_those_that_have_are_compared() -> None:
    values = ([0] * 6 + [1_000_000]) * 30
    values[188] = 3_500_000
    (found,) = unusual(values)
    assert found.usual_units == 1_000_000


def test_a_day_after_the_last_is_not_looked_at() -> None:
    values = week(12)
    values[70] = 5_000_000
    assert find_unusual_days(days_of(values), day(69), GRAIN) == []


def test_of_few_purchases_chance_alone_makes_a_day_expensive() -> None:
    """One 1K image a day, and once four of them: 0.45 credits and 1.80."""
    values = [4_500] * 90
    values[80] = 18_000
    assert unusual(values) == []
    assert len(find_unusual_days(days_of(values), day(89), 45)) == 1


def test_a_weekday_that_seldom_has_a_purchase_is_not_surprised_by_two() -> None:
    """One image on each other day, and on every third Monday: its median is nothing."""
    values = [18_000 if number % 7 or number % 21 == 0 else 0 for number in range(7 * 14)]
    values[7 * 13] = 36_000
    assert unusual(values) == []


def test_more_is_expected_of_a_partition_on_a_day_on_which_the_others_cost_more() -> None:
    values, others = week(12), week(12)
    values[70] = 3_000_000
    assert len(unusual(values)) == 1
    others[70] = 3_000_000
    spent, rest = days_of(values), days_of(others)
    assert find_unusual_days(spent, max(spent), GRAIN, others=rest) == []


def test_a_short_partition_is_compared_with_those_before_it() -> None:
    peers = [1_000_000, 1_100_000, 900_000, 1_050_000, 950_000] * 4
    usual = usual_of_peers(peers, GRAIN)
    assert usual is not None
    assert usual.units == 1_000_000
    assert usual.surprise(2_700_000, GRAIN) > THRESHOLD > usual.surprise(1_500_000, GRAIN)
    assert usual_of_peers(peers[:13], GRAIN) is None


# -- stops ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threshold", [3, THRESHOLD])
def test_purchases_that_stop_are_found_within_a_week(threshold: float) -> None:
    spent = days_of(week(12))
    assert find_stops(spent, day(84), threshold) == []
    (found,) = find_stops(spent, day(91), threshold)
    assert (found.since, found.until, found.units) == (day(84), day(90), 0)
    assert found.usual_units == pytest.approx(7 * 742_857, abs=7)


def test_a_stop_ends_with_the_next_purchase() -> None:
    values = week(12) + [0] * 10 + week(4)
    (found,) = find_stops(days_of(values), day(len(values) - 1))
    assert (found.since, found.until) == (day(84), day(93))


def test_the_last_day_is_not_over() -> None:
    spent = days_of(week(12))
    (found,) = find_stops(spent, day(95))
    assert found.until == day(94)


def test_a_pause_as_long_as_an_earlier_one_is_usual() -> None:
    values = week(8) + [0] * 10 + week(8) + [0] * 10
    (found,) = find_stops(days_of(values), day(len(values)))
    assert found.since == day(56)


def test_an_account_that_buys_once_a_week_has_not_stopped_after_two_weeks() -> None:
    spent = days_of([1_000_000, 0, 0, 0, 0, 0, 0] * 12)
    assert find_stops(spent, day(84 + 7)) == []
    assert len(find_stops(spent, day(84 + 60))) == 1


def test_a_holiday_with_a_weekend_is_no_stop() -> None:
    values = week(12, weekend=0)
    values[74] = values[77] = 0  # a Friday and the Monday after it
    assert find_stops(days_of(values), day(83)) == []


# -- levels -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("times", "since"), [(1.6, 112), (0.5, 112)])
def test_a_level_that_changes_is_found_once_within_two_weeks(times: float, since: int) -> None:
    values = np.array(week(16) + week(20)).astype(float)
    values[since:] *= times
    spent = days_of(values.astype(int).tolist())
    (found,) = find_new_levels(spent, max(spent), GRAIN)
    assert found.since < day(since) <= found.until < day(since + 14)
    assert (found.excess_units > 0) == (times > 1)
    assert len(found.usual) == 14


def test_an_unusual_day_is_no_new_level() -> None:
    values = week(30)
    values[150] = 30_000_000
    spent = days_of(values)
    known = find_unusual_days(spent, max(spent), GRAIN)
    assert len(find_new_levels(spent, max(spent), GRAIN)) == 1
    assert find_new_levels(spent, max(spent), GRAIN, known=known) == []


def test_days_that_became_the_usual_ones_are_not_said_again_as_a_level() -> None:
    spent = days_of(week(20) + week(20, 5_000_000, 500_000))
    known = find_unusual_days(spent, max(spent), GRAIN)
    assert [one.is_settled for one in known] == [True]
    assert find_new_levels(spent, max(spent), GRAIN, known=known) == []


def test_a_stop_is_no_new_level_and_neither_is_its_end() -> None:
    spent = days_of(week(20) + [0] * 40 + week(20))
    stops = find_stops(spent, max(spent))
    assert len(stops) == 1
    assert find_new_levels(spent, max(spent), GRAIN, known=stops) == []

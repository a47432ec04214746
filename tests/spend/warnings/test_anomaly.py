"""What is far out of its habit, and what a month will come to."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest

from krea_dagster.spend.warnings.anomaly import days_left, far_above, find_anomalies, forecast_month

FIRST = date(2025, 1, 6)  # a Monday
GRAIN = 18_000


def days_of(values: list[int], first: date = FIRST) -> dict[date, int]:
    return {first + timedelta(days=number): units for number, units in enumerate(values)}


def week(weeks: int, workday: int = 1_000_000, weekend: int = 100_000) -> list[int]:
    return ([workday] * 5 + [weekend] * 2) * weeks


def test_a_steady_year_has_no_odd_day() -> None:
    spent = days_of(week(52))
    assert find_anomalies(spent, max(spent), GRAIN) == []


def test_a_day_of_five_times_its_weekday_is_found_with_what_was_expected() -> None:
    values = week(12)
    values[70] = 5_000_000
    (found,) = find_anomalies(days_of(values), FIRST + timedelta(days=83), GRAIN)
    assert (found.since, found.until) == (FIRST + timedelta(days=70),) * 2
    assert found.expected_units == 1_000_000
    assert found.excess_units == 4_000_000


def test_nothing_is_odd_in_the_first_four_weeks() -> None:
    values = week(4)
    values[20] = 50_000_000
    assert find_anomalies(days_of(values), FIRST + timedelta(days=27), GRAIN) == []


def test_a_day_is_judged_by_the_days_before_it_only() -> None:
    values = week(12)
    values[70] = 5_000_000
    short = dict(list(days_of(values).items())[:71])
    assert find_anomalies(short, max(short), GRAIN) == find_anomalies(
        days_of(values), FIRST + timedelta(days=83), GRAIN
    )


def test_days_in_a_row_are_one_episode() -> None:
    values = week(12)
    values[70:73] = [5_000_000] * 3
    (found,) = find_anomalies(days_of(values), FIRST + timedelta(days=83), GRAIN)
    assert (found.until - found.since).days == 2
    assert found.units == 15_000_000


def test_what_stays_for_more_than_a_week_is_said_once_and_then_the_habit() -> None:
    spent = days_of(week(12) + [5_000_000] * 90)
    (found,) = find_anomalies(spent, max(spent), GRAIN)
    assert found.since == FIRST + timedelta(days=84)
    assert (found.until - found.since).days == 7


def test_an_odd_day_does_not_hide_the_next_one() -> None:
    values = week(16)
    values[70] = values[85] = values[100] = 5_000_000
    assert len(find_anomalies(days_of(values), FIRST + timedelta(days=111), GRAIN)) == 3


def test_where_most_days_have_no_purchase_those_that_have_are_the_habit() -> None:
    values = ([0] * 6 + [1_000_000]) * 30
    values[188] = 3_500_000
    (found,) = find_anomalies(days_of(values), FIRST + timedelta(days=209), GRAIN)
    assert found.expected_units == 1_000_000


def test_a_day_after_the_last_is_not_looked_at() -> None:
    values = week(12)
    values[70] = 5_000_000
    assert find_anomalies(days_of(values), FIRST + timedelta(days=69), GRAIN) == []


def test_of_few_purchases_chance_alone_makes_a_day_dear() -> None:
    """One 1K image a day, and once four of them: 0.45 credits and 1.80."""
    values = [4_500] * 90
    values[80] = 18_000
    spent = days_of(values)
    assert find_anomalies(spent, max(spent), GRAIN) == []
    assert len(find_anomalies(spent, max(spent), 0)) == 1


def test_a_sum_is_far_above_its_peers_by_median_and_mad() -> None:
    peers = [1_000_000, 1_100_000, 900_000, 1_050_000, 950_000] * 4
    assert far_above(2_700_000, peers, GRAIN)
    assert not far_above(2_400_000, peers, GRAIN)


# -- the forecast -----------------------------------------------------------------------------


def test_a_steady_month_is_forecast_exactly() -> None:
    spent = days_of(week(14))
    today = date(2025, 3, 14)
    whole = sum(units for day, units in spent.items() if (day.year, day.month) == (2025, 3))
    so_far = {day: units for day, units in spent.items() if day <= today}
    forecast = forecast_month(so_far, today)
    assert forecast is not None
    assert forecast.expected_units == forecast.low_units == forecast.high_units == whole
    assert forecast.days == 42


def test_a_forecast_needs_two_weeks() -> None:
    assert forecast_month(days_of(week(1)), FIRST + timedelta(days=7)) is None
    assert forecast_month({}, FIRST) is None


def test_on_the_last_day_only_what_is_left_of_the_day_is_open() -> None:
    spent = days_of(week(14))
    today = date(2025, 3, 31)
    so_far = {day: units for day, units in spent.items() if day < today}
    forecast = forecast_month(so_far, today)
    march = sum(units for day, units in so_far.items() if day.month == 3)
    assert forecast is not None
    assert march < forecast.expected_units <= march + 1_000_000


@pytest.mark.parametrize(
    ("day", "left"), [(date(2025, 2, 28), 0), (date(2024, 2, 28), 1), (date(2025, 12, 1), 30)]
)
def test_the_days_left_of_a_month(day: date, left: int) -> None:
    assert days_left(day) == left


def test_the_interval_holds_the_month_about_nine_times_in_ten() -> None:
    """40 noisy years with weekdays, asked on the 5th, 12th, 19th and 26th of ten months each."""
    held = asked = 0
    for seed in range(40):
        chance = np.random.default_rng(seed)
        level = np.where(np.arange(365) % 7 >= 5, 0.4, 1.0) * np.exp(chance.normal(0, 0.25, 365))
        spent = days_of((level * 1_000_000).astype(int).tolist(), date(2025, 1, 6))
        for month in range(3, 13):
            whole = sum(units for day, units in spent.items() if day.month == month)
            for number in (5, 12, 19, 26):
                today = date(2025, month, number)
                known = {day: units for day, units in spent.items() if day <= today}
                forecast = forecast_month(known, today)
                assert forecast is not None
                asked += 1
                held += forecast.low_units <= whole <= forecast.high_units
    assert 0.85 <= held / asked <= 0.97, f"{held} of {asked}"

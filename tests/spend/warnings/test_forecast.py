"""What a month will come to, and how certain that is."""

from __future__ import annotations

from datetime import date, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.account_years import HELD_OUT_KINDS, TUNED_KINDS, simulate
from krea_dagster.spend.warnings.forecast import Forecast, days_left, forecast_usual
from tests.spend.warnings.test_anomaly import FIRST, GRAIN, day, days_of, week

#: Years that neither the method nor its constants were chosen with.
FRESH_SEEDS = range(900, 904)


def forecast(spent: dict[date, int], today: date) -> Forecast:
    """The forecast of an account with enough days, which knows nothing after today."""
    found = forecast_usual({one: spent[one] for one in spent if one <= today}, today, GRAIN)
    assert found is not None
    return found


def month_of(spent: dict[date, int], month: int) -> int:
    return sum(units for one, units in spent.items() if one.month == month)


@given(pattern=st.lists(st.integers(0, 10**8), min_size=7, max_size=7).filter(any))
def test_an_account_that_is_the_same_each_week_is_forecast_exactly(pattern: list[int]) -> None:
    spent = days_of(pattern * 20)
    for today in (date(2025, 4, 1), date(2025, 4, 14), date(2025, 4, 30)):
        found = forecast(spent, today)
        assert found.expected_units == pytest.approx(month_of(spent, 4), abs=1)
        assert found.low_units <= found.expected_units <= found.high_units


def test_a_forecast_needs_two_weeks() -> None:
    spent = days_of(week(2))
    assert forecast_usual(spent, day(13), GRAIN) is None
    assert forecast_usual(spent, day(14), GRAIN) is not None
    assert forecast_usual({}, FIRST, GRAIN) is None


def test_with_few_days_the_interval_is_wide() -> None:
    spent = days_of(week(60))
    young, old = forecast(spent, date(2025, 2, 6)), forecast(spent, date(2026, 2, 6))
    for found, least, most in ((young, 0.2, 1.0), (old, 0.0, 0.1)):
        width = (found.high_units - found.low_units) / found.expected_units
        assert least <= width <= most


def test_an_unusual_day_counts_once_and_is_not_expected_again() -> None:
    spent = days_of(week(20))
    runaway = spent | {date(2025, 4, 9): 30_000_000}
    before, after = (forecast(one, date(2025, 4, 14)) for one in (spent, runaway))
    assert after.expected_units - before.expected_units == pytest.approx(29_000_000, rel=0.01)
    assert after.high_units - after.low_units > before.high_units - before.low_units


def test_what_grows_steadily_is_expected_to_grow_on() -> None:
    spent = days_of([round(1_000_000 * 1.003**number) for number in range(350)])
    found = forecast(spent, date(2025, 11, 5))
    so_far = sum(spent[date(2025, 11, one)] for one in range(1, 6))
    as_before = (
        so_far + 25 * sum(spent[date(2025, 11, 5) - timedelta(days=n)] for n in range(84)) / 84
    )
    assert as_before * 1.05 < found.expected_units < month_of(spent, 11) <= found.high_units


def test_on_the_last_day_only_what_is_left_of_the_day_is_open() -> None:
    spent = days_of(week(14))
    today = date(2025, 3, 31)
    del spent[today]
    found = forecast(spent, today)
    march = month_of(spent, 3)
    assert found.low_units == march
    assert found.expected_units == march + 1_000_000 <= found.high_units


def test_the_last_week_of_december_may_have_no_spend() -> None:
    spent = days_of(week(52))
    found = forecast(spent, date(2025, 12, 18))
    until_23 = sum(units for one, units in spent.items() if one.month == 12 and one.day <= 23)
    assert found.low_units <= until_23 < found.expected_units


@pytest.mark.parametrize(
    ("today", "left"), [(date(2025, 2, 28), 0), (date(2024, 2, 28), 1), (date(2025, 12, 1), 30)]
)
def test_the_days_left_of_a_month(today: date, left: int) -> None:
    assert days_left(today) == left


@given(seed=st.integers(0, 10_000), number=st.integers(20, 330))
def test_a_forecast_is_never_less_than_what_was_spent(seed: int, number: int) -> None:
    spent = simulate("sparse", 2_000, seed).spent()
    today = min(spent) + timedelta(days=number)
    found = forecast(spent, today)
    so_far = sum(units for one, units in spent.items() if today.replace(day=1) <= one <= today)
    assert so_far <= found.low_units <= found.expected_units <= found.high_units


def test_the_interval_holds_the_month_nine_times_in_ten_in_fresh_years() -> None:
    """Of each kind four, asked on the 5th, 15th and 25th of March to December."""
    held = asked = 0
    for kind in TUNED_KINDS + HELD_OUT_KINDS:
        for seed in FRESH_SEEDS:
            spent = simulate(kind, 20_000, seed).spent()
            for month in range(3, 13):
                for number in (5, 15, 25):
                    found = forecast(spent, date(2025, month, number))
                    held += found.low_units <= month_of(spent, month) <= found.high_units
                    asked += 1
    assert 0.85 <= held / asked <= 0.95, f"{held} of {asked}"

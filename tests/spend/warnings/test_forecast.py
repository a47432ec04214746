"""What a month will come to."""

from __future__ import annotations

from datetime import date, timedelta

import numpy as np
import pytest

from krea_dagster.spend.warnings.forecast import days_left, forecast_month
from tests.spend.warnings.test_anomaly import FIRST, days_of, week


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
        spent = days_of((level * 1_000_000).astype(int).tolist())
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

"""The forecast of a month's spend, and its interval. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from math import sqrt
from typing import Final

from krea_dagster.spend.warnings.anomaly import find_unusual_days

FORECAST_DAYS: Final = 42
FORECAST_LEAST_DAYS: Final = 14
_T_90: Final = 1.7


@dataclass(frozen=True)
class Forecast:
    """The expected spend of a month, in units, and its 90 % interval.

    ``days`` is the number of days that it was made from.
    """

    expected_units: int
    low_units: int
    high_units: int
    days: int


def forecast_usual(spent: Mapping[date, int], today: date, grain_units: int) -> Forecast | None:
    """Forecast the spend of the month from its usual days: the one forecast of all surfaces."""
    unusual = find_unusual_days(spent, today, grain_units)
    odd = {day for one in unusual if not one.is_settled for day in one.usual}
    return forecast_month(spent, today, frozenset(odd))


def forecast_month(
    spent: Mapping[date, int], today: date, leave_out: frozenset[date] = frozenset()
) -> Forecast | None:
    """Forecast the spend of the UTC month of ``today``; None with too few days.

    It is the spend so far, and for each day left the mean of its weekday over the last six weeks,
    without today and the days to leave out. The interval is from the deviations of those days from
    their means: those of the days left, and those of the means themselves.
    """
    if not spent:
        return None
    first = max(min(spent), today - timedelta(days=FORECAST_DAYS))
    learnt = [
        day
        for number in range((today - first).days)
        if (day := first + timedelta(days=number)) not in leave_out
    ]
    if len(learnt) < FORECAST_LEAST_DAYS:
        return None
    by_weekday: dict[int, list[int]] = {}
    for day in learnt:
        by_weekday.setdefault(day.weekday(), []).append(spent.get(day, 0))
    overall = sum(sum(values) for values in by_weekday.values()) / len(learnt)
    means = {name: sum(values) / len(values) for name, values in by_weekday.items()}
    squares = sum((spent.get(day, 0) - means[day.weekday()]) ** 2 for day in learnt)
    variance = squares / max(1, len(learnt) - len(means))

    start = today.replace(day=1)
    so_far = sum(units for day, units in spent.items() if start <= day <= today)
    left = [today + timedelta(days=number) for number in range(1, days_left(today) + 1)]
    rest = sum(means.get(day.weekday(), overall) for day in left)
    # For the rest of today, the difference to its mean; nothing where the mean is passed.
    rest += max(0.0, means.get(today.weekday(), overall) - spent.get(today, 0))
    days = [today, *left]
    of_means = 0.0
    for name, values in by_weekday.items():
        count = sum(day.weekday() == name for day in days)
        of_means += count**2 * variance / len(values)
    reach = _T_90 * sqrt(len(days) * variance + of_means)
    return Forecast(
        expected_units=so_far + round(rest),
        low_units=so_far + max(0, round(rest - reach)),
        high_units=so_far + round(rest + reach),
        days=len(learnt),
    )


def days_left(today: date) -> int:
    """Return the number of days of the month after today."""
    after = (today.replace(day=28) + timedelta(days=4)).replace(day=1)
    return (after - today).days - 1

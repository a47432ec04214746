"""The forecast of a month's spend: the one forecast of all surfaces. Pure.

The interval comes from a backtest: how far the same method was wrong on each day of the last half
year of this account, over as many days as are left of the month.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from math import exp, sqrt
from typing import Final

import numpy as np
import numpy.typing as npt

from krea_dagster.spend.warnings.anomaly import RECORD_DAYS, WINDOW_DAYS, find_unusual_days

#: Days since the first purchase that a forecast needs.
LEAST_DAYS: Final = 14
#: The exponent of the last week's ratio to its usual spend: how much of the difference stays.
_STAYS: Final = 0.3
#: The standard deviation that is assumed of the errors; each error that was seen makes it count
#: less.
_ASSUMED: Final = 0.15
#: Errors that do not overlap depend on each other too: this many say as much as one alone.
_DEPENDENT: Final = 1.3

_Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Forecast:
    """The expected spend of a month, or until another day, in units, and its 90 % interval.

    ``days`` is the number of days that it was made from.
    """

    expected_units: int
    low_units: int
    high_units: int
    days: int


def forecast_usual(spent: Mapping[date, int], today: date, grain_units: int) -> Forecast | None:
    """Forecast the spend of the UTC month of ``today``; None with too few days."""
    found = forecast_days(spent, today, grain_units, [days_left(today)])
    return found[0] if found else None


def forecast_days(
    spent: Mapping[date, int], today: date, grain_units: int, ahead: Sequence[int]
) -> list[Forecast]:
    """Forecast the spend from the month's first day until each number of days after ``today``.

    It is the spend so far, and for each day left the mean of its weekday over twelve weeks, with a
    part of the last week's difference from them, and of the trend. Unusual days count as usual
    ones; of today what it lacks of its mean is still expected. Empty with too few days.
    """
    first = min(spent, default=today)
    count = (today - first).days
    if count < LEAST_DAYS:
        return []
    before = {day: units for day, units in spent.items() if day < today}
    usual = dict(before)
    for anomaly in find_unusual_days(before, today, grain_units):
        usual |= {} if anomaly.is_settled else anomaly.usual
    days = [first + timedelta(days=number) for number in range(count)]
    units, real = (
        np.array([spend.get(day, 0) for day in days], float) for spend in (usual, before)
    )
    usual_days = _UsualDays.of(units, first.weekday(), max(ahead, default=0))
    of_today = usual_days.expected(1, skipped=0)[-1]
    rest_of_today = max(0.0, of_today - spent.get(today, 0))
    so_far = sum(units for day, units in spent.items() if today.replace(day=1) <= day <= today)
    found = []
    for left in ahead:
        certain = left - _pause_days(today, left)
        expected, surely = (usual_days.expected(days)[-1] for days in (left, certain))
        low, middle, high = _limits(usual_days, real, max(left, 1), grain_units)
        found.append(
            Forecast(
                expected_units=so_far + round(expected * middle + rest_of_today),
                low_units=so_far + round(surely * low),
                high_units=so_far + round(expected * high + rest_of_today * max(1.0, high)),
                days=min(count, WINDOW_DAYS),
            )
        )
    return found


def _pause_days(today: date, left: int) -> int:
    """Return how many of the days after today are at the end of a year.

    Many accounts pause then, and the first time no earlier day says so.
    """
    end = today + timedelta(days=left)
    return sum(
        max(0, (min(end, date(year, 12, 31)) - max(today, date(year, 12, 23))).days)
        for year in range(today.year, end.year + 1)
    )


def days_left(today: date) -> int:
    """Return the number of days of the month after today."""
    after = (today.replace(day=28) + timedelta(days=4)).replace(day=1)
    return (after - today).days - 1


@dataclass(frozen=True)
class _UsualDays:
    """What is usual, seen from each day: ``means`` by weekday, and the last week's ``level``.

    ``counts`` is how many of each weekday there are until each day, and until later ones.
    """

    units: _Array
    means: _Array
    level: _Array
    counts: npt.NDArray[np.int64]

    @classmethod
    def of(cls, units: _Array, weekday: int, most_days: int) -> _UsualDays:
        """Return them for days from a ``weekday`` on, and for at most ``most_days`` after each."""
        count = len(units)
        of_day = (np.arange(count + 1 + max(most_days, 1)) + weekday) % 7 == np.arange(7)[:, None]
        sums = np.cumsum(of_day[:, :count] * units, axis=1)
        counts = np.cumsum(of_day, axis=1)
        seen = counts[:, :count].astype(float)
        sums[:, WINDOW_DAYS:] -= sums[:, :-WINDOW_DAYS].copy()
        seen[:, WINDOW_DAYS:] -= seen[:, :-WINDOW_DAYS].copy()
        means = np.divide(sums, seen, out=np.zeros_like(sums), where=seen > 0)
        week = np.convolve(units, np.ones(7))[:count]
        usual = means.sum(axis=0)
        level = np.divide(week, usual, out=np.ones(count), where=usual > 0).clip(0.2, 5) ** _STAYS
        return cls(units, means, level, counts)

    def expected(self, days: int, skipped: int = 1) -> _Array:
        """Return for each day what was to be expected then of the ``days`` after it.

        The first ``skipped`` days after each are left out.
        """
        count, end = len(self.units), skipped + days
        ahead = self.counts[:, end : end + count] - self.counts[:, skipped : skipped + count]
        return np.asarray((self.means * ahead).sum(axis=0) * self.level)


def _limits(
    usual_days: _UsualDays, real: _Array, days: int, grain_units: int
) -> tuple[float, float, float]:
    """Return by what to multiply the expected spend of ``days``: low, middle and high.

    ``real`` has the unusual days as they were: they may happen again.
    """
    expected = usual_days.expected(days)
    total = np.cumsum(np.append(0.0, real))
    actual = total[days + 2 :] - total[2:-days]  # of those that began at least days + 1 ago
    last = usual_days.units[-WINDOW_DAYS:]
    # Where many days have no purchases, chance decides on days, not on single purchases.
    grain = max(grain_units, np.mean(last == 0) * np.sum(last**2) / max(np.sum(last), 1))
    errors = np.log((actual + grain) / (expected[: len(actual)] + grain))
    errors = errors[max(LEAST_DAYS, len(errors) - RECORD_DAYS) :]
    times = len(errors) / days  # those that do not overlap
    trend = _trend(errors, times)
    squares = np.sum((errors - trend) ** 2) / days
    assumed = 1 / (1 + times)
    chance = grain / max(expected[-1], grain)
    variance = (squares + (_ASSUMED**2 + chance) * assumed) / (times + assumed)
    reach = _student_95(max(times / _DEPENDENT, 2)) * sqrt(variance)
    share = grain / max(expected[-1], 1)
    low, middle, high = (
        max(0.0, (1 + share) * exp(trend + step) - share) for step in (-reach, 0.0, reach)
    )
    return low, middle, high


def _trend(errors: _Array, times: float) -> float:
    """Return the mean error of a spend that grows or falls; less, the more it may be chance."""
    if not len(errors) or not errors.any():
        return 0.0
    mean = float(errors.mean())
    noise = float(errors.var()) / max(times, 0.5)
    return mean * max(0.0, 1 - noise / mean**2) * times / (times + 4)


def _student_95(freedom: float) -> float:
    """Return the 95 % quantile of Student's t, by its expansion from that of the normal one."""
    z = 1.645
    return z + (z**3 + z) / (4 * freedom) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)

"""The statistics under the warnings: unusual days, and a forecast of the month. Pure.

The usual spend of a day is the median of its weekday in the eight weeks before, its spread the
median absolute deviation (MAD) from those medians. A few outliers do not move either.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from math import sqrt
from statistics import median
from typing import Final

from krea_dagster.models import UNITS_PER_CREDIT

#: The days before a day that it is compared with: eight of each weekday.
WINDOW_DAYS: Final = 56
#: Days since the first purchase before any day can be unusual.
LEARNING_DAYS: Final = 28
#: Days with purchases that are needed where most days have none.
LEAST_ACTIVE: Final = 6
#: Earlier partitions that are needed to compare one that lives for a few days only.
LEAST_PEERS: Final = 14
#: A value is unusual above this many standard deviations (1.4826 MAD) over the usual value, this
#: many times the usual value, and this many times the highest usual one.
FAR_DEVIATIONS: Final = 6.0
FAR_TIMES: Final = 2.5
FAR_OVER_HIGHEST: Final = 1.25
#: Days after which an unusual value has become the usual one.
SETTLED_DAYS: Final = 7

#: 1.4826 MAD estimates the standard deviation of a normal distribution.
_MAD_TO_SIGMA: Final = 1.4826

#: Excess of an unusual day or partition from which it is a warning: one credit.
LEAST_EXCESS_UNITS: Final = UNITS_PER_CREDIT

#: Most and fewest days that a forecast is made from, and the quantile of its interval (Student's t
#: with about 30 degrees of freedom, 5 % on either side).
FORECAST_DAYS: Final = 42
FORECAST_LEAST_DAYS: Final = 14
_T_90: Final = 1.7


@dataclass(frozen=True)
class Anomaly:
    """Consecutive unusual days: the spend and the expected spend, in units."""

    since: date
    until: date
    units: int
    expected_units: int

    @property
    def excess_units(self) -> int:
        """The spend beyond the expected one."""
        return self.units - self.expected_units


@dataclass(frozen=True)
class Forecast:
    """The expected spend of a month, in units, and its 90 % interval.

    ``days`` is the number of days that it was made from.
    """

    expected_units: int
    low_units: int
    high_units: int
    days: int


def find_anomalies(spent: Mapping[date, int], last: date, grain_units: int = 0) -> list[Anomaly]:
    """Find the days up to ``last`` that cost far more than usual; consecutive days are one anomaly.

    ``spent`` is in units by day; a day without an entry cost nothing. Each day is compared only
    with the days before it, without unusual ones, unless these lasted for more than a week: then
    they are the new usual. ``grain_units`` is the price of one purchase: with few purchases, chance
    alone makes a day expensive.
    """
    if not spent:
        return []
    active = sorted(day for day, units in spent.items() if units > 0)
    found: list[Anomaly] = []
    odd: set[date] = set()
    habit_from = min(spent)
    for day in active:
        units = spent[day]
        if day > last:
            break
        if (day - habit_from).days < LEARNING_DAYS:
            continue
        since = max(habit_from, day - timedelta(days=WINDOW_DAYS))
        before = active[bisect_left(active, since) : bisect_right(active, day) - 1]
        usual = [other for other in before if other not in odd]
        expected = _expected(day, since, usual, spent=spent, odd=odd, grain_units=grain_units)
        if expected is None:
            continue
        odd.add(day)
        open_one = found[-1] if found else None
        if open_one is not None and (day - open_one.until).days <= 1:
            found[-1] = Anomaly(
                open_one.since, day, open_one.units + units, open_one.expected_units + expected
            )
            if (day - open_one.since).days >= SETTLED_DAYS:
                habit_from = open_one.since
                odd.clear()
        else:
            found.append(Anomaly(day, day, units, expected))
    return found


def find_unusual_days(spent: Mapping[date, int], last: date, grain_units: int) -> list[Anomaly]:
    """Find the anomalies of whole days that are worth a warning; see ``find_anomalies``."""
    found = find_anomalies(spent, last, grain_units)
    return [anomaly for anomaly in found if anomaly.excess_units >= LEAST_EXCESS_UNITS]


def far_above(units: int, usual: Sequence[int], grain_units: int = 0) -> bool:
    """Return whether a sum is far above comparable sums, by their median and MAD."""
    middle = median(usual)
    spread = median(abs(value - middle) for value in usual)
    chance = sqrt(max(middle, sum(usual) / len(usual)) * grain_units)
    return _is_far(units, middle, spread, max(usual), chance)


def anomalous_days(found: Sequence[Anomaly]) -> frozenset[date]:
    """Return the days of short anomalies, which do not predict later days."""
    return frozenset(
        anomaly.since + timedelta(days=number)
        for anomaly in found
        if (anomaly.until - anomaly.since).days < SETTLED_DAYS
        for number in range((anomaly.until - anomaly.since).days + 1)
    )


def forecast_usual(spent: Mapping[date, int], today: date, grain_units: int) -> Forecast | None:
    """Forecast the spend of the month from its usual days: the one forecast of all surfaces."""
    unusual = find_unusual_days(spent, today, grain_units)
    return forecast_month(spent, today, anomalous_days(unusual))


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


def _expected(
    day: date,
    since: date,
    usual: Sequence[date],
    *,
    spent: Mapping[date, int],
    odd: set[date],
    grain_units: int,
) -> int | None:
    """Return the expected spend of an unusual day; None for a usual one."""
    if len(usual) < LEAST_ACTIVE:
        return None
    units = spent[day]
    highest = max(spent[other] for other in usual)
    if units <= FAR_OVER_HIGHEST * highest:  # most days: the rest need not be computed
        return None
    window = [since + timedelta(days=number) for number in range((day - since).days)]
    window = [other for other in window if other not in odd]
    if len(usual) * 2 < len(window):
        # Most days have no purchases: the weekday matters little, and the others are compared.
        values = [spent[other] for other in usual]
        middle = median(values)
        spread = median(abs(value - middle) for value in values)
        mean = sum(values) / len(values)
    else:
        by_weekday: dict[int, list[int]] = {}
        for other in window:
            by_weekday.setdefault(other.weekday(), []).append(spent.get(other, 0))
        medians = {name: median(values) for name, values in by_weekday.items()}
        spread = median(abs(spent.get(other, 0) - medians[other.weekday()]) for other in window)
        middle = medians.get(day.weekday(), median(medians.values()))
        mean = sum(spent.get(other, 0) for other in window) / len(window)
    chance = sqrt(max(middle, mean) * grain_units)
    return round(middle) if _is_far(units, middle, spread, highest, chance) else None


def _is_far(value: float, middle: float, mad: float, highest: float, chance: float) -> bool:
    # Random purchases deviate by the root of their number, even where the MAD is smaller.
    deviation = max(_MAD_TO_SIGMA * mad, chance)
    return (
        value > middle + FAR_DEVIATIONS * deviation
        and value > FAR_TIMES * middle
        and value > FAR_OVER_HIGHEST * highest
    )

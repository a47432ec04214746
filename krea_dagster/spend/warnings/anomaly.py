"""The robust statistics under the warnings: what is far out of its habit, and a forecast. Pure.

Habit is the median of the same weekday in the eight weeks before, its spread the median absolute
deviation (MAD) from those medians. Both bear a few odd days without being moved by them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from math import sqrt
from statistics import median
from typing import Final

#: The days before a day that make its habit: eight of each weekday.
WINDOW_DAYS: Final = 56
#: Days since the first purchase before anything is called a habit.
LEARNING_DAYS: Final = 28
#: Days with purchases that make a habit where most days have none.
LEAST_ACTIVE: Final = 6
#: Partitions that make a habit for one that lives for a few days only.
LEAST_PEERS: Final = 14
#: How many standard deviations (1.4826 MAD) above its habit a value is far out of it, how many
#: times the habit, and how many times the highest that is part of the habit.
FAR_DEVIATIONS: Final = 6.0
FAR_TIMES: Final = 2.5
FAR_OVER_HIGHEST: Final = 1.25
#: A value that stays out of its habit for more days than this is the new habit.
SETTLED_DAYS: Final = 7

#: 1.4826 MAD estimates the standard deviation of a normal distribution.
_MAD_TO_SIGMA: Final = 1.4826

#: Days that a forecast learns from, the least of them, and the quantile of its interval
#: (Student's t with 30 degrees of freedom or so, 5 % on either side).
FORECAST_DAYS: Final = 42
FORECAST_LEAST_DAYS: Final = 14
_T_90: Final = 1.7


@dataclass(frozen=True)
class Anomaly:
    """Days in a row that were out of habit: what was spent and what was expected, in units."""

    since: date
    until: date
    units: int
    expected_units: int

    @property
    def excess_units(self) -> int:
        """What was spent beyond the habit."""
        return self.units - self.expected_units


@dataclass(frozen=True)
class Forecast:
    """What a month will have come to, in units; ``low`` to ``high`` holds it nine times in ten.

    ``days`` is how many days it was learnt from.
    """

    expected_units: int
    low_units: int
    high_units: int
    days: int


def find_anomalies(spent: Mapping[date, int], last: date, grain_units: int = 0) -> list[Anomaly]:
    """Find the days up to ``last`` that cost far more than their habit, days in a row together.

    ``spent`` is in units by day; a day without an entry cost nothing. Each day is held against
    the days before it only, and those that were out of habit are no part of it, unless they
    stayed so for more than a week: from then on they are the habit. ``grain_units`` is the price
    of one purchase: of few purchases, chance alone makes a day dear.
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
        usual = [one for one in before if one not in odd]
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


def far_above(units: int, usual: Sequence[int], grain_units: int = 0) -> bool:
    """Whether a sum is far above sums that are alike: by their median and MAD."""
    middle = median(usual)
    spread = median(abs(one - middle) for one in usual)
    chance = sqrt(max(middle, sum(usual) / len(usual)) * grain_units)
    return _is_far(units, middle, spread, max(usual), chance)


def anomalous_days(found: Sequence[Anomaly]) -> frozenset[date]:
    """The days of short find_anomalies, which say nothing about the days to come."""
    return frozenset(
        one.since + timedelta(days=number)
        for one in found
        if (one.until - one.since).days < SETTLED_DAYS
        for number in range((one.until - one.since).days + 1)
    )


def forecast_month(
    spent: Mapping[date, int], today: date, leave_out: frozenset[date] = frozenset()
) -> Forecast | None:
    """Forecast what the UTC month of ``today`` will have come to; None with too few days.

    What is spent already, and for each day left the mean of its weekday over the last six weeks
    without today and the days to leave out. The interval comes from the spread of those days
    about their means: that of the days left, and that of the means themselves.
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
    # Of today the rest is expected, as if its hours were alike: none of it where it is passed.
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
    """How many days of the month come after today."""
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
    """What a day was expected to cost; None where it is within its habit, or has none yet."""
    if len(usual) < LEAST_ACTIVE:
        return None
    units = spent[day]
    highest = max(spent[one] for one in usual)
    if units <= FAR_OVER_HIGHEST * highest:  # what most days are, and nothing else is reckoned
        return None
    window = [since + timedelta(days=number) for number in range((day - since).days)]
    window = [one for one in window if one not in odd]
    if len(usual) * 2 < len(window):
        # Most days have no purchases, so that weekdays say little: those that have are alike.
        values = [spent[one] for one in usual]
        middle = median(values)
        spread = median(abs(one - middle) for one in values)
        mean = sum(values) / len(values)
    else:
        by_weekday: dict[int, list[int]] = {}
        for one in window:
            by_weekday.setdefault(one.weekday(), []).append(spent.get(one, 0))
        medians = {name: median(values) for name, values in by_weekday.items()}
        spread = median(abs(spent.get(one, 0) - medians[one.weekday()]) for one in window)
        middle = medians.get(day.weekday(), median(medians.values()))
        mean = sum(spent.get(one, 0) for one in window) / len(window)
    chance = sqrt(max(middle, mean) * grain_units)
    return round(middle) if _is_far(units, middle, spread, highest, chance) else None


def _is_far(value: float, middle: float, mad: float, highest: float, chance: float) -> bool:
    # Purchases that come by chance spread by the root of their number, whatever the MAD says.
    deviation = max(_MAD_TO_SIGMA * mad, chance)
    return (
        value > middle + FAR_DEVIATIONS * deviation
        and value > FAR_TIMES * middle
        and value > FAR_OVER_HIGHEST * highest
    )

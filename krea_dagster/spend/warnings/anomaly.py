"""The statistics under the warnings: unusual days and partitions, stops, new levels. Pure.

Each finding has a surprise: how many standard deviations it is from what the twelve weeks before it
make likely. One threshold decides all. A finding depends only on the days before it.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import date, timedelta
from itertools import pairwise
from math import log, sqrt
from statistics import fmean, median
from typing import Final

from krea_dagster.models import UNITS_PER_CREDIT

#: Default surprise above which there is a warning. docs/explanation/spend-warnings.md says what
#: other values find, and how often they warn without cause.
THRESHOLD: Final = 4.0
#: The days before a day that it is compared with: twelve of each weekday.
WINDOW_DAYS: Final = 84
#: An unusual day costs more than every usual one of these days.
RECORD_DAYS: Final = 180
#: Days since the first purchase before any day can be unusual.
LEARNING_DAYS: Final = 28
#: Days with purchases that are needed where most days have none.
LEAST_ACTIVE: Final = 6
#: Earlier partitions that are needed to compare one that lives for a few days only.
LEAST_PEERS: Final = 14
#: Unusual days at most this far apart are one anomaly. Once most days of a longer time are unusual,
#: or it has lasted four weeks, they have become the usual ones.
SETTLED_DAYS: Final = 7
#: Days whose sum shows a new level, and days since the first purchase before it is looked for.
LEVEL_DAYS: Final = 14
LEVEL_LEARNING_DAYS: Final = 112
#: Excess of an unusual day or partition from which it is a warning: one credit.
LEAST_EXCESS_UNITS: Final = UNITS_PER_CREDIT

#: The least variance of the logarithm of a day's spend, and of that of LEVEL_DAYS.
_DAY_VARIANCE: Final = 0.02
_LEVEL_VARIANCE: Final = 0.004
#: What LEVEL_DAYS are assumed to deviate by as long as few were seen: 10 %, as if seen four times.
_ASSUMED: Final = (0.1**2, 4)
#: At most this share of days is taken to have purchases: any day may be a holiday.
_MOST_ACTIVE: Final = 0.8
_DAY: Final = timedelta(days=1)


@dataclass(frozen=True)
class Anomaly:
    """Unusual spend, in units, and the usual one of each of its days.

    ``is_settled`` says that it has lasted, and has become the usual spend.
    """

    units: int
    usual: Mapping[date, int]
    is_settled: bool = False

    @property
    def since(self) -> date:
        """The first day."""
        return min(self.usual)

    @property
    def until(self) -> date:
        """The last day."""
        return max(self.usual)

    @property
    def usual_units(self) -> int:
        """The usual spend of its days."""
        return sum(self.usual.values())

    @property
    def excess_units(self) -> int:
        """The spend beyond the usual one; negative where it is less."""
        return self.units - self.usual_units


@dataclass(frozen=True)
class Usual:
    """The expected units, and their spread: the deviation of a logarithm, exceeded by one third."""

    units: float
    spread: float

    def surprise(self, units: float, grain_units: float, least: float = _DAY_VARIANCE) -> float:
        """Return how many standard deviations a sum is above the expected one; negative: below it.

        It is the signed root of the deviance of a negative binomial distribution, whose variance
        is that of the spread (``least`` at least) and that of purchases of ``grain_units``: with
        few purchases, chance alone makes a day expensive.
        """
        count, mean = units / grain_units, max(self.units / grain_units, 0.001)
        size = 1 / max(self.spread**2 - 1 / max(mean, 0.3), least)
        deviance = (count + size) * log((mean + size) / (count + size))
        deviance += count * log(count / mean) if count else 0
        return sqrt(max(0.0, 2 * deviance)) * (1 if count > mean else -1)


def find_unusual_days(
    spent: Mapping[date, int],
    last: date,
    grain_units: int,
    threshold: float = THRESHOLD,
    others: Mapping[date, int] | None = None,
) -> list[Anomaly]:
    """Find the days up to ``last`` that cost far more than usual, and more than any usual one.

    Args:
        spent: Units by day; a day without an entry cost nothing.
        last: The last day that is looked at.
        grain_units: The price of one purchase.
        threshold: The surprise above which a day is unusual.
        others: Units by day of all other partitions, if ``spent`` is that of one. Where they cost
            more than usual, more is expected of this one.
    """
    active = sorted(day for day, units in spent.items() if units > 0 and day <= last)
    found: list[Anomaly] = []
    odd: set[date] = set()
    habit_from = active[0] if active else last
    records: deque[date] = deque()  # usual days that cost more than each later usual one
    for day in active:
        units = spent[day]
        while records and records[0] < max(habit_from, day - RECORD_DAYS * _DAY):
            records.popleft()
        is_record = not records or units > spent[records[0]]
        if is_record and (day - habit_from).days >= LEARNING_DAYS:
            since = max(habit_from, day - WINDOW_DAYS * _DAY)
            usual = usual_of(spent, since, day, odd, grain_units)
            theirs = usual_of(others, since, day, odd, grain_units) if others else None
            if usual and others and theirs and theirs.units:
                times = max(1.0, others.get(day, 0) / theirs.units)
                usual = replace(usual, units=usual.units * times)
            if usual and usual.surprise(units, grain_units) > threshold:
                _append(found, Anomaly(units, {day: round(usual.units)}))
                odd.add(day)
                if found[-1].is_settled:
                    habit_from = found[-1].since
                    odd.clear()
                continue
        while records and spent[records[-1]] <= units:
            records.pop()
        records.append(day)
    return [anomaly for anomaly in found if anomaly.excess_units >= LEAST_EXCESS_UNITS]


def usual_of(
    spent: Mapping[date, int], since: date, day: date, odd: Collection[date], grain_units: int
) -> Usual | None:
    """Return the usual spend of a day by the days from ``since`` on, without the odd ones.

    It is the median of its weekday, or the mean, if the median is nothing. Where most days have no
    purchases, it is the median of the others, because the weekday matters little. None with too few
    days.
    """
    window = [
        one for number in range((day - since).days) if (one := since + number * _DAY) not in odd
    ]
    near = [one for one in window if spent.get(one, 0) > 0]
    if len(near) < LEAST_ACTIVE:
        return None
    is_sparse = len(near) * 2 < len(window)
    values: dict[int, list[int]] = {}
    for one in near if is_sparse else window:
        values.setdefault(0 if is_sparse else one.weekday(), []).append(spent.get(one, 0))
    medians = {name: median(numbers) for name, numbers in values.items()}
    deviations = [
        log((value + grain_units) / (medians[name] + grain_units))
        for name, numbers in values.items()
        for value in numbers
    ]
    name = 0 if is_sparse else day.weekday()
    middle = medians.get(name, median(medians.values()))
    # A weekday that has purchases in fewer than half of the weeks has some nevertheless.
    return Usual(middle or fmean(values.get(name, [0])), _spread(deviations))


def usual_of_peers(peers: Sequence[int], grain_units: int) -> Usual | None:
    """Return the usual cost of a partition that lives for a few days; None with too few others."""
    peers = peers[-WINDOW_DAYS:]
    if len(peers) < LEAST_PEERS:
        return None
    middle = median(peers)
    spread = _spread([log((units + grain_units) / (middle + grain_units)) for units in peers])
    return Usual(middle, spread)


def _spread(deviations: Sequence[float]) -> float:
    """Return what two thirds of the deviations do not exceed, as one standard deviation would."""
    return sorted(map(abs, deviations))[int(0.683 * len(deviations))]


def _append(found: list[Anomaly], new: Anomaly) -> None:
    """Append an unusual day, or extend the last anomaly to it."""
    before = found[-1] if found else None
    if before is None or before.is_settled or (new.since - before.until).days > SETTLED_DAYS:
        found.append(new)
        return
    usual = {**before.usual, **new.usual}
    span = (new.until - before.since).days + 1
    settled = span > 4 * SETTLED_DAYS or (span > SETTLED_DAYS and len(usual) * 2 > span)
    found[-1] = Anomaly(before.units + new.units, usual, settled)


def find_stops(
    spent: Mapping[date, int], last: date, threshold: float = THRESHOLD
) -> list[Anomaly]:
    """Find the times up to ``last`` without purchases, where an account buys on most days.

    Each is longer than all of the half year before it, and no chance, by the share of days that
    have purchases, of each weekday.
    """
    active = sorted(day for day, units in spent.items() if units > 0 and day <= last)
    found = []
    gaps: deque[tuple[date, int]] = deque()
    # The last day is not over: a purchase may still come.
    for before, after in pairwise([*active, last] if active else []):
        length = (after - before).days - 1
        while gaps and (before - gaps[0][0]).days > RECORD_DAYS:
            gaps.popleft()
        is_record = length > max((gap for _, gap in gaps), default=0)
        gaps.append((before, length))
        if not is_record or (before - active[0]).days < LEARNING_DAYS:
            continue
        since = max(active[0], before - (WINDOW_DAYS - 1) * _DAY)
        near = active[bisect_left(active, since) : bisect_right(active, before)]
        missing = [before + number * _DAY for number in range(1, length + 1)]
        if _gap_surprise(near, since, before, missing) > threshold:
            mean = sum(spent[day] for day in near) / ((before - since).days + 1)
            found.append(Anomaly(0, dict.fromkeys(missing, round(mean))))
    return [stop for stop in found if -stop.excess_units >= LEAST_EXCESS_UNITS]


def _gap_surprise(
    active: Sequence[date], since: date, until: date, missing: Sequence[date]
) -> float:
    """Return the surprise that there was no purchase on the missing days."""
    bought, days = [0] * 7, [0] * 7
    for number in range((until - since).days + 1):
        days[(since + number * _DAY).weekday()] += 1
    for day in active:
        bought[day.weekday()] += 1
    shares = [
        min(_MOST_ACTIVE, part / whole if whole else 0.0)
        for part, whole in zip(bought, days, strict=True)
    ]
    return sqrt(-2 * sum(log(1 - shares[day.weekday()]) for day in missing))


def find_new_levels(
    spent: Mapping[date, int],
    last: date,
    grain_units: int,
    threshold: float = THRESHOLD,
    known: Sequence[Anomaly] = (),
) -> list[Anomaly]:
    """Find the first two weeks, up to ``last``, of each time with another level of spend.

    They cost far more, or less, than the twelve weeks before them, compared with how much two weeks
    have deviated so far, and more (less) than all of these. ``known`` are unusual days and stops:
    usual days are put in their place, and a level that they show is not found again.
    """
    first = min(spent, default=last)
    seen_days = {day: units for day, units in spent.items() if day <= last}
    for one in known:
        seen_days |= one.usual
    days = [seen_days.get(first + number * _DAY, 0) for number in range((last - first).days)]
    settled = {day for one in known if one.is_settled for day in one.usual}
    past: list[float] = []
    found: list[Anomaly] = []
    quiet_until = 0
    for end in range(WINDOW_DAYS, len(days) + 1):
        now = days[end - LEVEL_DAYS : end]
        before = days[max(0, end - LEVEL_DAYS - WINDOW_DAYS) : end - LEVEL_DAYS]
        seen = past[-RECORD_DAYS : 1 - LEVEL_DAYS]
        usual, grain = _usual_level(before, seen, grain_units)
        ratio = log((sum(now) + grain) / (usual.units + grain))
        past.append(ratio)
        if end <= LEVEL_LEARNING_DAYS or (seen and min(seen) <= ratio <= max(seen)):
            continue
        if abs(usual.surprise(sum(now), grain, _LEVEL_VARIANCE)) > threshold:
            since = first + (end - LEVEL_DAYS) * _DAY
            each = round(usual.units / LEVEL_DAYS)
            one = Anomaly(sum(now), {since + n * _DAY: each for n in range(LEVEL_DAYS)})
            if end > quiet_until and settled.isdisjoint(one.usual):
                found.append(one)
            quiet_until = end + 2 * LEVEL_DAYS
    return [one for one in found if abs(one.excess_units) >= LEAST_EXCESS_UNITS]


def _usual_level(
    before: Sequence[int], past: Sequence[float], grain_units: int
) -> tuple[Usual, float]:
    """Return what is usual of LEVEL_DAYS, and the grain: the price of a chance."""
    units = sum(before)
    variance, times = _ASSUMED
    total = variance * times + sum(ratio**2 for ratio in past) / LEVEL_DAYS
    spread = sqrt(total / (times + len(past) / LEVEL_DAYS))
    # Where many days have no purchases, chance decides on days, not on single purchases.
    empty = 1 - sum(value > 0 for value in before) / len(before)
    grain = max(grain_units, empty * sum(value**2 for value in before) / max(units, 1))
    return Usual(units * LEVEL_DAYS / len(before), spread), grain

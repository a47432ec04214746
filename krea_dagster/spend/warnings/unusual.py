"""Warnings about unusual spend: days, partitions, stops, new levels. Pure."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import date, timedelta
from statistics import median
from typing import Final

from krea_dagster.spend.text import credits_words
from krea_dagster.spend.warnings.anomaly import (
    LEAST_ACTIVE,
    LEAST_EXCESS_UNITS,
    LEVEL_DAYS,
    THRESHOLD,
    WINDOW_DAYS,
    Anomaly,
    find_new_levels,
    find_stops,
    find_unusual_days,
    usual_of_peers,
)
from krea_dagster.spend.warnings.history import SpendHistory
from krea_dagster.spend.warnings.spend_warning import SpendWarning, WarningKind, on_days

#: Excess of a partition from which it is a warning, as a share of a whole day's usual spend.
LEAST_PARTITION_SHARE: Final = 0.25
#: Most days for which a stop is a warning: what has ended is not a fault.
MOST_STOP_DAYS: Final = 28


def find_unusual(
    history: SpendHistory, today: date, threshold: float = THRESHOLD
) -> Iterator[SpendWarning]:
    """Find unusual days and partitions, stops and new levels up to today.

    ``threshold`` is how many standard deviations they are from the usual spend.
    """
    spent = history.spent(today)
    days = find_unusual_days(spent, today, history.grain_units, threshold)
    stops = find_stops(spent, today, threshold)
    known = [*days, *stops]
    levels = find_new_levels(spent, today, history.grain_units, threshold, known)
    yield from (_day(history, anomaly) for anomaly in days)
    yield from map(_stop, stops)
    yield from map(_level, levels)
    yield from _partitions(history, spent, days, threshold)


def _day(history: SpendHistory, anomaly: Anomaly) -> SpendWarning:
    return SpendWarning(
        WarningKind.DAY_OUT_OF_HABIT,
        f"{credits_words(anomaly.units)} {_days_of(anomaly)}{_times(anomaly)} the "
        f"{credits_words(anomaly.usual_units)} that are usual{_mostly(history, anomaly)}.",
        anomaly.since,
        anomaly.until,
        "`krea-dagster spend --by run_id` shows the run; a day's budget would stop it.",
        anomaly.excess_units,
    )


def _stop(stop: Anomaly) -> SpendWarning:
    days = len(stop.usual)
    return SpendWarning(
        WarningKind.STOPPED,
        f"Nothing was bought on {days} days, {on_days(stop.since, stop.until)}; "
        f"{credits_words(stop.usual_units)} are usual.",
        stop.since,
        min(stop.until, stop.since + timedelta(days=MOST_STOP_DAYS - 1)),
        "Check that the schedules run, and that the account has credits.",
        stop.usual_units,
    )


def _level(level: Anomaly) -> SpendWarning:
    advice = "`krea-dagster spend --by week` shows since when; a month's budget limits it."
    if level.excess_units < 0:
        advice = "Check that all schedules run, and that no rows are deferred."
    return SpendWarning(
        WarningKind.LEVEL_CHANGED,
        f"{credits_words(level.units)} in {LEVEL_DAYS} days, {on_days(level.since, level.until)}"
        f"{_times(level)} the {credits_words(level.usual_units)} of the "
        f"{WINDOW_DAYS // 7} weeks before.",
        level.since,
        level.until,
        advice,
        abs(level.excess_units),
    )


def _times(anomaly: Anomaly) -> str:
    usual = anomaly.usual_units
    return f", {anomaly.units / usual:.1f} times" if usual else ","


def _mostly(history: SpendHistory, anomaly: Anomaly) -> str:
    """Name the partition with most of the spend, if there is anomaly."""
    sums: dict[str, int] = defaultdict(int)
    for part in history.partitions:
        if anomaly.since <= part.day <= anomaly.until:
            sums[part.partition_key] += part.committed_units
    name, units = max(sums.items(), key=lambda item: item[1], default=("", 0))
    return (
        f"; {credits_words(units)} of it for partition {name}" if units * 2 > anomaly.units else ""
    )


def _partitions(
    history: SpendHistory, spent: Mapping[date, int], days: Sequence[Anomaly], threshold: float
) -> Iterator[SpendWarning]:
    """Find unusual partitions, except on days that are a warning as a whole.

    A partition with purchases on few days is compared with earlier ones of that kind, by their
    total cost.
    """
    by_key: dict[str, dict[date, int]] = defaultdict(dict)
    for part in history.partitions:
        if part.day in spent:
            mine = by_key[part.partition_key]
            mine[part.day] = mine.get(part.day, 0) + part.committed_units
    found: list[tuple[str, Anomaly]] = []
    short: list[tuple[date, str]] = []
    for key, mine in sorted(by_key.items()):
        if len(mine) < LEAST_ACTIVE:
            short.append((min(mine), key))
            continue
        others = {day: units - mine.get(day, 0) for day, units in spent.items()}
        odd = find_unusual_days(mine, max(mine), history.grain_units, threshold, others)
        found += [(key, anomaly) for anomaly in odd]
    peers: list[int] = []
    for _, key in sorted(short):
        units, usual = sum(by_key[key].values()), usual_of_peers(peers, history.grain_units)
        is_odd = usual and usual.surprise(units, history.grain_units) > threshold
        if usual and is_odd and units > max(peers[-WINDOW_DAYS:]):
            each = {day: round(usual.units / len(by_key[key])) for day in by_key[key]}
            found.append((key, Anomaly(units, each)))
        else:
            peers.append(units)
    known = {day for anomaly in days for day in _all_days(anomaly)}
    least_units = max(LEAST_EXCESS_UNITS, LEAST_PARTITION_SHARE * median(spent.values() or [0]))
    for key, anomaly in found:
        if anomaly.excess_units >= least_units and known.isdisjoint(_all_days(anomaly)):
            yield _partition(key, anomaly)


def _partition(key: str, anomaly: Anomaly) -> SpendWarning:
    return SpendWarning(
        WarningKind.PARTITION_OUT_OF_HABIT,
        f"Partition {key} cost {credits_words(anomaly.units)} {_days_of(anomaly)}; "
        f"{credits_words(anomaly.usual_units)} are usual.",
        anomaly.since,
        anomaly.until,
        "Check that its rows are intended; a budget for partitions would stop it.",
        anomaly.excess_units,
        key,
    )


def _days_of(anomaly: Anomaly) -> str:
    """Return the days in words; with their number where there are usual ones between them."""
    number = len(anomaly.usual)
    span = (anomaly.until - anomaly.since).days + 1
    of = f"on {number} days " if number < span else ""
    return f"{of}{on_days(anomaly.since, anomaly.until)}"


def _all_days(anomaly: Anomaly) -> Iterator[date]:
    for number in range((anomaly.until - anomaly.since).days + 1):
        yield anomaly.since + timedelta(days=number)

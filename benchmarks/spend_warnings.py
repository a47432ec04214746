"""What the warnings about unusual spend find in simulated years, and how often without cause.

python -m benchmarks.spend_warnings [--quick] [--json] [--seeds FIRST:END]

The detector and its default threshold were chosen with other seeds, and with TUNED_KINDS only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date, datetime, time, timezone
from itertools import product
from time import monotonic
from typing import Final

import numpy as np

from benchmarks.account_years import HELD_OUT_KINDS, SIZES, TUNED_KINDS, Year, simulate
from benchmarks.harness import note_progress
from benchmarks.report import Report, finish, options_of
from krea_dagster.spend.warnings.anomaly import THRESHOLD
from krea_dagster.spend.warnings.forecast import forecast_usual
from krea_dagster.spend.warnings.history import SpendHistory
from krea_dagster.spend.warnings.spend_warning import WarningKind
from krea_dagster.spend.warnings.warnings import find_warnings

#: Seeds that nothing was chosen with.
SEEDS: Final = range(3_000, 3_006)
THRESHOLDS: Final = (3.0, 3.5, THRESHOLD, 4.5, 5.0, 6.0)
TIMES: Final = (2, 3, 5, 10)

MOST_FALSE: Final = 1.0
MOST_MISSED: Final = 0.25
MOST_OUTSIDE: Final = 0.15

#: The kinds of warnings that depend on the threshold, with their columns.
_KINDS: Final = {
    WarningKind.DAY_OUT_OF_HABIT: "days",
    WarningKind.PARTITION_OUT_OF_HABIT: "partitions",
    WarningKind.STOPPED: "stops",
    WarningKind.LEVEL_CHANGED: "levels",
}
_DAYS: Final = (WarningKind.DAY_OUT_OF_HABIT,)
_LOWER: Final = (WarningKind.STOPPED, WarningKind.LEVEL_CHANGED)

#: What is planted, by its column: the kinds of warnings that find it, and within how many days.
_PLANTED: Final[Mapping[str, tuple[Sequence[WarningKind], int]]] = {
    **{f"×{times}": (_DAYS, 0) for times in TIMES},
    "partition ×5": ((*_DAYS, WarningKind.PARTITION_OUT_OF_HABIT), 0),
    "level ×1.3": ((*_DAYS, WarningKind.LEVEL_CHANGED), 28),
    "level ×2": ((*_DAYS, WarningKind.LEVEL_CHANGED), 28),
    "level ×0.5": (_LOWER, 28),
    "stop": (_LOWER, 14),
}

#: Values of one year, by column; those of the columns of _PLANTED are whether it was found.
Values = dict[str, list[float]]


def main() -> None:
    """Run the command."""
    parser = options_of("spend_warnings")
    parser.add_argument("--seeds", help="first and end of a range, such as 0:6")
    options = parser.parse_args()
    seeds = range(*map(int, options.seeds.split(":"))) if options.seeds else SEEDS
    seeds = seeds[:1] if options.quick else seeds
    kinds = (*TUNED_KINDS, *HELD_OUT_KINDS)
    began_s = monotonic()
    found: dict[tuple[str, int, float], Values] = {}
    for kind in kinds:
        note_progress(kind)
        for size, threshold in product(SIZES, THRESHOLDS):
            found[kind, size, threshold] = defaultdict(list)
        for size, seed in product(SIZES, seeds):
            for threshold, values in look_at(simulate(kind, size, seed)):
                for name, value in values.items():
                    found[kind, size, threshold][name].append(value)
    finish(replace(_report(found, seeds), began_s=began_s), options)


def look_at(year: Year) -> Iterator[tuple[float, dict[str, float]]]:
    """Yield, for each threshold, what was found in a year and its planted variants."""
    years = {name: (year_, day) for name, year_, day in _planted(year)}
    histories = {name: other.history() for name, (other, _) in years.items()}
    plain, end = year.history(), _end(year, 364)
    of_forecast = _forecasts(year)
    for threshold in THRESHOLDS:
        warnings = find_warnings(plain, end, threshold)
        values = {
            column: float(sum(one.kind is kind for one in warnings))
            for kind, column in _KINDS.items()
        }
        values["all"] = sum(values.values())
        for name, (_, day) in years.items():
            values[name] = _is_found(name, year, histories[name], day, threshold)
        yield threshold, values | (of_forecast if threshold == THRESHOLD else {})


def _planted(year: Year) -> Iterator[tuple[str, Year, int]]:
    """Yield years with something unusual: its column, the year and the day of it."""
    chance = np.random.default_rng([year.seed, year.purchases])
    bought = [day for day in range(70, 330) if year.by_day[day]]
    workdays = [day for day in bought if year.day(day).weekday() < 5]
    day = int(chance.choice(workdays or bought))
    for times in TIMES:
        yield f"×{times}", year.with_times(day, times), day
    part = int(chance.choice(np.flatnonzero(year.units[day])))
    yield "partition ×5", year.with_times(day, 5, part), day
    day = int(chance.integers(120, 330))
    for name, level in (("level ×1.3", 1.3), ("level ×2", 2.0), ("level ×0.5", 0.5), ("stop", 0)):
        yield name, year.with_level(day, level), day


def _is_found(name: str, year: Year, history: SpendHistory, day: int, threshold: float) -> float:
    kinds, within = _PLANTED[name]
    warnings = find_warnings(history, _end(year, day + within), threshold)
    first, last = year.day(day), year.day(day + within)
    return float(
        any(one.kind in kinds and one.since <= last and one.until >= first for one in warnings)
    )


def _forecasts(year: Year) -> dict[str, float]:
    """Return how often the interval held the month, and the median error, asked 50 times."""
    spent = year.spent()
    held, errors = [], []
    for month, number in product(range(3, 13), (5, 10, 15, 20, 25)):
        whole = sum(units for day, units in spent.items() if day.month == month)
        today = date(year.day(0).year, month, number)
        known = {day: units for day, units in spent.items() if day <= today}
        found = forecast_usual(known, today, 18_000)
        if found is not None and whole:
            held.append(found.low_units <= whole <= found.high_units)
            errors.append(abs(found.expected_units - whole) / whole)
    return {"held": float(np.mean(held)), "error": float(np.median(errors))}


def _end(year: Year, day: int) -> datetime:
    return datetime.combine(year.day(day), time(23), timezone.utc)


def _report(found: Mapping[tuple[str, int, float], Values], seeds: range) -> Report:
    years = len(SIZES) * len(seeds)
    report = Report(
        "spend_warnings",
        "Warnings about unusual spend, in simulated years",
        setting=(
            f"{years} years of each kind, of 2,000, 20,000 and 200,000 purchases in eight "
            f"partitions, seeds {seeds[0]} to {seeds[-1]} of `benchmarks/account_years.py`. "
            "Warnings without cause are a year's; of what is planted, the share that is found is "
            "given. ×2 is a day that is bought twice; a level is to be found within 28 days, a "
            "stop within 14, the others on their day"
        ),
        columns=[
            *("years", "threshold", "all", *_KINDS.values(), *_PLANTED),
            *("month in 90 % interval", "median error"),
        ],
    )
    tuned = ", ".join(TUNED_KINDS)
    groups: list[tuple[str, Sequence[str], Sequence[int]]]
    groups = [(kind, (kind,), SIZES) for kind in (*TUNED_KINDS, *HELD_OUT_KINDS)]
    groups += [(f"{size:,} purchases: {tuned}", TUNED_KINDS, (size,)) for size in SIZES]
    for name, kinds, sizes in groups:
        report.add(name, *_cells(found, kinds, sizes, THRESHOLD))
    for threshold in THRESHOLDS:
        report.add(tuned, *_cells(found, TUNED_KINDS, SIZES, threshold))
    both = (*TUNED_KINDS, *HELD_OUT_KINDS)
    for threshold in THRESHOLDS:
        report.add("all kinds", *_cells(found, both, SIZES, threshold))
    at = {name: _mean(found, TUNED_KINDS, SIZES, THRESHOLD, name) for name in ("all", "×3", "×10")}
    outside = max(1 - _mean(found, (kind,), SIZES, THRESHOLD, "held") for kind in TUNED_KINDS)
    report.claim(f"warnings without cause a year ({tuned})", at["all"], MOST_FALSE)
    report.claim("days of ×3 that are missed, of these kinds", 1 - at["×3"], MOST_MISSED)
    report.claim("days of ×10 that are missed", 1 - at["×10"], MOST_MISSED)
    report.claim("months outside the 90 % interval, of the worst of these", outside, MOST_OUTSIDE)
    report.note(
        f"{', '.join(HELD_OUT_KINDS)} were not used to choose the detector or its threshold. "
        f"The default threshold is {THRESHOLD:g}."
    )
    return report


def _cells(
    found: Mapping[tuple[str, int, float], Values],
    kinds: Sequence[str],
    sizes: Sequence[int],
    threshold: float,
) -> Iterator[str]:
    yield f"{threshold:g}"
    for name in ("all", *_KINDS.values(), *_PLANTED):
        yield f"{_mean(found, kinds, sizes, threshold, name):.2f}"
    for name in ("held", "error"):
        value = _mean(found, kinds, sizes, threshold, name) if threshold == THRESHOLD else None
        yield "" if value is None else f"{value:.1%}"


def _mean(
    found: Mapping[tuple[str, int, float], Values],
    kinds: Sequence[str],
    sizes: Sequence[int],
    threshold: float,
    name: str,
) -> float:
    values = [found[kind, size, threshold][name] for kind in kinds for size in sizes]
    return float(np.mean(np.concatenate(values)))


if __name__ == "__main__":
    main()

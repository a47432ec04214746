"""When an account's credits run out, by the forecast of its spend. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import accumulate
from typing import Final

from krea_dagster.spend.text import day_words
from krea_dagster.spend.warnings.forecast import forecast_days

#: Days after which a run-out is not looked for.
HORIZON_DAYS: Final = 366


@dataclass(frozen=True)
class RunOut:
    """The day on which the credits are expected to be used up, and its 90 % interval.

    None: not within ``HORIZON_DAYS``.
    """

    expected: date | None
    earliest: date | None
    latest: date | None


def run_out(spent: Mapping[date, int], today: date, units: int, grain_units: int) -> RunOut | None:
    """Return when ``units`` are used up, if as much is spent as usual; None with too few days.

    Args:
        spent: Units by day.
        today: The day from which the units are left.
        units: What is left.
        grain_units: The price of one purchase.
    """
    so_far = sum(one for day, one in spent.items() if today.replace(day=1) <= day <= today)
    found = forecast_days(spent, today, grain_units, range(HORIZON_DAYS))
    if not found:
        return None

    def first_day(sums: Iterable[int]) -> date | None:
        until = (one - so_far for one in accumulate(sums, max))
        days = next((number for number, used in enumerate(until) if used >= units), None)
        return None if days is None else today + timedelta(days=days)

    return RunOut(
        expected=first_day(one.expected_units for one in found),
        earliest=first_day(one.high_units for one in found),
        latest=first_day(one.low_units for one in found),
    )


def run_out_words(found: RunOut | None, today: date) -> str:
    """Return for how long credits last, for a sentence."""
    if found is None:
        return "for a time that needs more days to be forecast"
    if found.expected is None:
        return "for more than a year"
    days = (found.expected - today).days
    latest = "more than a year" if found.latest is None else day_words(found.latest)
    return (
        f"for about {days} {'day' if days == 1 else 'days'}, until {day_words(found.expected)} "
        f"(90 % interval: {day_words(found.earliest or found.expected)} to {latest})"
    )

"""A warning about the spend, and its kinds. Pure."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from enum import Enum

from krea_dagster.models import UNITS_PER_CREDIT, Acknowledgement
from krea_dagster.spend.text import day_words


class WarningKind(str, Enum):
    """The kinds of warnings. The text is shown by ``--json`` and in the check's name."""

    ACCOUNT_DIFFERS = "account_differs"
    BUDGET_USED = "budget_used"
    FORECAST = "forecast"
    CREDITS_RUN_OUT = "credits_run_out"
    DAY_OUT_OF_HABIT = "day_out_of_habit"
    PARTITION_OUT_OF_HABIT = "partition_out_of_habit"
    STOPPED = "stopped"
    LEVEL_CHANGED = "level_changed"
    PRICE_CHANGED = "price_changed"
    FAILURE_NEW = "failure_new"
    FAILURES_HIGH = "failures_high"


class Level(str, Enum):
    """How bad a warning is."""

    ERROR = "error"
    WARNING = "warning"


@dataclass(frozen=True)
class SpendWarning:
    """A sentence with figures, the first and last day that it was true, and what to do.

    Attributes:
        kind: What kind of warning it is.
        text: The sentence.
        since: The first day.
        until: The last day.
        advice: What to do, in a sentence.
        units: The money in question, in 1/10,000 credits.
        about: The partition, quality, error code or budget concerned; empty: all.
        subject: What identifies it among those of its kind; by default ``about`` and ``since``.
        used_share: Of a budget, the used share of it.
        acknowledgement: Why it is expected, if a person has said so: then it is not posted.
    """

    kind: WarningKind
    text: str
    since: date
    until: date
    advice: str
    units: int = 0
    about: str = ""
    subject: str = ""
    used_share: float = 0.0
    acknowledgement: Acknowledgement | None = None

    @property
    def warning_id(self) -> str:
        """Ten characters that stay the same while the warning grows, on every machine."""
        subject = self.subject or f"{self.about}\n{self.since}"
        return hashlib.sha256(f"{self.kind.value}\n{subject}".encode()).hexdigest()[:10]

    @property
    def credits(self) -> Decimal:
        """The money in question, in credits."""
        return Decimal(self.units) / UNITS_PER_CREDIT

    @property
    def level(self) -> Level:
        """An account that differs is an error; the rest are warnings."""
        error = self.kind is WarningKind.ACCOUNT_DIFFERS
        return Level.ERROR if error else Level.WARNING


def on_days(since: date, until: date) -> str:
    """Return the days from the first to the last in words."""
    if since == until:
        return f"on {day_words(since)}"
    return f"from {day_words(since)} to {day_words(until)}"

"""What was spent and what went wrong, day by day: the frozen values that warnings are found in.

Days are UTC days. Money in units of 1/10,000 credits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from decimal import Decimal
from typing import Final, Literal

from krea_dagster.models import UNITS_PER_CREDIT

#: What a budget bounds: a UTC day, a UTC month, or all that was ever bought under its name.
Period = Literal["day", "month", "total"]


@dataclass(frozen=True)
class DaySpend:
    """One day's purchases.

    ``at_stake_units`` is committed and not settled. ``trouble`` counts the purchases that failed,
    were refused or lost, or whose outcome is unknown.
    """

    day: date
    charged_units: int = 0
    at_stake_units: int = 0
    asked: int = 0
    trouble: int = 0

    @property
    def committed_units(self) -> int:
        """Charged, or perhaps to be charged."""
        return self.charged_units + self.at_stake_units


@dataclass(frozen=True)
class PartitionSpend:
    """What was committed for one partition on one day."""

    day: date
    partition_key: str
    committed_units: int


@dataclass(frozen=True)
class PriceSeen:
    """How many calls of a quality were charged one price on one day."""

    day: date
    quality: str
    units: int
    calls: int


@dataclass(frozen=True)
class FailureSeen:
    """How many purchases ended with one error code on one day, and what they cost or may cost."""

    day: date
    error_code: str
    count: int
    units: int = 0


@dataclass(frozen=True)
class BudgetUse:
    """A budget and what of it is used: charged, or at stake.

    ``name`` is ``day``, ``month``, or a word and a value, such as ``partition bucket-003``. For a
    day and a month ``used_units`` is that of today and of this month.
    """

    name: str
    period: Period
    parse_cap: int
    used_units: int


@dataclass(frozen=True)
class AccountUse:
    """What the account says it used; negative ``unexplained_units`` where it used too little.

    ``since`` is the day of the first reading after which something is not explained.
    """

    used_units: int
    unexplained_units: int
    since: date


@dataclass(frozen=True)
class SpendHistory:
    """All of it, each sequence in order of its days; ``days`` only those with purchases.

    ``account`` is None where it was not read twice.
    """

    days: Sequence[DaySpend] = ()
    partitions: Sequence[PartitionSpend] = ()
    prices: Sequence[PriceSeen] = ()
    failures: Sequence[FailureSeen] = ()
    budgets: Sequence[BudgetUse] = ()
    account: AccountUse | None = None


_CENT_UNITS: Final = UNITS_PER_CREDIT // 100


def amount(units: int, places: int | None = None) -> str:
    """Units as credits for people, exact: ``1,234.45``; four decimals where two would lose some.

    ``places`` asks for more than needed, so that a column is even. Never rounds.
    """
    needed = 2 if units % _CENT_UNITS == 0 else 4
    return f"{Decimal(units) / UNITS_PER_CREDIT:,.{max(needed, places or 0)}f}"


def rough(units: int) -> str:
    """An estimate as credits, without the decimals that it does not know: ``2,727``."""
    credits = units / UNITS_PER_CREDIT
    return f"{credits:,.0f}" if credits >= 100 else f"{credits:,.2f}"


def credits_words(units: int) -> str:
    """Units as credits in a sentence: ``1,234.45 credits``."""
    return f"{amount(units)} credits"


def day_words(day: date) -> str:
    """A day as people write it: ``7 May 2026``."""
    return f"{day.day} {day:%b %Y}"

"""The spend and the failures by UTC day that warnings are found in. Money is in units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from typing import Final, Literal

from krea_dagster.engine.budget import PUBLISHED_UNITS
from krea_dagster.models import Acknowledgement

#: The highest published price.
HIGHEST_PRICE_UNITS: Final = max(PUBLISHED_UNITS.values())

#: The time that a budget covers: a UTC day, a UTC month, or all time.
Period = Literal["day", "month", "total"]


@dataclass(frozen=True)
class DaySpend:
    """One day's purchases.

    ``at_stake_units`` are committed and not settled. ``trouble`` counts the purchases that failed,
    were refused, rejected or lost, or whose outcome is unknown.
    """

    day: date
    charged_units: int = 0
    at_stake_units: int = 0
    asked: int = 0
    trouble: int = 0

    @property
    def committed_units(self) -> int:
        """Units that were charged, or may be charged."""
        return self.charged_units + self.at_stake_units


@dataclass(frozen=True)
class PartitionSpend:
    """The units committed for one partition on one day."""

    day: date
    partition_key: str
    committed_units: int


@dataclass(frozen=True)
class PriceSeen:
    """The number of calls of a quality that were charged one price on one day."""

    day: date
    quality: str
    units: int
    calls: int


@dataclass(frozen=True)
class FailureSeen:
    """The purchases that ended with one error code on one day, and their cost at most."""

    day: date
    error_code: str
    count: int
    units: int = 0


@dataclass(frozen=True)
class BudgetUse:
    """A budget and how much of it is used (charged, or at stake).

    ``name`` is ``day`` (today), ``month`` (this month), or a scope and a value, such as
    ``partition bucket-003``.
    """

    name: str
    period: Period
    cap_units: int
    used_units: int


@dataclass(frozen=True)
class AccountUse:
    """The units that the account used, and those of them that the journal does not explain.

    ``unexplained_units`` are negative where the account used too few. ``since`` is the day of the
    reading before the first difference.
    """

    used_units: int
    unexplained_units: int
    since: date


@dataclass(frozen=True)
class SpendHistory:
    """Everything that warnings are found in, in the order of days; ``days`` have purchases.

    ``account`` is None where the account was not read twice. ``acknowledgements`` are by the id of
    their warning.
    """

    days: Sequence[DaySpend] = ()
    partitions: Sequence[PartitionSpend] = ()
    prices: Sequence[PriceSeen] = ()
    failures: Sequence[FailureSeen] = ()
    budgets: Sequence[BudgetUse] = ()
    account: AccountUse | None = None
    acknowledgements: Mapping[str, Acknowledgement] = field(default_factory=dict)

    def spent(self, until: date) -> dict[date, int]:
        """Return the committed units of each day up to the last one."""
        return {day.day: day.committed_units for day in self.days if day.day <= until}

    @property
    def grain_units(self) -> int:
        """The highest price of one purchase; the highest published one where none was seen."""
        return max((seen.units for seen in self.prices), default=HIGHEST_PRICE_UNITS)

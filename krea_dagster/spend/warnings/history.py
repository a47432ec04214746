"""The spend and the failures by UTC day that warnings are found in. Money is in units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime
from typing import TYPE_CHECKING, Final, Literal

from krea_dagster.engine.budget import PUBLISHED_UNITS
from krea_dagster.models import Acknowledgement

if TYPE_CHECKING:  # it needs NumPy, and settings need this module
    from krea_dagster.spend.warnings.run_out import RunOut

#: The highest published price.
HIGHEST_PRICE_UNITS: Final = max(PUBLISHED_UNITS.values())

#: Days before an account's credits run out from which it is a warning, by default.
BALANCE_DAYS: Final = 14

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
    ``partition bucket-003``. A hard budget defers rows, a soft one only warns. ``forecast_units``
    is what a month will probably have used at its end; None where that is not known.
    """

    name: str
    period: Period
    cap_units: int
    used_units: int
    is_hard: bool = False
    forecast_units: int | None = None

    @property
    def kind(self) -> str:
        """``hard`` or ``soft``."""
        return "hard" if self.is_hard else "soft"

    @property
    def left_units(self) -> int:
        """What is left; negative where more is used than the budget."""
        return self.cap_units - self.used_units


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
class Balance:
    """What an account has left, in units, and when that is used up.

    Attributes:
        account: The fingerprint of one of its keys.
        read_at: When it was read for the last time.
        read_units: What it had left then.
        since_units: What was committed since.
        entered_units: Credits that a person entered for later days.
        risen_on: The day on which its balance has last risen, as by a top-up.
        is_used: Whether something was bought with its keys in the last four weeks.
        run_out: When it is used up; None if too few days are known.
    """

    account: str
    read_at: datetime
    read_units: int
    since_units: int = 0
    entered_units: int = 0
    risen_on: date | None = None
    is_used: bool = True
    run_out: RunOut | None = None

    @property
    def units(self) -> int:
        """What is left now."""
        return self.read_units - self.since_units + self.entered_units


@dataclass(frozen=True)
class SpendHistory:
    """Everything that warnings are found in, in the order of days; ``days`` have purchases.

    ``account`` is None where the account was not read twice. ``acknowledgements`` are by the id of
    their warning. ``balances`` are those of the accounts, the one read last first; fewer than
    ``balance_days`` until one is used up are a warning.
    """

    days: Sequence[DaySpend] = ()
    partitions: Sequence[PartitionSpend] = ()
    prices: Sequence[PriceSeen] = ()
    failures: Sequence[FailureSeen] = ()
    budgets: Sequence[BudgetUse] = ()
    account: AccountUse | None = None
    acknowledgements: Mapping[str, Acknowledgement] = field(default_factory=dict)
    balances: Sequence[Balance] = ()
    balance_days: int = BALANCE_DAYS

    def spent(self, until: date) -> dict[date, int]:
        """Return the committed units of each day up to the last one."""
        return {day.day: day.committed_units for day in self.days if day.day <= until}

    @property
    def grain_units(self) -> int:
        """The highest price of one purchase; the highest published one where none was seen."""
        return max((seen.units for seen in self.prices), default=HIGHEST_PRICE_UNITS)

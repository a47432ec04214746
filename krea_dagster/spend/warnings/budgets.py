"""How much of each budget is used: the same figures for command, report and checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import date, datetime, timedelta, timezone
from typing import Final

from krea_dagster.engine.budget import Budget, Caps
from krea_dagster.spend.tables.query import SpendLine, sums
from krea_dagster.spend.tables.sql import DuckDB, units_of
from krea_dagster.spend.tables.views import PARTITION
from krea_dagster.spend.warnings.forecast import forecast_usual
from krea_dagster.spend.warnings.history import HIGHEST_PRICE_UNITS, BudgetUse

#: Days since its last purchase for which the budget of a run, partition or value is shown.
LATELY_DAYS: Final = 7


@dataclass(frozen=True)
class BudgetLine:
    """A budget in the table of all budgets. A hard one defers rows, a soft one only warns.

    ``forecast_units`` is what its month will probably have used at its end; None where that is not
    known, or where the budget has no end.
    """

    use: BudgetUse
    is_hard: bool
    forecast_units: int | None = None

    @property
    def kind(self) -> str:
        """``hard`` or ``soft``."""
        return "hard" if self.is_hard else "soft"

    @property
    def left_units(self) -> int:
        """What is left; negative where more is used than the budget."""
        return self.use.cap_units - self.use.used_units


def hard_budgets(caps: Caps) -> list[Budget]:
    """Return all caps of the settings as budgets."""
    own = {"run": caps.run_units, "day": caps.day_units}
    return [
        *caps.budgets,
        *(Budget(kind, units) for kind, units in own.items() if units is not None),
    ]


def budget_lines(
    duck: DuckDB, hard: Sequence[Budget], soft: Sequence[Budget], now: datetime
) -> list[BudgetLine]:
    """Return the table of all budgets, hard ones first. Raises ConfigError as ``budget_uses``."""
    found = [
        BudgetLine(use, is_hard)
        for budgets, is_hard in ((hard, True), (soft, False))
        for use in budget_uses(duck, budgets, now)
    ]
    if not any(line.use.period == "month" for line in found):
        return found
    today = now.astimezone(timezone.utc).date()
    spent = {
        date.fromisoformat(str(line.of[0])): line.committed_units
        for line in sums(duck, ["day"], until=today)
    }
    ((price,),) = duck.sql("SELECT max(price) FROM spend_by_price").fetchall()
    forecast = forecast_usual(spent, today, units_of(price) or HIGHEST_PRICE_UNITS)
    units = None if forecast is None else forecast.expected_units
    return [
        replace(line, forecast_units=units) if line.use.period == "month" else line
        for line in found
    ]


def budget_uses(duck: DuckDB, budgets: Sequence[Budget], now: datetime) -> list[BudgetUse]:
    """Return how much of each budget is used (charged, or may be charged), in their order.

    Days and months are UTC, as for the caps. A budget of each run, partition or value of a column
    has a line for each that was bought for lately. Raises ConfigError for an unknown column.
    """
    return [use for budget in budgets for use in _uses(duck, budget, now)]


def _uses(duck: DuckDB, budget: Budget, now: datetime) -> list[BudgetUse]:
    today = now.astimezone(timezone.utc).date()
    if budget.kind == "day":
        (line,) = sums(duck, since=today, until=today)
        return [BudgetUse("day", "day", budget.units, line.committed_units)]
    if budget.kind == "month":
        (line,) = sums(duck, since=today.replace(day=1), until=today)
        return [BudgetUse("month", "month", budget.units, line.committed_units)]
    column = {"run": "run_id", "partition": "partition_key"}.get(budget.kind, budget.name)
    # Partitions of one key, but of different tables, have a budget each.
    by = [column, PARTITION] if budget.kind == "partition" else [column]
    since = today - timedelta(days=LATELY_DAYS)
    lately = {line.of for line in sums(duck, by, since=since)}
    name = budget.name or budget.kind
    lines = [line for line in sums(duck, by) if line.of in lately]
    return [
        BudgetUse(f"{name} {line.of[-1] or '(none)'}", "total", budget.units, line.committed_units)
        for line in _with_one_null(lines)
        if budget.value in (None, line.of[0] or "")
    ]


def _with_one_null(lines: Sequence[SpendLine]) -> list[SpendLine]:
    """Add up the lines of null and of the empty text, which are one value for a budget."""
    found: dict[tuple[str, ...], SpendLine] = {}
    for line in lines:
        key = tuple(value or "" for value in line.of)
        found[key] = line.plus(found[key]) if key in found else line
    return list(found.values())

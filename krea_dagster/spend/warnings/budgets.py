"""How much of each budget is used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from typing import Final

from krea_dagster.engine.budget import Budget, Caps
from krea_dagster.spend.tables.query import SpendLine, sums
from krea_dagster.spend.tables.sql import DuckDB
from krea_dagster.spend.tables.views import PARTITION
from krea_dagster.spend.warnings.history import BudgetUse

#: Days since its last purchase for which the budget of a run, partition or value is shown.
LATELY_DAYS: Final = 7


def hard_budgets(caps: Caps) -> list[Budget]:
    """Return all caps of the settings as budgets."""
    own = {"run": caps.run_units, "day": caps.day_units}
    return [
        *caps.budgets,
        *(Budget(kind, units) for kind, units in own.items() if units is not None),
    ]


def budget_uses(
    duck: DuckDB, hard: Sequence[Budget], soft: Sequence[Budget], now: datetime
) -> list[BudgetUse]:
    """Return how much of each budget is used (charged, or may be charged), hard ones first.

    Days and months are UTC, as for the caps. A budget of each run, partition or value of a column
    has a line for each that was bought for lately. Raises ConfigError for an unknown column.
    """
    return [
        replace(use, is_hard=is_hard)
        for budgets, is_hard in ((hard, True), (soft, False))
        for budget in budgets
        for use in _uses(duck, budget, now)
    ]


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

"""Read the spend tables into the history that warnings are found in."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from datetime import datetime, timedelta, timezone
from typing import Final

import duckdb

from krea_dagster.engine.budget import Budget
from krea_dagster.engine.journal.prompt_table_log import GENERATED
from krea_dagster.errors import ConfigError
from krea_dagster.spend.proof.account import AccountProof
from krea_dagster.spend.tables.query import SpendTables
from krea_dagster.spend.tables.sql import COMMITTED, count_of, quoted, units_of
from krea_dagster.spend.warnings.history import (
    AccountUse,
    BudgetUse,
    DaySpend,
    FailureSeen,
    PartitionSpend,
    Period,
    PriceSeen,
    SpendHistory,
)

#: Counts the purchases that brought nothing, or of which that is not known.
_TROUBLE: Final = count_of("failed", "refused", "lost", "rejected", "unknown")

#: The key of a partition; if several prompt tables share the journal, after the table's name.
_PARTITION: Final = f"""
    if(
        prompt_table is null or starts_with(prompt_table, '{GENERATED}') or 1 >= (
            select count(distinct prompt_table) from ledger
            where not starts_with(prompt_table, '{GENERATED}')
        ),
        partition_key, prompt_table || '/' || partition_key
    )
"""

#: Days since its last purchase for which the budget of a run, partition or value is checked.
LATELY_DAYS: Final = 7


def observe(
    tables: SpendTables,
    *,
    now: datetime,
    budgets: Sequence[Budget] = (),
    account: AccountProof | None = None,
) -> SpendHistory:
    """Read the history from the three spend tables. Raises ConfigError for an unknown column.

    ``budgets`` only warn. Only aggregates leave DuckDB: a million purchases need a few megabytes.
    """
    with closing(tables.open()) as database:
        days = [
            DaySpend(row[0], units_of(row[1]), units_of(row[2]), int(row[3]), int(row[4]))
            for row in database.execute(
                "select day, sum(credits_charged), sum(credits_unknown), count(*), "
                f"{_TROUBLE} from ledger group by day order by day"
            ).fetchall()
        ]
        partitions = [
            PartitionSpend(row[0], row[1] or "", units_of(row[2]))
            for row in database.execute(
                f"select day, {_PARTITION} as partition, {COMMITTED} from ledger group by all "
                f"having {COMMITTED} > 0 order by day, partition"
            ).fetchall()
        ]
        prices = [
            PriceSeen(row[0], row[1], units_of(row[2]), int(row[3]))
            for row in database.execute(
                "select day, quality, credits_charged, count(*) from ledger "
                "where credits_charged > 0 group by all order by all"
            ).fetchall()
        ]
        failed = [
            FailureSeen(row[0], row[1] or "no code", int(row[2]), units_of(row[3]))
            for row in database.execute(
                "select day, error_code, sum(count), sum(credits) from failures "
                "group by all order by all"
            ).fetchall()
        ]
        uses = [use for budget in budgets for use in _uses(database, budget, now)]
    return SpendHistory(days, partitions, prices, failed, uses, account_use(account))


def account_use(proof: AccountProof | None) -> AccountUse | None:
    """Return the result of a comparison; differences in opposite directions do not cancel."""
    if proof is None:
        return None
    wrong = [stretch for stretch in proof.stretches if stretch.unexplained_units]
    sums = [stretch.unexplained_units for stretch in wrong]
    units = sum(sums) or max(sums, default=0, key=abs)
    places = list(proof.gaps) or wrong or list(proof.stretches)
    since = places[0].before.at.astimezone(timezone.utc).date()
    return AccountUse(proof.used_units, units, since)


def _uses(database: duckdb.DuckDBPyConnection, budget: Budget, now: datetime) -> list[BudgetUse]:
    """Return how much of a budget is used; of a run, partition or value only if used lately."""
    today = now.astimezone(timezone.utc).date()
    if budget.kind in ("day", "month"):
        since = today if budget.kind == "day" else today.replace(day=1)
        period: Period = "day" if budget.kind == "day" else "month"
        query = f"select {COMMITTED} from ledger where day between ? and ?"
        rows = database.execute(query, [since, today]).fetchall()
        return [BudgetUse(period, period, budget.units, units_of(rows[0][0]))]
    if budget.kind == "column":
        _refuse_unknown(database, budget.name)
        name, column, table = budget.name, quoted(budget.name), "daily"
        shown = column
        # A paid image that is not stored yet counts twice: daily does not distinguish it.
        committed = "sum(credits_charged) + sum(credits_at_stake)"
    else:
        name, column = budget.kind, "run_id" if budget.kind == "run" else "partition_key"
        shown = _PARTITION if budget.kind == "partition" else column
        table, committed = "ledger", COMMITTED
    # A null counts as the empty text, as it does for a hard budget.
    text_of = "coalesce(cast({} as varchar), '')".format
    rows = database.execute(
        f"select {text_of(shown)} as value, {committed} from {table} "
        f"where $only is null or {text_of(column)} = $only "
        "group by value having max(day) >= $since order by value",
        {"only": budget.value, "since": today - timedelta(days=LATELY_DAYS)},
    ).fetchall()
    return [
        BudgetUse(f"{name} {value or '(none)'}", "total", budget.units, units_of(credits))
        for value, credits in rows
    ]


def _refuse_unknown(database: duckdb.DuckDBPyConnection, name: str) -> None:
    names = [row[0] for row in database.execute("describe daily").fetchall()]
    if name not in names:
        raise ConfigError(
            f"a budget is for the column {name}, which spend_daily does not have; it has "
            f"{', '.join(names)}"
        )

"""Reads the spend tables into the history that warnings are found in, in bulk by DuckDB."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Final, TypeAlias

import duckdb
import pyarrow as pa
import pyarrow.dataset as ds

from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError
from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.proof.account import AccountProof
from krea_dagster.spend.tables.prompt_rows import quoted
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

#: What the spend tables may be given as; pyarrow has no types.
Table: TypeAlias = pa.Table | ds.Dataset

#: Purchases of a day that brought nothing, or of which it is not known.
_TROUBLE: Final = "'failed', 'refused', 'lost', 'rejected', 'unknown'"

#: Days since the last purchase for which a run, partition or value's budget is looked at.
LATELY_DAYS: Final = 7

#: What a budget counts: charged, or perhaps to be charged.
_COMMITTED: Final = "coalesce(sum(credits_charged), 0) + coalesce(sum(credits_unknown), 0)"


def observe(
    ledger: Table,
    daily: Table,
    failures: Table,
    *,
    now: datetime,
    budgets: Sequence[Budget] = (),
    account: AccountProof | None = None,
) -> SpendHistory:
    """Read the history from the three spend tables. Raises ConfigError for an unknown column.

    ``budgets`` are soft ones: what they bound is reckoned, and nothing is held back.

    Only aggregates leave DuckDB: a million purchases need a few megabytes here.
    """
    with closing(connect({"ledger": ledger, "daily": daily, "failures": failures})) as database:
        days = [
            DaySpend(row[0], units_of(row[1]), units_of(row[2]), int(row[3]), int(row[4]))
            for row in database.execute(
                "select day, sum(credits_charged), sum(credits_unknown), count(*), "
                f"count(*) filter (outcome in ({_TROUBLE})) from ledger group by day order by day"
            ).fetchall()
        ]
        partitions = [
            PartitionSpend(row[0], row[1] or "", units_of(row[2]))
            for row in database.execute(
                f"select day, partition_key, {_COMMITTED} from ledger group by all "
                f"having {_COMMITTED} > 0 order by day, partition_key"
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
    """What a comparison of the account comes to; stretches that differ both ways do not cancel."""
    if proof is None:
        return None
    wrong = [one for one in proof.stretches if one.unexplained_units]
    sums = [one.unexplained_units for one in wrong]
    units = sum(sums) or max(sums, default=0, key=abs)
    places = list(proof.gaps) or wrong or list(proof.stretches)
    since = places[0].before.at.astimezone(timezone.utc).date()
    return AccountUse(proof.used_units, units, since)


def connect(tables: Mapping[str, Table]) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB of one's own in which the tables are views; it reads no file by itself."""
    database = duckdb.connect(":memory:", config={"python_enable_replacements": "false"})
    for name, table in tables.items():
        database.register(name, table)
    return database


def _uses(database: duckdb.DuckDBPyConnection, budget: Budget, now: datetime) -> list[BudgetUse]:
    """What of a budget is used: of a day or month now, of others where there was any lately."""
    today = now.astimezone(timezone.utc).date()
    if budget.kind in ("day", "month"):
        since = today if budget.kind == "day" else today.replace(day=1)
        period: Period = "day" if budget.kind == "day" else "month"
        query = f"select {_COMMITTED} from ledger where day between ? and ?"
        rows = database.execute(query, [since, today]).fetchall()
        return [BudgetUse(period, period, budget.units, units_of(rows[0][0]))]
    if budget.kind == "column":
        _refuse_unknown(database, budget.name)
        name, column, table = budget.name, quoted(budget.name), "daily"
        # What is paid and not at hand counts twice until it is: daily does not keep it apart.
        committed = "sum(credits_charged) + sum(credits_at_stake)"
    else:
        name, column = budget.kind, "run_id" if budget.kind == "run" else "partition_key"
        table, committed = "ledger", _COMMITTED
    # A null counts as the empty text, as it does for a hard budget.
    value_of = f"coalesce(cast({column} as varchar), '')"
    rows = database.execute(
        f"select {value_of} as value, {committed} from {table} "
        f"where $only is null or {value_of} = $only "
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


def units_of(credits: Decimal | None) -> int:
    """Exact units of a sum of decimals; 0 of none."""
    return 0 if credits is None else int(credits * UNITS_PER_CREDIT)

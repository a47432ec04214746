"""Read the spend tables into the history that warnings are found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from types import MappingProxyType
from typing import Final

from krea_dagster.engine.budget import Budget
from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.models import Acknowledgement
from krea_dagster.spend.proof.account import AccountProof
from krea_dagster.spend.tables.balance import rises
from krea_dagster.spend.tables.measures import WITHOUT_IMAGE
from krea_dagster.spend.tables.sql import units_of
from krea_dagster.spend.tables.views import SpendTables
from krea_dagster.spend.warnings.budgets import budget_uses
from krea_dagster.spend.warnings.forecast import forecast_usual
from krea_dagster.spend.warnings.history import (
    AccountUse,
    Balance,
    DaySpend,
    FailureSeen,
    PartitionSpend,
    PriceSeen,
    SpendHistory,
)
from krea_dagster.spend.warnings.run_out import run_out

#: Days since its last purchase for which an account is in use.
_LATELY_DAYS: Final = 28


def observe(
    tables: SpendTables,
    *,
    now: datetime,
    hard: Sequence[Budget] = (),
    soft: Sequence[Budget] = (),
    account: AccountProof | None = None,
    acknowledgements: Mapping[str, Acknowledgement] = MappingProxyType({}),
    accounts: Sequence[AccountHistory] = (),
) -> SpendHistory:
    """Read the history from the three spend tables. Raises ConfigError for an unknown column.

    ``hard`` and ``soft`` are the budgets that defer rows, and those that only warn. Only
    aggregates leave DuckDB: a million purchases need a few megabytes.
    """
    without_image = " + ".join(WITHOUT_IMAGE)
    with closing(tables.open()) as database:
        days = [
            DaySpend(row[0], units_of(row[1]), units_of(row[2]), int(row[3]), int(row[4]))
            for row in database.execute(
                "SELECT day, credits_charged, credits_unknown, purchases, "
                f"{without_image} FROM spend_by_day"
            ).fetchall()
        ]
        partitions = [
            PartitionSpend(row[0], row[1] or "", units_of(row[2]))
            for row in database.execute(
                "SELECT day, partition, credits_committed FROM spend_by_partition "
                "WHERE credits_committed > 0"
            ).fetchall()
        ]
        prices = [
            PriceSeen(row[0], row[1], units_of(row[2]), int(row[3]))
            for row in database.execute("FROM spend_by_price").fetchall()
        ]
        failed = [
            FailureSeen(row[0], row[1] or "no code", int(row[2]), units_of(row[3]))
            for row in database.execute(
                "SELECT day, error_code, sum(count), sum(credits) FROM failures "
                "GROUP BY ALL ORDER BY ALL"
            ).fetchall()
        ]
        uses = budget_uses(database, hard, soft, now)
    use = account_use(account)
    history = SpendHistory(days, partitions, prices, failed, uses, use, acknowledgements)
    today = now.astimezone(timezone.utc).date()
    forecast = forecast_usual(history.spent(today), today, history.grain_units)
    expected = None if forecast is None else forecast.expected_units
    return replace(
        history,
        balances=[_balance(one, today, history.grain_units) for one in accounts],
        budgets=[
            replace(use, forecast_units=expected) if use.period == "month" else use for use in uses
        ],
    )


def _balance(account: AccountHistory, today: date, grain_units: int) -> Balance:
    last = account.readings[-1]
    risen = [
        reading.at.astimezone(timezone.utc).date()
        for reading, units in zip(account.readings, rises(account), strict=True)
        if units
    ]
    lately = today - timedelta(days=_LATELY_DAYS)
    balance = Balance(
        account.account,
        last.at,
        last.remaining_units,
        account.since_units,
        account.entered_units,
        risen[-1] if risen else None,
        any(units for day, units in account.committed.items() if day >= lately),
    )
    spent = {day: units for day, units in account.committed.items() if day <= today}
    return replace(balance, run_out=run_out(spent, today, balance.units, grain_units))


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

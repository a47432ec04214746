"""Spend tables made directly, by a simulation that knows what it planted: no journal, no network.

A year with weekdays, growth, noise and rare failures, as a person's account may look; and in it,
where wanted, a price change in May, an outage in July and a runaway day in September.
"""

from __future__ import annotations

from contextlib import closing
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute

from krea_dagster.spend.tables.daily import daily_table
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.sql import open_views
from krea_dagster.spend.tables.views import SpendTables

FIRST: Final = date(2025, 1, 1)
DAYS: Final = 365
END: Final = datetime(2025, 12, 31, 18, tzinfo=timezone.utc)
PRICE_DAY: Final = date(2025, 5, 12)
OUTAGE: Final = (date(2025, 7, 14), date(2025, 7, 16))
RUNAWAY: Final = date(2025, 9, 17)

#: Units a call before and after the change.
PRICES: Final = {"1K": (4_500, 4_800), "2K": (18_000, 19_200)}

MONEY: Final = pa.decimal128(18, 4)
#: The columns that are simulated; the others of a ledger are null.
LEDGER: Final = pa.schema(
    [
        *(
            LEDGER_SCHEMA.field(name)
            for name in (
                *("sent_at", "day", "run_id", "partition_key", "prompt_table", "prompt_id"),
                *("sample", "attempt", "request_key", "task_id", "quality", "size", "status"),
                *("outcome", "credits_reserved", "credits_charged", "credits_returned"),
                *("credits_unknown", "error_code"),
            )
        ),
        ("campaign", pa.string()),
    ]
)

#: One unit.
_TICK: Final = pa.scalar(Decimal("0.0001"), pa.decimal128(5, 4))

#: What becomes of a purchase, how often, its error code, and whether it is charged.
FATES: Final = (
    ("delivered", 0.0, None, True),
    ("failed", 0.015, "generation_failed", False),
    ("refused", 0.006, "content_policy_violation", False),
    ("lost", 0.002, "task_not_found", True),
    ("rejected", 0.002, "flat_image", True),
    ("replaced", 0.004, None, True),
    ("unknown", 0.0, "no_answer", False),
)


def simulated_year(
    seed: int = 1, purchases: int = 20_000, *, planted: bool = True, weekend: float = 0.4
) -> SpendTables:
    """Simulate a year of about ``purchases`` purchases."""
    chance = np.random.default_rng(seed)
    weekday = (np.arange(DAYS) + FIRST.weekday()) % 7
    level = np.where(weekday >= 5, weekend, 1.0) * np.linspace(0.8, 1.3, DAYS)
    level = level * np.exp(chance.normal(0, 0.2, DAYS))
    if planted:
        level[(RUNAWAY - FIRST).days] *= 12
    counts = chance.poisson(level / level.sum() * purchases)
    day = np.repeat(np.arange(DAYS), counts)
    total = len(day)
    quality = (chance.random(total) < 0.15).astype(np.int64)
    fate = np.zeros(total, np.int64)
    luck = chance.random(total)
    start = 0.0
    for number, (_, share, _, _) in enumerate(FATES):
        fate[(luck >= start) & (luck < start + share)] = number
        start += share
    if planted:
        outage = (day >= (OUTAGE[0] - FIRST).days) & (day <= (OUTAGE[1] - FIRST).days)
        fate[outage & (luck > 0.5)] = 1
        fate[outage & (luck > 0.8)] = 6
    after = (day >= (PRICE_DAY - FIRST).days) & planted
    units = np.array([PRICES["1K"], PRICES["2K"]])[quality, after.astype(np.int64)]
    return tables_of(_ledger(chance, day, quality, fate, units))


def _ledger(
    chance: np.random.Generator,
    day: np.ndarray,
    quality: np.ndarray,
    fate: np.ndarray,
    units: np.ndarray,
) -> pa.Table:
    total = len(day)
    epoch_days = day + (FIRST - date(1970, 1, 1)).days
    second = np.sort(chance.integers(0, 86_400, total))
    charged = np.array([one[3] for one in FATES])[fate]
    outcomes = np.array([one[0] for one in FATES], object)[fate]
    codes = np.array([one[2] for one in FATES], object)[fate]
    row = np.minimum(chance.zipf(1.9, total), total) - 1
    keys = pa.array([f"{number:064x}" for number in range(total)])
    unknown = outcomes == "unknown"
    values = {
        "sent_at": pa.array((epoch_days * 86_400 + second) * 1_000_000).cast(
            pa.timestamp("us", "UTC")
        ),
        "day": pa.array(epoch_days.astype(np.int32)).cast(pa.date32()),
        "run_id": pa.array([f"run-{number:03d}" for number in day]),
        "partition_key": pa.array(
            [f"bucket-{number:03d}" for number in chance.choice(8, total, p=np.arange(1, 9) / 36)]
        ),
        "prompt_table": pa.array(["prompts.parquet"] * total),
        "prompt_id": pa.array([f"row-{number:06d}" for number in row]),
        "sample": pa.array(np.zeros(total, np.int32)),
        "attempt": pa.array(np.zeros(total, np.int32)),
        "request_key": keys,
        "task_id": keys,
        "quality": pa.array(np.array(["1K", "2K"], object)[quality]),
        "size": pa.array(np.array(["1:1", "16:9", "3:4"], object)[chance.integers(0, 3, total)]),
        "status": pa.array(np.where(charged, "stored", "failed")),
        "outcome": pa.array(outcomes),
        "credits_reserved": money(units),
        "credits_charged": money(np.where(charged, units, 0), unknown),
        "credits_returned": money(np.where(charged, 0, units), unknown),
        "credits_unknown": money(np.where(unknown, units, 0)),
        "error_code": pa.array(codes, pa.string()),
        "campaign": pa.array(
            np.array(["autumn", "spring", None], object)[chance.integers(0, 3, total)], pa.string()
        ),
    }
    return pa.table(values, schema=LEDGER)


def money(units: np.ndarray, missing: np.ndarray | None = None) -> pa.Array:
    """Units as decimals of credits."""
    whole = pa.array(units, pa.int64(), mask=missing).cast(pa.decimal128(19, 0))
    return pa.compute.multiply(whole, _TICK).cast(MONEY)


def tables_of(ledger: pa.Table) -> SpendTables:
    """The tables that belong to a ledger: ``daily`` by the measures, failures by plain SQL."""
    for field in LEDGER_SCHEMA:
        if field.name not in ledger.column_names:
            value = {"rows": 1, "credit_price": "68/USD"}.get(field.name)
            one = pa.scalar(value, field.type)
            ledger = ledger.append_column(field, pa.repeat(one, ledger.num_rows))
    with closing(open_views({"month": ledger})) as database:
        daily = daily_table(database, ["campaign"])
        failures = database.sql(_FAILURES).to_arrow_table()
    return SpendTables(ledger, daily, failures)


_FAILURES: Final = """
select day, partition_key, quality, error_code, count(*) as count,
  (coalesce(sum(credits_charged), 0) + coalesce(sum(credits_unknown), 0))::decimal(18, 4) as credits
from month where error_code is not null group by all order by all
"""

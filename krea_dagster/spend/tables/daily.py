"""Daily sums of the ledger, by UTC day, partition, table, quality, size and the user's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import duckdb
import pyarrow as pa

from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.ledger import CREDITS, typed
from krea_dagster.spend.tables.sql import AT_STAKE, IS_ACCEPTED, count_of, quoted

#: The columns that the sums are grouped by, before the user's.
DAILY_KEYS: Final = ("day", "partition_key", "prompt_table", "quality", "size")

_FIGURES: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("images_asked", pa.int64(), "Purchases that were sent"),
    ("delivered", pa.int64(), "Of them, those that bought an image, including replaced ones"),
    ("failed", pa.int64(), "Of them, those whose task failed"),
    ("refused", pa.int64(), "Of them, those that were certainly not created"),
    ("lost", pa.int64(), "Of them, those that are paid, and the image is lost"),
    ("rejected", pa.int64(), "Of them, those that are paid, and a check rejected the file"),
    ("unknown", pa.int64(), "Of them, those without a usable answer yet"),
    ("pending", pa.int64(), "Of them, those that are at the server, or being fetched"),
    ("replaced", pa.int64(), "Of the delivered, those with a later attempt that was delivered"),
    ("accepted", pa.int64(), "Of the delivered, those neither replaced, rejected nor flagged"),
    ("reused", pa.int64(), "Manifest rows that share a delivered image, beyond its first row"),
    ("credits_charged", CREDITS, "Credits that were charged"),
    ("credits_returned", CREDITS, "Credits that were reserved and not charged"),
    ("credits_at_stake", CREDITS, "Credits that may be charged, or are paid for an image to come"),
    ("credits_saved_by_reuse", CREDITS, "Credits that the reused rows would have cost"),
    ("credits_per_delivered", pa.float64(), "Credits charged per delivered image"),
    ("credits_per_accepted", pa.float64(), "Credits charged per accepted image"),
    ("latency_p50_s", pa.float64(), "Median time from submission to completion, seconds"),
    ("latency_p95_s", pa.float64(), "95th percentile of that time, seconds"),
)

DAILY_SCHEMA: Final = pa.schema(
    [
        ("day", pa.date32()),
        *((name, pa.string()) for name in DAILY_KEYS[1:]),
        *((name, kind) for name, kind, _ in _FIGURES),
    ]
)

DAILY_DESCRIPTIONS: Final = {
    "day": "UTC day on which they were sent",
    "partition_key": "Dagster partition that they were bought for",
    "prompt_table": "Prompt table that they were bought for; null where not known",
    "quality": "1K or 2K",
    "size": "Requested aspect ratio",
    **{name: text for name, _, text in _FIGURES},
}

FAILURES_SCHEMA: Final = pa.schema(
    [
        ("day", pa.date32()),
        ("partition_key", pa.string()),
        ("quality", pa.string()),
        ("error_code", pa.string()),
        ("count", pa.int64()),
        ("credits", CREDITS),
    ]
)


def daily_schema(by: Sequence[str] = ()) -> pa.Schema:
    """Return the schema with the user's columns. Raises ConfigError for a name that is taken."""
    if taken := [name for name in by if name in DAILY_SCHEMA.names]:
        raise ConfigError(f"spend_daily already has a column {taken[0]!r}; name others")
    if len(set(by)) < len(by):
        raise ConfigError(f"a column is named twice for spend_daily: {', '.join(by)}")
    fields = list(DAILY_SCHEMA)
    own = [pa.field(name, pa.string()) for name in by]
    return pa.schema([*fields[: len(DAILY_KEYS)], *own, *fields[len(DAILY_KEYS) :]])


def daily_table(duck: duckdb.DuckDBPyConnection, by: Sequence[str] = ()) -> pa.Table:
    """Return the daily sums of the table ``month`` (``ledger.make_month``)."""
    keys = ", ".join([*DAILY_KEYS, *map(quoted, by)])
    delivered = count_of("delivered", "replaced")
    served = "outcome IN ('delivered', 'replaced') AND rows > 1"
    outcomes = ("failed", "refused", "lost", "rejected", "unknown", "pending", "replaced")
    counts = ", ".join(f"{count_of(outcome)} AS {outcome}" for outcome in outcomes)
    found = duck.sql(
        f"""
        SELECT {keys},
            count(*) AS images_asked,
            {delivered} AS delivered,
            {counts},
            count(*) FILTER ({IS_ACCEPTED}) AS accepted,
            coalesce(sum(rows - 1) FILTER ({served}), 0)::BIGINT AS reused,
            coalesce(sum(credits_charged), 0)::BIGINT AS credits_charged,
            coalesce(sum(credits_returned), 0)::BIGINT AS credits_returned,
            {AT_STAKE}::BIGINT AS credits_at_stake,
            coalesce(sum((rows - 1) * credits_charged) FILTER ({served}), 0)::BIGINT
                AS credits_saved_by_reuse,
            coalesce(sum(credits_charged), 0) / 1e4 / nullif({delivered}, 0)
                AS credits_per_delivered,
            coalesce(sum(credits_charged), 0) / 1e4 / nullif(count(*) FILTER ({IS_ACCEPTED}), 0)
                AS credits_per_accepted,
            quantile_cont(latency_s, 0.5) AS latency_p50_s,
            quantile_cont(latency_s, 0.95) AS latency_p95_s
        FROM month GROUP BY {keys} ORDER BY {keys}
        """
    )
    return typed(found.to_arrow_table(), daily_schema(by))


def failures_table(duck: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return the purchases without an image by error code, with their cost at most."""
    found = duck.sql(
        """
        SELECT day, partition_key, quality, coalesce(error_code, outcome) AS error_code,
            count(*) AS count,
            sum(coalesce(credits_charged, 0) + credits_unknown)::BIGINT AS credits
        FROM month WHERE outcome IN ('failed', 'refused', 'lost', 'rejected', 'unknown')
        GROUP BY ALL ORDER BY ALL
        """
    )
    return typed(found.to_arrow_table(), FAILURES_SCHEMA)

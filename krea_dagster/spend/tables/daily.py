"""Daily sums of the ledger: per UTC day, partition, quality, size and the user's own columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import duckdb
import pyarrow as pa

from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.ledger import CREDITS, typed
from krea_dagster.spend.tables.prompt_rows import quoted
from krea_dagster.spend.tables.verdict_rows import IS_ACCEPTED

#: What a day's rows are kept apart by, before the user's own columns.
DAILY_KEYS: Final = ("day", "partition_key", "quality", "size")

_FIGURES: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("images_asked", pa.int64(), "Purchases that were sent"),
    ("delivered", pa.int64(), "Of them: bought an image; those replaced since are among them"),
    ("failed", pa.int64(), "Of them: the task failed"),
    ("refused", pa.int64(), "Of them: certainly not created"),
    ("lost", pa.int64(), "Of them: paid, and nothing could be read again"),
    ("rejected", pa.int64(), "Of them: paid, and a check refused the file"),
    ("unknown", pa.int64(), "Of them: got no usable answer yet"),
    ("pending", pa.int64(), "Of them: at the server, or on their way from it"),
    ("replaced", pa.int64(), "Of the delivered: a later attempt was delivered"),
    (
        "accepted",
        pa.int64(),
        "Of the delivered: not replaced, rejected or flagged by a person",
    ),
    ("reused", pa.int64(), "Manifest rows that the delivered serve beyond the first"),
    ("credits_charged", CREDITS, "What was charged, credits"),
    ("credits_returned", CREDITS, "Reserved and not charged, credits"),
    ("credits_at_stake", CREDITS, "May have been charged, or is paid and not at hand, credits"),
    ("credits_saved_by_reuse", CREDITS, "What the reused rows would have cost, credits"),
    ("credits_per_delivered", pa.float64(), "All that was charged, per image delivered, credits"),
    ("credits_per_accepted", pa.float64(), "All that was charged, per image accepted, credits"),
    ("latency_p50_s", pa.float64(), "Median of submission to completion, seconds"),
    ("latency_p95_s", pa.float64(), "95 % were quicker, seconds"),
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
    "quality": "1K or 2K",
    "size": "Aspect ratio that was asked for",
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
    """Return the schema with the user's own columns. Raises ConfigError for one that is taken."""
    if taken := [name for name in by if name in DAILY_SCHEMA.names]:
        raise ConfigError(f"spend_daily has a column {taken[0]!r} already; name others")
    if len(set(by)) < len(by):
        raise ConfigError(f"spend_daily is to have a column twice: {', '.join(by)}")
    fields = list(DAILY_SCHEMA)
    own = [pa.field(name, pa.string()) for name in by]
    return pa.schema([*fields[: len(DAILY_KEYS)], *own, *fields[len(DAILY_KEYS) :]])


def daily_table(duck: duckdb.DuckDBPyConnection, by: Sequence[str] = ()) -> pa.Table:
    """Return the daily sums of the table ``month`` (``ledger.make_month``)."""
    keys = ", ".join([*DAILY_KEYS, *map(quoted, by)])

    def count(*outcomes: str) -> str:
        return f"count(*) FILTER (outcome IN ({', '.join(map(repr, outcomes))}))"

    delivered = count("delivered", "replaced")
    served = "outcome IN ('delivered', 'replaced') AND rows > 1"
    found = duck.sql(
        f"""
        SELECT {keys},
            count(*) AS images_asked,
            {delivered} AS delivered,
            {count("failed")} AS failed,
            {count("refused")} AS refused,
            {count("lost")} AS lost,
            {count("rejected")} AS rejected,
            {count("unknown")} AS unknown,
            {count("pending")} AS pending,
            {count("replaced")} AS replaced,
            count(*) FILTER ({IS_ACCEPTED}) AS accepted,
            coalesce(sum(rows - 1) FILTER ({served}), 0)::BIGINT AS reused,
            coalesce(sum(credits_charged), 0)::BIGINT AS credits_charged,
            coalesce(sum(credits_returned), 0)::BIGINT AS credits_returned,
            sum(credits_unknown + if(outcome = 'pending', coalesce(credits_charged, 0), 0))::BIGINT
                AS credits_at_stake,
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
    """Return what bought no image, by class, with what that cost or may have cost at most."""
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

"""Daily sums of the ledger, by UTC day, partition, table, quality, size and the user's columns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import duckdb
import pyarrow as pa

from krea_dagster.errors import ConfigError
from krea_dagster.spend.tables.measures import (
    MEASURES,
    OF_PURCHASES,
    SUM_OF_CREDITS,
    WITHOUT_IMAGE,
    selected,
)
from krea_dagster.spend.tables.sql import quoted

#: The columns that the sums are grouped by, before the user's.
DAILY_KEYS: Final = ("day", "partition_key", "prompt_table", "quality", "size")

#: The measures of the table by their column: the first has another name than elsewhere, which it
#: had before there were others.
_COLUMNS: Final = {
    {"purchases": "images_asked"}.get(name, name): MEASURES[name]
    for name in OF_PURCHASES
    if name not in ("credits_unknown", "credits_committed")
}

DAILY_SCHEMA: Final = pa.schema(
    [
        ("day", pa.date32()),
        *((name, pa.string()) for name in DAILY_KEYS[1:]),
        *((name, one.kind) for name, one in _COLUMNS.items()),
    ]
)

DAILY_DESCRIPTIONS: Final = {
    "day": "UTC day on which they were sent",
    "partition_key": "Dagster partition that they were bought for",
    "prompt_table": "Prompt table that they were bought for; null where not known",
    "quality": "1K or 2K",
    "size": "Requested aspect ratio",
    **{name: one.text for name, one in _COLUMNS.items()},
}

FAILURES_SCHEMA: Final = pa.schema(
    [
        ("day", pa.date32()),
        ("partition_key", pa.string()),
        ("quality", pa.string()),
        ("error_code", pa.string()),
        ("count", pa.int64()),
        ("credits", SUM_OF_CREDITS),
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
    names = [one.name for one in _COLUMNS.values()]
    measures = selected(names, purchases="images_asked")
    found = duck.sql(f"SELECT {keys}, {measures} FROM month GROUP BY {keys} ORDER BY {keys}")
    return found.to_arrow_table().select(daily_schema(by).names).cast(daily_schema(by))


def failures_table(duck: duckdb.DuckDBPyConnection) -> pa.Table:
    """Return the purchases without an image by error code, with their cost at most."""
    committed = MEASURES["credits_committed"].typed_sql
    found = duck.sql(
        f"""
        SELECT day, partition_key, quality, coalesce(error_code, outcome) AS error_code,
            count(*) AS count, {committed} AS credits
        FROM month WHERE outcome IN {WITHOUT_IMAGE} GROUP BY ALL ORDER BY ALL
        """
    )
    return found.to_arrow_table().cast(FAILURES_SCHEMA)

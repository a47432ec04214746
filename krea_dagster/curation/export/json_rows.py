"""Rows of a table as JSON values: the metadata in shards, and the input of their fingerprints."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Iterator
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc


def records(table: pa.Table) -> Iterator[dict[str, Any]]:
    """Yield each row as JSON values.

    Times are ISO 8601, decimals are text, bytes are base64, and NaN and infinity are null.
    """
    names = table.column_names
    columns = [_values(column) for column in table.columns]
    for row in zip(*columns, strict=True) if columns else ({} for _ in range(len(table))):
        yield dict(zip(names, row, strict=True))


def to_json(value: Any) -> str:
    """Return a value of ``records`` as one line of JSON; equal values give equal text."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _values(column: pa.ChunkedArray) -> list[Any]:
    kind = column.type
    if pa.types.is_floating(kind):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, kind))
    elif pa.types.is_timestamp(kind):
        column = pc.replace_substring(column.cast(pa.string()), " ", "T", max_replacements=1)
    elif not _is_plain(kind):
        return [_plain(value) for value in column.to_pylist()]
    found: list[Any] = column.to_pylist()
    return found


def _is_plain(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_integer(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_null(kind)
    )


def _plain(value: Any) -> Any:
    """Return a value of any other type, nested or not, as JSON values."""
    match value:
        case dict():
            return {str(name): _plain(one) for name, one in value.items()}
        case list() | tuple():
            return [_plain(one) for one in value]
        case float():
            return value if math.isfinite(value) else None
        case bytes():
            return base64.b64encode(value).decode("ascii")
        case datetime() | date() | time():
            return value.isoformat()
        case Decimal():
            return f"{value:f}"
        case None | bool() | int() | str():
            return value
        case _:
            return str(value)

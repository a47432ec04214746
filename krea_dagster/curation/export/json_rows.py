"""Rows of a table as JSON has them: what shards hold beside an image, and what tells them apart."""

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
    """Yield each row as values that JSON takes.

    Times are ISO 8601, decimals and bytes are text (base64), and a number without bound or that
    is none is null.
    """
    names = table.column_names
    columns = [_values(column) for column in table.columns]
    for row in zip(*columns, strict=True) if columns else ({} for _ in range(len(table))):
        yield dict(zip(names, row, strict=True))


def line_of(record: dict[str, Any]) -> str:
    """A record as one line of JSON; equal records give equal text."""
    return text_of(record)


def text_of(value: Any) -> str:
    """A value that ``records`` gave as JSON."""
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
    """A value of any other type, however deep, as JSON takes it."""
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

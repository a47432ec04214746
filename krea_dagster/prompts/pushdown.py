"""Filter row groups by partition, as an expression for Arrow."""

from __future__ import annotations

import re
from datetime import date
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as ds

from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
    parse_day,
)

#: With more spans than this, an expression costs more than the row groups that it skips.
_MAX_SPANS: Final = 64
_EPOCH: Final = date(1970, 1, 1).toordinal()
_TICKS: Final = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def row_group_filter(by: PartitionBy, schema: pa.Schema, wanted: frozenset[str]) -> Any | None:
    """Return an expression that is true for every row of the wanted partitions, or None.

    It is compared with the statistics of row groups, so it may be true for other rows too. There is
    none for a dictionary-encoded column: Arrow does not use its statistics.
    """
    match by:
        case HashPartitions():
            return None
        case MultiPartitions():
            parts = [part for part in map(MultiPartitions.split, wanted) if part is not None]
            by_value = _filter(by.by_column, schema, frozenset(value for value, _ in parts))
            by_time = _filter(by.time, schema, frozenset(time for _, time in parts))
            if by_value is None or by_time is None:
                return by_time if by_value is None else by_value
            return by_value & by_time
        case _:
            return _filter(by, schema, wanted)


def _filter(
    by: ColumnPartitions | TimePartitions, schema: pa.Schema, wanted: frozenset[str]
) -> Any | None:
    kind = schema.field(by.column).type
    try:
        if isinstance(by, TimePartitions):
            spans = _time_spans(by, kind, wanted)
        else:
            spans = _value_spans(kind, wanted)
        if spans is None:
            return None
        column, found = ds.field(by.column), ds.scalar(False)
        for low, high in spans:
            found |= (column >= pa.scalar(low, kind)) & (column <= pa.scalar(high, kind))
    except (OverflowError, pa.ArrowInvalid):
        # A key outside the range of the column's type: read all, and find nothing.
        return None
    return found


def _value_spans(kind: pa.DataType, wanted: frozenset[str]) -> list[tuple[Any, Any]] | None:
    values: list[Any]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        values = sorted(wanted)
    elif pa.types.is_integer(kind):
        values = sorted(int(key) for key in wanted if re.fullmatch(r"-?[0-9]{1,20}", key))
    elif pa.types.is_date(kind):
        values = sorted(day for day in map(parse_day, wanted) if day is not None)
    else:
        return None
    if len(values) > _MAX_SPANS:
        return [(values[0], values[-1])]
    return [(value, value) for value in values]


def _time_spans(
    by: TimePartitions, kind: pa.DataType, wanted: frozenset[str]
) -> list[tuple[Any, Any]] | None:
    runs: list[tuple[int, int]] = []
    for key in sorted(wanted):
        first, last = date.fromisoformat(key).toordinal(), by.last_day(key).toordinal()
        if runs and (first == runs[-1][1] + 1 or len(runs) == _MAX_SPANS):
            runs[-1] = (runs[-1][0], last)
        else:
            runs.append((first, last))
    if by.zone != "UTC" and pa.types.is_timestamp(kind) and kind.tz is not None:
        # A zone shifts a time by a day at most.
        runs = [(low - 1, high + 1) for low, high in runs]
    if pa.types.is_date(kind):
        return [(date.fromordinal(low), date.fromordinal(high)) for low, high in runs]
    if pa.types.is_timestamp(kind):
        day = _TICKS[kind.unit] * 24 * 60 * 60
        return [((low - _EPOCH) * day, (high + 1 - _EPOCH) * day - 1) for low, high in runs]
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        # A zone shifts a time by less than a day, so its text may begin with a day next to it.
        first, last = date.min.toordinal(), date.max.toordinal()
        return [
            (
                date.fromordinal(max(low - 1, first)).isoformat(),
                date.fromordinal(min(high + 1, last)).isoformat() + "~",
            )
            for low, high in runs
        ]
    return None

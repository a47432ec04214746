"""Read whole Arrow columns: the values at once, or nothing where a cell needs a closer look.

What a column may hold is defined in ``cells``, cell by cell. Here a column is only taken where
all its cells are plainly right; whoever gets None reads it with ``cells``.
"""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts.cells import (
    Bad,
    column_keys,
    day_keys,
    plain_array,
)
from krea_dagster.prompts.partitioning import DayPartitions, PartitionBy


def texts(array: pa.Array) -> pa.Array | None:
    """Read text, as strings with nulls; None where a cell is no text."""
    array = plain_array(array)
    kind = array.type
    if pa.types.is_integer(kind):
        return array.cast(pa.string())
    if pa.types.is_null(kind) or pa.types.is_floating(kind):
        return _nothing(array, pa.string())
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    # A NUL is valid UTF-8 that PostgreSQL cannot keep.
    if pc.any(pc.match_substring(array, "\0")).as_py():
        return None
    return array.cast(pa.string())


def wholes(array: pa.Array) -> pa.Array | None:
    """Read whole numbers, as int64 with nulls; None where a cell is another number."""
    array = plain_array(array)
    try:
        if pa.types.is_floating(array.type):
            array = _without_nan(array)
        return array.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def flags(array: pa.Array) -> pa.Array | None:
    """Read booleans with nulls; None where a cell is something else."""
    array = plain_array(array)
    if pa.types.is_boolean(array.type):
        return array
    return _nothing(array, pa.bool_())


def partition_keys(by: PartitionBy, array: pa.Array) -> tuple[pa.Array, list[str | Bad] | None]:
    """Read the partition column as keys, null where a cell is no key; then also cell by cell."""
    array = plain_array(array)
    read = day_keys if isinstance(by, DayPartitions) else column_keys
    if pa.types.is_timestamp(array.type):
        # Nearly each is another time, and few are another day.
        array = pc.floor_temporal(array.view(pa.timestamp(array.type.unit)), unit="day")
    try:
        encoded = array.dictionary_encode(null_encoding="encode")
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        keys = read(array)
        return pa.array([_text_or_none(key) for key in keys], pa.string()), keys
    known = read(encoded.dictionary)
    values = pa.array([_text_or_none(key) for key in known], pa.string()).take(encoded.indices)
    return values, (read(array) if values.null_count else None)


def _text_or_none(key: str | Bad) -> str | None:
    return key if isinstance(key, str) else None


def _without_nan(array: pa.Array) -> pa.Array:
    return pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)


def _nothing(array: pa.Array, kind: pa.DataType) -> pa.Array | None:
    """Read the column that pandas makes where every cell is missing."""
    try:
        if pa.types.is_floating(array.type):
            array = _without_nan(array)
    except pa.ArrowNotImplementedError:  # halves
        return None
    return pa.nulls(len(array), kind) if array.null_count == len(array) else None

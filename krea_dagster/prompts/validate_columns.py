"""Read whole Arrow columns: the values at once, or nothing where a cell needs a closer look.

What a column may hold is defined in ``cells``, cell by cell. Here a column is only taken where
all its cells are plainly right; whoever gets None reads it with ``cells``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts.cells import (
    Bad,
    column_keys,
    local_days,
    plain_array,
    time_keys,
)
from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    MultiPartitions,
    TimePartitions,
    dimension_problem,
    key_problem,
)

#: The cells of partition columns as keys, by column, with those that are none.
BadCells = dict[str, list[str | Bad]]


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
    if _may_hold_nul(array) and pc.any(pc.match_substring(array, "\0")).as_py():
        return None
    return array.cast(pa.string())


def _may_hold_nul(array: pa.Array) -> bool:
    """Say whether a byte of the texts is 0; to look at each text takes ten times as long."""
    if not len(array):
        return False
    _, ends, data = array.buffers()
    wide = pa.types.is_large_string(array.type) or pa.types.is_large_binary(array.type)
    number = np.dtype(np.int64 if wide else np.int32)
    places = np.frombuffer(ends, number, len(array) + 1, array.offset * number.itemsize)
    first, end = int(places[0]), int(places[-1])
    return data is not None and not np.frombuffer(data, np.uint8, end - first, first).all()


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


def partition_keys(
    by: ColumnPartitions | TimePartitions | MultiPartitions, columns: Mapping[str, pa.Array]
) -> tuple[pa.Array, BadCells | None]:
    """Read the columns that decide the partition as keys, null where a cell is no key.

    Where one is not, also cell by cell, by column.
    """
    if not isinstance(by, MultiPartitions):
        keys, bad = _keys_of(by, columns[by.column], key_problem)
        return keys, (None if bad is None else {by.column: bad})
    values, bad_values = _keys_of(by.by_column, columns[by.by_column.column], dimension_problem)
    times, bad_times = _keys_of(by.time, columns[by.time.column], key_problem)
    found = {by.by_column.column: bad_values, by.time.column: bad_times}
    bad_cells = {name: cells for name, cells in found.items() if cells is not None}
    return pc.binary_join_element_wise(values, times, MultiPartitions.BAR), bad_cells or None


def _keys_of(
    by: ColumnPartitions | TimePartitions,
    array: pa.Array,
    problem: Callable[[str], str | None],
) -> tuple[pa.Array, list[str | Bad] | None]:
    array = plain_array(array)
    if isinstance(by, TimePartitions) and pa.types.is_timestamp(array.type):
        array = local_days(array, by.zone)  # nearly each is another time, and few another day

    def read(cells: pa.Array) -> list[str | Bad]:
        return (
            time_keys(by, cells) if isinstance(by, TimePartitions) else column_keys(cells, problem)
        )

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

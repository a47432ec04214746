"""Arrow helpers that every layer uses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pyarrow as pa


def as_array(column: pa.ChunkedArray | pa.Array) -> pa.Array:
    """Return a column as one contiguous array.

    ``ChunkedArray.combine_chunks`` may return a chunked array again, depending on type and size.
    """
    if isinstance(column, pa.Array):
        return column
    combined = column.combine_chunks()
    return pa.concat_arrays(combined.chunks) if isinstance(combined, pa.ChunkedArray) else combined


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column of any type as text; lists and structs as JSON."""
    if pa.types.is_string(column.type):
        return column
    try:
        return column.cast(pa.string())
    except pa.ArrowException:  # lists, structures
        return pa.chunked_array(
            [pa.array([_plain(one) for one in column.to_pylist()], pa.string())]
        )


def _plain(value: Any) -> str | None:
    return None if value is None else json.dumps(value, default=str, ensure_ascii=False)


def united(tables: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of tables as one; a column whose types are incompatible becomes text."""
    for name in dict.fromkeys(name for one in tables for name in one.column_names):
        schemas = {
            pa.schema([one.schema.field(name)]) for one in tables if name in one.schema.names
        }
        try:
            pa.unify_schemas(list(schemas), promote_options="permissive")
        except pa.ArrowException:
            tables = [_with_text(one, name) for one in tables]
    return pa.concat_tables(tables, promote_options="permissive")


def _with_text(table: pa.Table, name: str) -> pa.Table:
    if name not in table.column_names:
        return table
    return table.set_column(table.column_names.index(name), name, as_text(table[name]))

"""Filters of rows by column values: ``COLUMN=VALUE``. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import ConfigError


@dataclass(frozen=True)
class ColumnFilter:
    """A column and the values that a row may have in it, as text; an empty text matches null."""

    column: str
    values: tuple[str, ...]

    def matches(self, rows: pa.RecordBatch) -> pa.Array:
        """Return which rows match; a missing column counts as null.

        Raises ConfigError for a value that does not fit the column's type.
        """
        if self.column not in rows.schema.names:
            return pa.array(np.full(rows.num_rows, "" in self.values))
        column = rows.column(self.column)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        given = [value for value in self.values if value or pa.types.is_string(column.type)]
        try:
            found = pc.is_in(column, value_set=pa.array(given, pa.string()).cast(column.type))
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"column {self.column!r} has the type {column.type}, which "
                f"{' or '.join(given)!r} is not: {error}"
            ) from None
        return pc.or_(found, pc.is_null(column)) if "" in self.values else found


def parse_filters(texts: Iterable[str]) -> tuple[ColumnFilter, ...]:
    """Parse ``COLUMN=VALUE`` texts; values of one column are alternatives. Raises ConfigError."""
    values: dict[str, list[str]] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise ConfigError(f"the filter {text!r} is not COLUMN=VALUE")
        values.setdefault(column, []).append(value)
    return tuple(ColumnFilter(column, tuple(found)) for column, found in values.items())


def matching(rows: pa.RecordBatch, filters: Sequence[ColumnFilter]) -> pa.Array:
    """Return which rows match all filters. Raises ConfigError."""
    mask = pa.array(np.ones(rows.num_rows, np.bool_))
    for one in filters:
        mask = pc.and_(mask, one.matches(rows))
    return mask

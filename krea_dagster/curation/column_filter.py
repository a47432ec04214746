"""Filters of rows by column values: ``COLUMN=VALUE``, ``COLUMN>=VALUE`` and the like. Pure."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import ConfigError

#: How a value is compared, apart from ``=``.
_COMPARISONS: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    ">=": pc.greater_equal,
    "<=": pc.less_equal,
    ">": pc.greater,
    "<": pc.less,
    "!=": pc.not_equal,
}
_FILTER: Final = re.compile(r"([^=<>!]+)(>=|<=|!=|=|>|<)(.*)", re.DOTALL)


@dataclass(frozen=True)
class ColumnFilter:
    """A column and what a row may have in it.

    ``values`` are alternatives for ``=``, of which an empty text matches null. The other operators
    have one value, and a null matches none of them.
    """

    column: str
    values: tuple[str, ...]
    operator: str = "="

    def __str__(self) -> str:
        word = "is" if self.operator == "=" else self.operator
        return f"{self.column} {word} {' or '.join(self.values)}"

    def matches(self, rows: pa.RecordBatch) -> pa.Array:
        """Return which rows match; a missing column counts as null.

        Raises ConfigError for a value that does not fit the column's type.
        """
        takes_null = self.operator == "=" and "" in self.values
        if self.column not in rows.schema.names:
            return pa.array(np.full(rows.num_rows, takes_null))
        column = rows.column(self.column)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        is_text = pa.types.is_string(column.type) or self.operator != "="
        given = [value for value in self.values if value or is_text]
        try:
            values = pa.array(given, pa.string()).cast(column.type)
            if self.operator != "=":
                return _COMPARISONS[self.operator](column, values[0]).fill_null(False)
            found = pc.is_in(column, value_set=values)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"column {self.column!r} has the type {column.type}, which "
                f"{' or '.join(given)!r} is not: {error}"
            ) from None
        return pc.or_(found, pc.is_null(column)) if takes_null else found


def parse_filters(texts: Iterable[str]) -> tuple[ColumnFilter, ...]:
    """Parse filters: ``COLUMN=VALUE``, ``>=``, ``<=``, ``>``, ``<`` or ``!=``. Raises ConfigError.

    Values of one column with ``=`` are alternatives; all else must hold together.
    """
    values: dict[str, list[str]] = {}
    others: list[ColumnFilter] = []
    for text in texts:
        parts = _FILTER.fullmatch(text)
        if parts is None:
            raise ConfigError(
                f"the filter {text!r} is not COLUMN=VALUE, nor does it have >=, <=, >, < or !="
            )
        column, operator, value = parts.groups()
        if operator == "=":
            values.setdefault(column, []).append(value)
        else:
            others.append(ColumnFilter(column, (value,), operator))
    same = (ColumnFilter(column, tuple(found)) for column, found in values.items())
    return (*same, *others)


def matching(rows: pa.RecordBatch, filters: Sequence[ColumnFilter]) -> pa.Array:
    """Return which rows match all filters. Raises ConfigError."""
    mask = pa.array(np.ones(rows.num_rows, np.bool_))
    for one in filters:
        mask = pc.and_(mask, one.matches(rows))
    return mask

"""A reviewer's selection of rows: conditions on any column, a search, an order. Pure.

A selection comes from the page as JSON and is evaluated by Arrow functions. It never becomes part
of a query language, so no value needs to be quoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array, as_text
from krea_dagster.engine.verdict import NONE, VERDICTS
from krea_dagster.errors import InputError

#: Row numbers, in display order.
Rows = npt.NDArray[np.int64]

#: The operators of a condition, by the kind of the column.
OPERATORS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("is", "is not", "contains", "is empty", "is not empty"),
    "number": ("is", "is not", "at least", "at most", "is empty", "is not empty"),
    "time": ("at least", "at most", "is empty", "is not empty"),
    "truth": ("is", "is empty", "is not empty"),
    "list": ("has", "has not", "is", "is not", "contains", "is empty", "is not empty"),
}

#: Kinds of columns that are compared and sorted as text.
_AS_TEXT: Final = frozenset({"text", "list"})

#: A selection from the page is short; a longer one is a mistake or an attack.
_LONGEST: Final = 20_000
_MOST_CONDITIONS: Final = 50


@dataclass(frozen=True)
class Condition:
    """One condition. ``is`` matches any of ``values``, ``is not`` none; others use the first."""

    column: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class ReviewSelection:
    """The rows to show. In ``verdicts``, ``none`` means images without a verdict."""

    verdicts: frozenset[str] = frozenset()
    search: str = ""
    where: tuple[Condition, ...] = ()
    sort: str | None = None
    down: bool = False

    def columns(self) -> set[str]:
        """Return the columns that it uses."""
        return {one.column for one in self.where} | ({self.sort} if self.sort else set())

    @classmethod
    def parse(cls, text: str) -> ReviewSelection:
        """Parse a selection from the page. Raises InputError.

        ``{"verdicts": ["none"], "search": "fox", "where": [["seed", "at least", "7"]],
        "sort": "sharpness", "down": true}``; every key is optional.
        """
        if len(text) > _LONGEST:
            raise InputError("the filter is too long")
        try:
            given = json.loads(text or "{}")
            verdicts = frozenset(map(str, given.get("verdicts", ())))
            where = tuple(
                Condition(str(column), str(operator), tuple(map(str, values)))
                for column, operator, *values in given.get("where", ())
            )
            sort = given.get("sort")
            selection = cls(
                verdicts=verdicts,
                search=str(given.get("search", "")).strip(),
                where=where,
                sort=None if sort is None else str(sort),
                down=bool(given.get("down", False)),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"invalid filter: {error}") from None
        if not verdicts <= set(VERDICTS) or len(where) > _MOST_CONDITIONS:
            raise InputError("invalid filter: an unknown verdict, or too many conditions")
        return selection


def kind_of(type_: pa.DataType) -> str:
    """Return ``number``, ``time``, ``truth``, ``list`` (of texts), or ``text`` for all others."""
    if pa.types.is_list(type_) and pa.types.is_string(type_.value_type):
        return "list"
    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        return "time"
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return "number" if any(test(type_) for test in numeric) else "text"


def rows_of(table: pa.Table, selection: ReviewSelection, codes: npt.NDArray[np.int8]) -> Rows:
    """Return the selected rows, in order.

    ``codes`` are the rows' verdicts as indices into ``VERDICTS``. Raises InputError for an unknown
    column, or a value that does not fit the column's type.
    """
    shown = np.ones(table.num_rows, bool)
    for condition in selection.where:
        shown &= _truth(_meets(table, condition))
    if selection.search:
        for word in selection.search.split():
            found = pc.match_substring(table["prompt"], word, ignore_case=True)
            named = pc.match_substring(table["prompt_id"], word, ignore_case=True)
            shown &= _truth(found) | _truth(named)
    if selection.verdicts and selection.verdicts != set(VERDICTS):
        shown &= np.isin(codes, [VERDICTS.index(one) for one in selection.verdicts])
    rows = np.flatnonzero(shown)
    if selection.sort is None:
        return rows[::-1] if selection.down else rows
    column = _column(table, selection.sort).take(pa.array(rows))
    if kind_of(column.type) in _AS_TEXT:
        column = as_text(column)
    order = "descending" if selection.down else "ascending"
    # Ties keep the table's order, so that pages are consistent.
    keys = [("value", order), ("row", "ascending")]
    by = pa.table({"value": column, "row": pa.array(rows)})
    return np.asarray(rows[pc.sort_indices(by, sort_keys=keys).to_numpy()])


def empty_code() -> int:
    """Return the code of a row without a verdict."""
    return VERDICTS.index(NONE)


def _truth(mask: Any) -> npt.NDArray[np.bool_]:
    """Return a mask as a numpy array, with null as False."""
    if isinstance(mask, np.ndarray):
        return mask
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), bool)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise InputError(f"unknown column {name!r}")
    return table[name]


_COMPARE: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "at least": pc.greater_equal,
    "at most": pc.less_equal,
}


def _meets(table: pa.Table, condition: Condition) -> Any:
    column, operator = _column(table, condition.column), condition.operator
    kind = kind_of(column.type)
    if operator not in OPERATORS[kind]:
        raise InputError(f"the column {condition.column} does not support {operator!r}")
    if operator == "is empty":
        return pc.is_null(column, nan_is_null=True)
    if operator == "is not empty":
        return pc.invert(pc.is_null(column, nan_is_null=True))
    if not condition.values:
        raise InputError(f"{condition.column} {operator}: the value is missing")
    if operator in ("has", "has not"):
        found = _has(column, condition.values)
        return found if operator == "has" else ~found
    if kind in _AS_TEXT:
        column = as_text(column)
        if operator == "contains":
            return pc.match_substring(column, condition.values[0], ignore_case=True)
        values = pa.array(condition.values, pa.string())
    else:
        values = _values(condition, column.type)
    if values.type != column.type and kind == "number":
        column = column.cast(values.type, safe=False)
    if operator in _COMPARE:
        return _COMPARE[operator](column, values[0])
    found = pc.is_in(column, value_set=values)
    return found if operator == "is" else pc.invert(found)


def _has(column: pa.ChunkedArray, values: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return whether each list has one of the values."""
    lists = as_array(column)
    found = pc.is_in(pc.list_flatten(lists), value_set=pa.array(values, pa.string()))
    shown = np.zeros(len(lists), bool)
    shown[pc.list_parent_indices(lists).filter(found).to_numpy()] = True
    return shown


def _values(condition: Condition, type_: pa.DataType) -> pa.Array:
    texts = pa.array([one.strip() for one in condition.values], pa.string())
    try:
        if pa.types.is_timestamp(type_):
            return texts.cast(pa.timestamp("us")).cast(type_)
        if pa.types.is_date(type_):  # the page gives a day with its hour
            return texts.cast(pa.timestamp("us")).cast(type_, safe=False)
        try:
            return texts.cast(type_)
        except pa.ArrowException:
            # Integer columns can be compared with 2.5 too.
            return texts.cast(pa.float64())
    except pa.ArrowException:
        given = ", ".join(condition.values)
        raise InputError(f"{condition.column}: {given!r} is not a value of type {type_}") from None

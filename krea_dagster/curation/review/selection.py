"""What a reviewer wants to see: conditions on any column, a search, an order. Pure.

A selection comes from the page as JSON and is answered by Arrow's own functions. It never becomes a
text in a query language, so no value of it has to be quoted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.verdict import NONE, VERDICTS
from krea_dagster.errors import InputError

#: Numbers of rows, in the order in which they are shown.
Rows = npt.NDArray[np.int64]

#: What a condition may say of a column, by the column's kind.
OPERATORS: Final[Mapping[str, tuple[str, ...]]] = {
    "text": ("is", "is not", "contains", "is empty", "is not empty"),
    "number": ("is", "is not", "at least", "at most", "is empty", "is not empty"),
    "time": ("at least", "at most", "is empty", "is not empty"),
    "truth": ("is", "is empty", "is not empty"),
}

#: A selection of the page is a few words: more is a mistake or an attack.
_LONGEST: Final = 20_000
_MOST_CONDITIONS: Final = 50


@dataclass(frozen=True)
class Condition:
    """One condition: any of ``values`` for ``is``, none of them for ``is not``, else the first."""

    column: str
    operator: str
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Selection:
    """What is to be shown: ``verdicts`` of which ``none`` stands for those without one."""

    verdicts: frozenset[str] = frozenset()
    search: str = ""
    where: tuple[Condition, ...] = ()
    sort: str | None = None
    down: bool = False

    @classmethod
    def parse(cls, text: str) -> Selection:
        """Read a selection as the page writes it. Raises InputError.

        ``{"verdicts": ["none"], "search": "fox", "where": [["seed", "at least", "7"]],
        "sort": "sharpness", "down": true}``; all of it may be left out.
        """
        if len(text) > _LONGEST:
            raise InputError("the filter is too long")
        try:
            said = json.loads(text or "{}")
            verdicts = frozenset(map(str, said.get("verdicts", ())))
            where = tuple(
                Condition(str(column), str(operator), tuple(map(str, values)))
                for column, operator, *values in said.get("where", ())
            )
            sort = said.get("sort")
            selection = cls(
                verdicts=verdicts,
                search=str(said.get("search", "")).strip(),
                where=where,
                sort=None if sort is None else str(sort),
                down=bool(said.get("down", False)),
            )
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(f"the filter cannot be read: {error}") from None
        if not verdicts <= set(VERDICTS) or len(where) > _MOST_CONDITIONS:
            raise InputError(
                "the filter cannot be read: an unknown verdict, or too many conditions"
            )
        return selection


def kind_of(type_: pa.DataType) -> str:
    """``text``, ``number``, ``time`` or ``truth``; what is none of the others is text."""
    if pa.types.is_boolean(type_):
        return "truth"
    if pa.types.is_timestamp(type_) or pa.types.is_date(type_):
        return "time"
    numeric = (pa.types.is_integer, pa.types.is_floating, pa.types.is_decimal)
    return "number" if any(test(type_) for test in numeric) else "text"


def rows_of(table: pa.Table, selection: Selection, codes: npt.NDArray[np.int8]) -> Rows:
    """Return the rows that a selection asks for, in its order.

    ``codes`` are the rows' verdicts as places in ``VERDICTS``. Raises InputError for a column that
    the table does not have, or a value that is none of its kind.
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
    if kind_of(column.type) == "text":
        column = as_text(column)
    order = "descending" if selection.down else "ascending"
    # Equal ones stay in the table's order, so that a page never depends on the one before.
    keys = [("value", order), ("row", "ascending")]
    by = pa.table({"value": column, "row": pa.array(rows)})
    return np.asarray(rows[pc.sort_indices(by, sort_keys=keys).to_numpy()])


def empty_code() -> int:
    """The code of a row without a verdict."""
    return VERDICTS.index(NONE)


def _truth(mask: Any) -> npt.NDArray[np.bool_]:
    """A mask as numpy's; what is null is not met."""
    return np.asarray(pc.fill_null(mask, False).to_numpy(zero_copy_only=False), bool)


def _column(table: pa.Table, name: str) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise InputError(f"there is no column {name!r}")
    return table[name]


def as_text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column of any kind as texts; lists and structures as JSON."""
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


_COMPARE: Final[Mapping[str, Callable[[Any, Any], Any]]] = {
    "at least": pc.greater_equal,
    "at most": pc.less_equal,
}


def _meets(table: pa.Table, condition: Condition) -> Any:
    column, operator = _column(table, condition.column), condition.operator
    kind = kind_of(column.type)
    if operator not in OPERATORS[kind]:
        raise InputError(f"the column {condition.column} has no condition {operator!r}")
    if operator == "is empty":
        return pc.is_null(column, nan_is_null=True)
    if operator == "is not empty":
        return pc.invert(pc.is_null(column, nan_is_null=True))
    if not condition.values:
        raise InputError(f"{condition.column} {operator}: what? Give a value")
    if kind == "text":
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
            # Whole columns are compared with 2.5 all the same.
            return texts.cast(pa.float64())
    except pa.ArrowException:
        said = ", ".join(condition.values)
        raise InputError(
            f"{condition.column}: {said!r} is no value of its kind ({type_})"
        ) from None

"""The definition of how a cell of a prompt table is read: lenient in type, exact in value.

Each reader returns a list that holds, for every cell, its value, None where it is missing (null or
NaN), or a :class:`Bad` that describes the cell.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, TypeVar
from zoneinfo import ZoneInfo

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts.partitioning import TimePartitions, day_of_text, key_problem

_SHOWN: Final = 60


@dataclass(frozen=True, eq=False)
class Bad:
    """A cell that cannot be used: its printable value, and what is allowed.

    ``allowed`` is "" where the rule of the column says it.
    """

    value: str
    allowed: str = ""


T = TypeVar("T", bound=Hashable)
Cells = list[T | Bad | None]


def shown(value: object) -> str:
    """Return a value for a message: short, with nothing unprintable."""
    text = repr(value[: _SHOWN + 1] if isinstance(value, str | bytes) else value)
    return text if len(text) <= _SHOWN + 2 else f"{text[:_SHOWN]}…"


def plain(text: str) -> str:
    """Return a name for a message: as ``shown``, without quotes."""
    return shown(text).strip("'\"") or "''"


def is_text(kind: pa.DataType) -> bool:
    """Return whether columns of this type hold text."""
    return bool(
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    )


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Return the type of a column's values, without dictionary and view encodings."""
    if pa.types.is_dictionary(kind):
        return plain_type(kind.value_type)
    if pa.types.is_string_view(kind):
        return pa.string()
    if pa.types.is_binary_view(kind):
        return pa.binary()
    return kind


def plain_array(array: pa.Array) -> pa.Array:
    """Return a column without dictionary and view encodings."""
    kind = plain_type(array.type)
    return array if kind == array.type else array.cast(kind)


def text_cells(array: pa.Array) -> Cells[str]:
    """Read text. Whole numbers are read as their digits."""
    array = plain_array(array)
    if pa.types.is_integer(array.type):
        array = array.cast(pa.string())
    if pa.types.is_floating(array.type):
        return _only_missing(array)
    try:
        values: Cells[str] = array.to_pylist()
    except UnicodeDecodeError:
        values = [_text_cell(scalar) for scalar in array]
    # Arrow checks nothing here, and a NUL is valid UTF-8 that PostgreSQL cannot store.
    return [
        Bad(shown(value), "must not hold NUL characters")
        if isinstance(value, str) and "\0" in value
        else value
        for value in values
    ]


def _text_cell(scalar: Any) -> str | Bad | None:
    try:
        value: str | None = scalar.as_py()
    except UnicodeDecodeError:
        return Bad(shown(scalar.as_buffer().to_pybytes()), "must be valid UTF-8 text")
    return value


def whole_cells(array: pa.Array) -> Cells[int]:
    """Read whole numbers, of any width. 3.0 is one: pandas writes a column of 3 and null so."""
    array = plain_array(array)
    if pa.types.is_integer(array.type):
        integers: Cells[int] = array.to_pylist()
        return integers
    if pa.types.is_float16(array.type):  # pyarrow 19 has values of NumPy for it
        array = array.cast(pa.float32())
    return [_whole_cell(value) for value in array.to_pylist()]


def _whole_cell(value: float | Decimal | None) -> int | Bad | None:
    if value is None or math.isnan(value):
        return None
    number = Decimal(value)
    if number.is_finite() and number == number.to_integral_value():
        return int(number)
    return Bad(shown(value) if isinstance(value, float) else str(value))


def flag_cells(array: pa.Array) -> Cells[bool]:
    """Read booleans. 1 and "true" are not booleans."""
    array = plain_array(array)
    if pa.types.is_floating(array.type):
        return _only_missing(array)
    flags: Cells[bool] = array.to_pylist()
    return flags


def _only_missing(array: pa.Array) -> Cells[Any]:
    """Read floats, which pandas makes of a column in which every cell is missing."""
    return [
        None if value is None or math.isnan(value) else Bad(shown(value))
        for value in array.to_pylist()
    ]


_NO_KEY: Final = Bad("missing", "is needed in every row: it decides the partition")


def column_keys(
    array: pa.Array, problem: Callable[[str], str | None] = key_problem
) -> list[str | Bad]:
    """Read a column as partition keys: text, whole numbers, booleans, or dates."""
    array = plain_array(array)
    kind = array.type
    if pa.types.is_boolean(kind):
        flags = array.to_pylist()
        texts: Cells[str] = [None if flag is None else str(flag).lower() for flag in flags]
    elif pa.types.is_date(kind):
        texts = array.cast(pa.date32()).cast(pa.string()).to_pylist()
    else:
        texts = text_cells(array)

    def key(text: str) -> str | Bad:
        found = problem(text)
        return text if found is None else Bad(shown(text), f"{found}, to be a partition key")

    return [_key(text, key) for text in texts]


def time_keys(by: TimePartitions, array: pa.Array) -> list[str | Bad]:
    """Read a column of dates, times or ISO texts as keys of days, weeks or months."""
    array = plain_array(array)
    if pa.types.is_timestamp(array.type):
        array = local_days(array, by.zone)
    if pa.types.is_date(array.type):
        array = array.cast(pa.date32()).cast(pa.string())

    def key(text: str) -> str | Bad:
        day = day_of_text(text, by.zone)
        if day is None:
            return Bad(shown(text), "must be a date or time such as 2026-11-01")
        return by.key_of(date.fromisoformat(day))

    return [_key(text, key) for text in text_cells(array)]


def local_days(times: pa.Array, zone: str) -> pa.Array:
    """Return the day in a zone of each time; times without a zone are not converted."""
    # Arrow keeps times with a zone in UTC: without the zone they are UTC times.
    plain_times = times.view(pa.timestamp(times.type.unit))
    if times.type.tz is None or zone == "UTC":
        return pc.floor_temporal(plain_times, unit="day").cast(pa.date32(), safe=False)
    # By Python's zones: Arrow needs the system's. In all of them days begin on a quarter hour.
    quarters = pc.floor_temporal(plain_times, 15, unit="minute").cast(pa.timestamp("s"))
    encoded = quarters.dictionary_encode()
    there = ZoneInfo(zone)
    days = [
        _local_day(seconds, there) for seconds in encoded.dictionary.cast(pa.int64()).to_pylist()
    ]
    return pa.array(days, pa.date32()).take(encoded.indices)


def _local_day(seconds: int, zone: ZoneInfo) -> date | None:
    try:
        return (_EPOCH + timedelta(seconds=seconds)).astimezone(zone).date()
    except OverflowError:
        return None


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)


def _key(text: str | Bad | None, key: Callable[[str], str | Bad]) -> str | Bad:
    if text is None:
        return _NO_KEY
    return key(text) if isinstance(text, str) else text

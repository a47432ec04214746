"""What the columns of a prompt table may hold, and how whole columns are read.

``cells`` defines how a cell is read. Here each different value of a column is read once. A column
of prompts, prompt_ids or seeds, whose values nearly all differ, is first tried as a whole.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.models import QUALITIES, SEED_MAX, SIZES
from krea_dagster.prompts.blanks import are_invisible, is_invisible
from krea_dagster.prompts.cells import (
    Bad,
    Cells,
    column_keys,
    flag_cells,
    is_text,
    local_days,
    plain_array,
    shown,
    text_cells,
    time_keys,
    whole_cells,
)
from krea_dagster.prompts.hints import quality_hint, size_hint
from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    MultiPartitions,
    TimePartitions,
    dimension_problem,
    key_problem,
)
from krea_dagster.prompts.requests import MAX_IMAGES, Defaults

_WHOLE: Final = re.compile(r"([+-]?[0-9]+)(?:\.0*)?", re.ASCII)
_FLAGS: Final = {"true": True, "false": False}

#: The cells of a column that cannot be used, by their place in it.
BadCells = dict[int, Bad]


@dataclass(frozen=True)
class ColumnRule:
    """What a recognised column may hold.

    ``fits`` says whether a type can hold it, ``read`` reads its cells, ``is_right`` checks a value,
    ``allowed`` says what is right, and ``hint`` what a wrong value may mean. ``quick`` reads a
    column in which every cell is right as a whole, and returns None for any other.
    """

    kind: pa.DataType
    allowed: str
    fits: Callable[[pa.DataType], bool]
    read: Callable[[pa.Array], Cells[Any]]
    is_right: Callable[[Any], bool]
    required: bool = False
    quick: Callable[[pa.Array], pa.Array | None] = field(default=lambda _: None)
    hint: Callable[[Any], str] = field(default=lambda _: "")

    def cells(self, array: pa.Array) -> Cells[Any]:
        """Read cells, and check them."""
        return [self._checked(cell) for cell in self.read(array)]

    def _checked(self, cell: Any) -> Any:
        if isinstance(cell, Bad):
            return cell
        if cell is None:
            return Bad("missing") if self.required else None
        if self.is_right(cell):
            return cell
        hint = self.hint(cell)
        return Bad(shown(cell), f"{self.allowed}; {hint}" if hint else "")


def read_recognised(
    given: Mapping[str, pa.Array], rows: int, defaults: Defaults
) -> tuple[dict[str, pa.Array], dict[str, BadCells]]:
    """Read the recognised columns of some rows, with the defaults filled in, and the bad cells.

    Where the table has no ``prompt`` or ``prompt_id`` the texts are empty.
    """
    columns: dict[str, pa.Array] = {}
    bad: dict[str, BadCells] = {}
    for name, rule in RULES.items():
        default = pa.scalar("" if rule.required else getattr(defaults, name, 0), rule.kind)
        if name not in given:
            columns[name] = pa.repeat(default, rows)
            continue
        values = rule.quick(given[name])
        if values is None:
            values, bad[name] = _by_value(given[name], rule.cells, rule.kind)
        columns[name] = values if rule.required else values.fill_null(default)
    return columns, bad


def partition_keys(
    by: ColumnPartitions | TimePartitions | MultiPartitions, columns: Mapping[str, pa.Array]
) -> tuple[pa.Array, dict[str, BadCells]]:
    """Read the columns that decide the partition as keys, null where a cell is bad.

    The bad cells are given by column.
    """
    if not isinstance(by, MultiPartitions):
        keys, bad = _keys_of(by, columns[by.column], key_problem)
        return keys, {by.column: bad}
    values, bad_values = _keys_of(by.by_column, columns[by.by_column.column], dimension_problem)
    times, bad_times = _keys_of(by.time, columns[by.time.column], key_problem)
    keys = pc.binary_join_element_wise(values, times, MultiPartitions.BAR)
    return keys, {by.by_column.column: bad_values, by.time.column: bad_times}


def text_values(array: pa.Array) -> pa.Array:
    """Read text, null where a cell is missing or bad."""
    values = texts(array)
    return _by_value(array, text_cells, pa.string())[0] if values is None else values


def texts(array: pa.Array) -> pa.Array | None:
    """Read text as a whole, as strings with nulls; None where a cell is not usable text."""
    array = plain_array(array)
    if pa.types.is_integer(array.type):
        return array.cast(pa.string())
    if not is_text(array.type):
        return None
    try:
        array.validate(full=True)
    except pa.ArrowInvalid:
        return None
    # A NUL is valid UTF-8 that PostgreSQL cannot store.
    if _may_hold_nul(array) and pc.any(pc.match_substring(array, "\0")).as_py():
        return None
    return array.cast(pa.string())


def type_of_text(column: str) -> pa.DataType:
    """Return the type of a column whose cells are written as text."""
    rule = RULES.get(column)
    return pa.string() if rule is None or rule.fits(pa.string()) else rule.kind


def value_of_text(column: str, text: str) -> str | int | bool | Bad | None:
    """Return the value of a cell that is written as text; an empty one is missing."""
    kind = type_of_text(column)
    if not text:
        return None
    if pa.types.is_string(kind):
        return text
    value: int | bool | None
    if pa.types.is_boolean(kind):
        value = _FLAGS.get(text.strip().lower())
    else:
        found = _WHOLE.fullmatch(text.strip())
        # Longer numbers do not fit, and their digits are in the message.
        value = int(found[1]) if found and len(found[1]) < 19 else None
    return Bad(shown(text), RULES[column].allowed) if value is None else value


def as_mask(flags: pa.Array | pa.ChunkedArray) -> npt.NDArray[np.bool_]:
    """Return booleans as a numpy array."""
    return np.asarray(flags.to_numpy(zero_copy_only=False), np.bool_)


def _may_hold_nul(array: pa.Array) -> bool:
    """Say whether a byte of the texts is 0; to look at each text takes ten times as long."""
    if not len(array):
        return False
    _, ends, data = array.buffers()
    number = np.dtype(np.int64 if pa.types.is_large_string(array.type) else np.int32)
    places = np.frombuffer(ends, number, len(array) + 1, array.offset * number.itemsize)
    first, end = int(places[0]), int(places[-1])
    return data is not None and not np.frombuffer(data, np.uint8, end - first, first).all()


def _by_value(
    array: pa.Array, read: Callable[[pa.Array], Iterable[Any]], kind: pa.DataType
) -> tuple[pa.Array, BadCells]:
    """Read each different value once; return the values, null where bad or missing, and the bad."""
    array = plain_array(array)
    try:
        encoded = array.dictionary_encode(null_encoding="encode")
        distinct, places = encoded.dictionary, encoded.indices
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):  # halves
        distinct, places = array, pa.array(range(len(array)), pa.int64())
    cells = list(read(distinct))
    bad = {at: cell for at, cell in enumerate(cells) if isinstance(cell, Bad)}
    values = pa.array([None if isinstance(cell, Bad) else cell for cell in cells], kind)
    if not bad:
        return values.take(places), {}
    where = {at: bad[place] for at, place in enumerate(places.to_pylist()) if place in bad}
    return values.take(places), where


def _keys_of(
    by: ColumnPartitions | TimePartitions, array: pa.Array, problem: Callable[[str], str | None]
) -> tuple[pa.Array, BadCells]:
    array = plain_array(array)
    if isinstance(by, ColumnPartitions):
        return _by_value(array, lambda cells: column_keys(cells, problem), pa.string())
    if pa.types.is_timestamp(array.type):
        array = local_days(array, by.zone)  # nearly all times differ, and few days do
    return _by_value(array, lambda cells: time_keys(by, cells), pa.string())


def _right_prompts(array: pa.Array) -> pa.Array | None:
    values = texts(array)
    if values is None or values.null_count or pc.any(are_invisible(values)).as_py():
        return None
    return values


def _right_ids(array: pa.Array) -> pa.Array | None:
    values = texts(array)
    if values is None or values.null_count or pc.any(pc.equal(values, "")).as_py():
        return None
    return values


def _right_seeds(array: pa.Array) -> pa.Array | None:
    array = plain_array(array)
    try:
        if pa.types.is_floating(array.type):
            array = pc.if_else(pc.is_nan(array), pa.scalar(None, array.type), array)
        numbers = array.cast(pa.int64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None
    least, most = (bound.as_py() for bound in pc.min_max(numbers).values())
    return numbers if least is None or (least >= 0 and most <= SEED_MAX) else None


def _is_text_or_floats(kind: pa.DataType) -> bool:
    # pandas makes floats of a column in which every cell is missing, so they fit every column.
    return bool(is_text(kind) or pa.types.is_floating(kind))


def _is_number(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind))


#: The columns that mean something, in the order in which their problems are shown.
RULES: Final[Mapping[str, ColumnRule]] = {
    "prompt": ColumnRule(
        pa.string(),
        "must be text, and not only white space or invisible characters",
        _is_text_or_floats,
        text_cells,
        lambda prompt: not is_invisible(prompt),
        required=True,
        quick=_right_prompts,
    ),
    "prompt_id": ColumnRule(
        pa.string(),
        "must be text or a whole number in every row, and not empty",
        lambda kind: _is_text_or_floats(kind) or bool(pa.types.is_integer(kind)),
        text_cells,
        bool,
        required=True,
        quick=_right_ids,
    ),
    "size": ColumnRule(
        pa.string(),
        f"must be one of {', '.join(SIZES)}",
        _is_text_or_floats,
        text_cells,
        SIZES.__contains__,
        hint=size_hint,
    ),
    "quality": ColumnRule(
        pa.string(),
        f"must be one of {', '.join(QUALITIES)}",
        _is_text_or_floats,
        text_cells,
        QUALITIES.__contains__,
        hint=quality_hint,
    ),
    "seed": ColumnRule(
        pa.int64(),
        f"must be a whole number from 1 to {SEED_MAX}, or 0 or empty to have one drawn",
        _is_number,
        whole_cells,
        lambda seed: 0 <= seed <= SEED_MAX,
        quick=_right_seeds,
    ),
    "nsfw_check": ColumnRule(
        pa.bool_(),
        "must be true or false (a column of booleans)",
        lambda kind: bool(pa.types.is_boolean(kind) or pa.types.is_floating(kind)),
        flag_cells,
        lambda _: True,
    ),
    "num_images": ColumnRule(
        pa.int64(),
        f"must be a whole number from 1 to {MAX_IMAGES}",
        _is_number,
        whole_cells,
        lambda count: 1 <= count <= MAX_IMAGES,
    ),
}

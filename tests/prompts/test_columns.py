"""Columns of a prompt table: a whole column is read only where every cell is right."""

from __future__ import annotations

from decimal import Decimal

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.prompts.cells import Bad
from krea_dagster.prompts.columns import RULES, read_recognised, texts
from krea_dagster.prompts.requests import Defaults

TYPES = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", TYPES, ids=str)
def test_text_with_a_nul_is_not_read_as_a_whole_and_a_slice_counts_alone(kind: pa.DataType) -> None:
    column = pa.array(["a", "b\0", "", "c", None, "d"], pa.string()).cast(kind)
    assert texts(column) is None
    assert texts(column.slice(1, 2)) is None
    for part, values in (
        (column.slice(2), ["", "c", None, "d"]),
        (column.slice(0, 1), ["a"]),
        (column.slice(2, 1), [""]),
        (column.slice(6), []),
    ):
        found = texts(part)
        assert found is not None
        assert found.type == pa.string()
        assert found.to_pylist() == values


def test_a_nul_that_a_missing_cell_hides_does_no_harm() -> None:
    given = pa.array(["a", "b\0"], pa.string())
    hidden = pa.Array.from_buffers(
        pa.string(), 2, [pa.py_buffer(b"\1"), *given.buffers()[1:]], null_count=1
    )
    found = texts(hidden)
    assert found is not None
    assert found.to_pylist() == ["a", None]


TEXTS = st.lists(st.none() | st.sampled_from(["", " ", "\t\u3000", "a", "a\0", "雪"]), max_size=6)
FLOATS = st.sampled_from([None, float("nan"), 0.0, 3.0, 1.5, -1.0, float("inf"), 2.0**80])
NUMBERS = st.lists(st.none() | st.integers(-(2**63), 2**63 - 1) | st.integers(0, 3), max_size=6)
COLUMNS = st.one_of(
    TEXTS.map(lambda cells: pa.array(cells, pa.string())),
    TEXTS.map(lambda cells: pa.array(cells, pa.large_string()).dictionary_encode()),
    NUMBERS.map(lambda cells: pa.array(cells, pa.int64())),
    st.lists(st.none() | st.integers(0, 2**64 - 1), max_size=6).map(
        lambda cells: pa.array(cells, pa.uint64())
    ),
    st.lists(FLOATS, max_size=6).map(lambda cells: pa.array(cells, pa.float64())),
    st.lists(st.sampled_from([None, 1.0, float("nan")]), max_size=6).map(
        lambda cells: pa.array(cells, pa.float32()).cast(pa.float16())
    ),
    st.lists(st.none() | st.sampled_from([Decimal("1.00"), Decimal("2.50")]), max_size=6).map(
        lambda cells: pa.array(cells, pa.decimal128(9, 2))
    ),
    st.lists(st.none() | st.booleans(), max_size=6).map(lambda cells: pa.array(cells, pa.bool_())),
    st.integers(0, 3).map(pa.nulls),
)


@pytest.mark.parametrize("name", RULES)
@given(array=COLUMNS)
def test_a_column_has_the_values_and_the_bad_cells_of_its_cells_read_one_by_one(
    name: str, array: pa.Array
) -> None:
    rule = RULES[name]
    plain = array.type.value_type if pa.types.is_dictionary(array.type) else array.type
    if not (rule.fits(plain) or pa.types.is_null(plain)):
        return  # such a column is a problem of the table
    cells = [rule.cells(array.slice(at, 1))[0] for at in range(len(array))]
    columns, bad = read_recognised({name: array}, len(array), Defaults())
    default = {"size": "1:1", "quality": "1K", "seed": 0, "nsfw_check": False, "num_images": 1}
    expected = [None if isinstance(cell, Bad) else cell for cell in cells]
    assert columns[name].to_pylist() == [
        default.get(name) if cell is None else cell for cell in expected
    ]
    found = {at: (cell.value, cell.allowed) for at, cell in bad.get(name, {}).items()}
    assert found == {
        at: (cell.value, cell.allowed) for at, cell in enumerate(cells) if isinstance(cell, Bad)
    }

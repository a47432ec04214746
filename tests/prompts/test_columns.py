"""Columns are taken whole only where every cell is plainly right."""

from __future__ import annotations

import pyarrow as pa
import pytest

from krea_dagster.prompts.validate_columns import texts

KINDS = [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_text_with_a_nul_is_not_taken_and_only_the_rows_at_hand_count(kind: pa.DataType) -> None:
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

"""Columns of types that readers do not have are exported as the nearest type, value by value."""

from __future__ import annotations

import uuid
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest

from krea_dagster.curation.export.exported_types import ExportedTypes

JSON = ExportedTypes.of("jsonl")
PARQUET = ExportedTypes.of("parquet")
SMALL = pa.map_(pa.string(), pa.int8())
PAIRS = pa.map_(pa.string(), pa.list_(pa.decimal128(4, 1)))


@pytest.mark.parametrize(
    ("array", "values"),
    [
        (pa.array([["a"], None, []], pa.large_list(pa.string())), [["a"], None, []]),
        (pa.array([[1, 2], None], pa.list_(pa.int8(), 2)), [[1, 2], None]),
        (pa.array([[1], None, [2, 3]], pa.list_view(pa.int8())), [[1], None, [2, 3]]),
        (pa.array([b"ab", None], pa.binary(2)), [b"ab", None]),
        (pa.array(["a", None], pa.string_view()), ["a", None]),
        (pa.nulls(2), [None, None]),
        (pa.array(["a", None, "a"]).dictionary_encode(), ["a", None, "a"]),
        (
            pa.array([[("a", [Decimal("1.5")]), ("b", None)], None, []], PAIRS),
            [[{"key": "a", "value": [Decimal("1.5")]}, {"key": "b", "value": None}], None, []],
        ),
        (
            pa.ExtensionArray.from_storage(
                pa.uuid(), pa.array([uuid.UUID(int=1).bytes, None], pa.binary(16))
            ),
            [str(uuid.UUID(int=1)), None],
        ),
        (
            pa.array(
                [{"a": [("x", 1)]}, None], pa.struct([("a", pa.map_(pa.string(), pa.int8()))])
            ),
            [{"a": [{"key": "x", "value": 1}]}, None],
        ),
    ],
)
def test_a_value_keeps_its_content_also_in_a_part_of_an_array(
    array: Any, values: list[Any]
) -> None:
    for begin in range(len(values)):
        found = JSON.convert(array[begin:])
        assert found.to_pylist() == values[begin:]
        assert found.type == JSON.type_of(array.type)
        found.validate(full=True)


def test_large_unsigned_integers_are_exact_in_parquet_and_text_elsewhere() -> None:
    nested = pa.array([[2**64 - 1], None], pa.list_(pa.uint64()))
    assert PARQUET.convert(nested).equals(nested)
    assert JSON.convert(nested).to_pylist() == [["18446744073709551615"], None]


def test_usual_types_stay() -> None:
    for kind in (pa.int64(), pa.timestamp("us", "UTC"), pa.list_(pa.string()), pa.large_string()):
        assert JSON.type_of(kind) == kind

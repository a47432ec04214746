"""Filters of rows, as people write them."""

from __future__ import annotations

from typing import Any

import pyarrow as pa
import pytest

from krea_dagster.curation.column_filter import matching, parse_filters
from krea_dagster.errors import ConfigError

ROWS = pa.record_batch(
    {
        "name": ["a", "b", None, "a=b"],
        "sharpness": [10.0, 20.5, None, 30.0],
        "seed": pa.array([1, 2, 3, None], pa.int32()),
    }
)


@pytest.mark.parametrize(
    ("texts", "places"),
    [
        ([], [0, 1, 2, 3]),
        (["name=a"], [0]),
        (["name=a", "name=b"], [0, 1]),
        (["name=a=b"], [3]),
        (["name="], [2]),
        (["name!=a"], [1, 3]),
        (["sharpness>=20.5"], [1, 3]),
        (["sharpness>20.5"], [3]),
        (["sharpness>=20", "sharpness<30"], [1]),
        (["seed<=2"], [0, 1]),
        (["seed=", "seed=1"], [0, 3]),
        (["name=a", "seed>1"], []),
        (["missing="], [0, 1, 2, 3]),
        (["missing>=1"], []),
    ],
)
def test_the_rows_that_match(texts: list[str], places: list[int]) -> None:
    found: Any = matching(ROWS, parse_filters(texts)).to_pylist()
    assert [at for at, matches in enumerate(found) if matches] == places


@pytest.mark.parametrize("text", ["name", "=a", ">=1", ""])
def test_what_is_no_filter(text: str) -> None:
    with pytest.raises(ConfigError, match="is not COLUMN=VALUE"):
        parse_filters([text])


@pytest.mark.parametrize("text", ["seed>=many", "sharpness<", "seed=x"])
def test_a_value_that_does_not_fit_the_column_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="has the type"):
        matching(ROWS, parse_filters([text]))

"""Values in Python as streams of Arrow batches."""

from __future__ import annotations

from typing import Any

import pandas as pd
import polars as pl
import pyarrow as pa
import pytest

from krea_dagster.errors import ConfigError
from krea_dagster.prompts.values import stream_of


def table_of(value: Any) -> pa.Table:
    return stream_of(value, "the given prompts").read_all()


TEXTS = ["a boat", "a gull"]


@pytest.mark.parametrize(
    "column",
    [
        TEXTS,
        (text for text in TEXTS),
        pd.Series(TEXTS, name="ideas"),
        pl.Series(TEXTS),
        pa.array(TEXTS),
        pa.chunked_array([TEXTS]),
    ],
    ids=["list", "generator", "pandas", "polars", "array", "chunked"],
)
def test_a_column_of_texts_is_a_column_of_prompts(column: Any) -> None:
    assert table_of(column).to_pydict() == {"prompt": TEXTS}


def test_another_column_is_refused() -> None:
    with pytest.raises(ConfigError, match="the given prompts is one column of the type int64"):
        table_of(pd.Series([1, 2]))


def test_of_an_index_of_pandas_only_a_name_counts() -> None:
    frame = pd.DataFrame({"prompt": ["a", "b", "c"], "id": ["x", "y", "z"]})
    assert table_of(frame[frame.prompt != "b"]).column_names == ["prompt", "id"]
    assert table_of(frame.set_index("id")).to_pydict() == {
        "prompt": ["a", "b", "c"],
        "id": ["x", "y", "z"],
    }


def test_types_that_a_parquet_file_lacks_are_replaced() -> None:
    found = table_of(
        pl.DataFrame({"prompt": TEXTS, "theme": pl.Series(["sea", "sea"], dtype=pl.Categorical)})
    )
    assert found.schema.types == [pa.string(), pa.dictionary(pa.uint32(), pa.string())]
    assert found.to_pydict() == {"prompt": TEXTS, "theme": ["sea", "sea"]}
    runs = pa.RunEndEncodedArray.from_arrays([2], ["sea"])
    assert table_of(pa.table({"theme": runs})).to_pydict() == {"theme": ["sea", "sea"]}


def test_cells_of_several_types_name_the_column() -> None:
    with pytest.raises(ConfigError, match="the column seed of the given prompts"):
        table_of([{"prompt": "a", "seed": 1}, {"prompt": "b", "seed": "two"}])


def test_no_row_is_an_empty_table() -> None:
    assert table_of([]).to_pydict() == {"prompt": []}
    assert table_of(pd.DataFrame({"prompt": []})).num_rows == 0

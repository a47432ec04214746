"""A prompt table that is no path: a value in Python, or a function that returns one."""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.dataset as ds
import pytest

from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.prompts.reference import read_rows

Write = Callable[..., str]

COLUMNS = {
    "prompt_id": ["a", "b", "c"],
    "prompt": ["a boat", "a lighthouse", "a gull"],
    "seed": [1, None, 3],
    "theme": ["sea", "coast", "sea"],
}
ARROW = pa.table(COLUMNS)


def opened(source: Any, by: str = "column:theme", **options: Any) -> PromptTable:
    return PromptTable(source, parse_partition_by(by), **options)


def relation() -> duckdb.DuckDBPyRelation:
    connection = duckdb.connect()
    connection.register("given", ARROW)
    return connection.sql("select * from given")


VALUES: dict[str, Callable[[], Any]] = {
    "a pandas DataFrame": ARROW.to_pandas,
    "a Polars DataFrame": lambda: pl.DataFrame(COLUMNS),
    "a Polars LazyFrame": lambda: pl.DataFrame(COLUMNS).lazy(),
    "an Arrow Table": lambda: ARROW,
    "an Arrow RecordBatch": lambda: ARROW.to_batches()[0],
    "an Arrow RecordBatchReader": ARROW.to_reader,
    "an Arrow InMemoryDataset": lambda: ds.dataset(ARROW),
    "a DuckDB relation": relation,
    "a list": ARROW.to_pylist,
}


@pytest.mark.parametrize("made", VALUES.values(), ids=VALUES)
def test_a_value_asks_for_the_same_images_as_its_file(made: Any, write: Write) -> None:
    file, value = opened(write(ARROW)), opened(made())
    assert value.partition_keys() == file.partition_keys() == ["coast", "sea"]
    assert value.versions() == file.versions()
    assert value.row_count() == 3
    # Also a stream, which can be read once only, is there for the second reading.
    assert read_rows(value, ["sea"]).rows == read_rows(file, ["sea"]).rows
    assert read_rows(replace(value, name="other")).rows == read_rows(file).rows


@pytest.mark.parametrize(("named", "made"), VALUES.items(), ids=VALUES)
def test_an_error_says_what_was_given(named: str, made: Any) -> None:
    with pytest.raises(PromptTableError, match="1 problem") as caught:
        opened(made(), "column:topic").plan()
    assert str(caught.value).startswith(f"the prompt table given as {named}: ")
    with pytest.raises(PromptTableError, match=r"missing; column:topic needs this column"):
        opened(made(), "column:topic").partition_keys()


def test_a_path_may_be_a_path(write: Write) -> None:
    path = Path(write(ARROW))
    assert opened(path).versions() == opened(str(path)).versions()
    assert opened(path).place == opened(str(path)).place == str(path)


@pytest.mark.parametrize(
    ("source", "kind"),
    [
        ("prompts.parquet", "parquet"),
        ("s3://bucket/folder", "parquet"),
        ("Ideas.CSV", "csv"),
        (Path("ideas.csv.gz"), "csv"),
        ("ideas.ndjson", "jsonl"),
        ("iceberg://prod/shop.ideas", "iceberg"),
        ([{"prompt": "a boat"}], "python"),
        (list, "python"),
    ],
)
def test_the_kind_of_a_source_is_known_without_a_look_at_it(source: object, kind: str) -> None:
    assert opened(source).kind == kind


def test_a_function_is_called_whenever_the_table_is_read(write: Write) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "a boat"}]

    def ideas() -> list[dict[str, Any]]:
        return rows

    table = opened(ideas, "hash:2")
    assert table.row_count() == 1
    before, mark = table.versions(), table.mark()
    assert table.mark() == mark
    rows.append({"prompt": "a gull"})
    assert table.row_count() == 2
    assert table.versions() != before
    assert table.mark() not in ("", mark)


def test_a_pinned_table_calls_its_function_once() -> None:
    calls: list[int] = []

    def ideas() -> list[dict[str, Any]]:
        calls.append(1)
        return [{"prompt": f"idea {len(calls)}"}]

    table = opened(ideas, "hash:2", name="ideas").pinned()
    assert table.versions() == table.pinned().versions()
    assert table.mark() == table.mark()
    assert len(calls) == 1
    assert table.name == "ideas"


def test_a_function_may_return_a_path(write: Write) -> None:
    path = write(ARROW)
    table = opened(lambda: Path(path))
    assert table.versions() == opened(path).versions()
    assert table.place == ""


def test_what_a_function_does_wrong_names_the_function() -> None:
    def broken() -> None:
        raise RuntimeError("no connection to postgresql://me:secret@host/db")

    def empty() -> None:
        return None

    with pytest.raises(ConfigError, match="of the function broken raised RuntimeError") as caught:
        opened(broken).plan()
    assert "secret" not in str(caught.value)
    with pytest.raises(TypeError, match="the prompt table of the function empty is a NoneType"):
        opened(empty).plan()
    with pytest.raises(PromptTableError, match="the prompt table of the function rows: 1 problem"):
        opened(rows, "hash:2").plan()


def rows() -> list[dict[str, Any]]:
    return [{"prompt": ""}]


@pytest.mark.parametrize(("wrong", "said"), [(5, "is an int"), ({"prompt": "a"}, "a list of")])
def test_what_is_no_table_says_so(wrong: object, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        opened(wrong).plan()


def test_a_value_that_cannot_be_made_names_itself() -> None:
    lazy = pl.LazyFrame({"prompt": ["a"]}).select(pl.col("nothing"))
    with pytest.raises(ConfigError, match=r"given as a Polars LazyFrame cannot be read: .*nothing"):
        opened(lazy).plan()


def test_the_copy_of_a_value_goes_with_its_table(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    table = opened(ARROW)
    files = table.pinned().source.files()
    assert len(list(tmp_path.glob("krea-prompts-*"))) == 1
    del table
    gc.collect()
    assert files[0].row_count == sum(batch.num_rows for _, batch in files[0].batches(["prompt"]))
    del files
    gc.collect()
    assert list(tmp_path.iterdir()) == []

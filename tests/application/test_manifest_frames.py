"""Manifests as pandas, Polars, DuckDB and Arrow tables, with columns and images."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any, BinaryIO

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from PIL import Image

from krea_dagster.application.manifest_frames import Selection, load
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"columns": "prompt_id"}, "give a list of column names"),
        ({"columns": []}, "give a list of column names"),
        ({"images": "png"}, "there are 'bytes' and 'pil'"),
        ({"images": "bytes", "most_images": 0}, "most_images is 0"),
    ],
)
def test_a_wish_that_cannot_be_read_is_refused(metadata: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Selection.parse(metadata)


def test_partitions_that_carry_other_columns_are_read_together(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    row = {"prompt_id": "a", "partition_key": "one"}
    plain = pa.Table.from_pylist([row], MANIFEST_SCHEMA)
    write_manifest(storage, "one", plain)
    write_manifest(storage, "two", plain.append_column("mood", pa.array(["calm"])))
    keys = ["one", "two", "three"]
    for annotation in (pa.Table, pl.DataFrame, pl.LazyFrame, duckdb.DuckDBPyRelation):
        for wanted in (["mood"], ["prompt_id", "mood"], None):
            given = load(storage, keys, (), annotation=annotation, selection=Selection(wanted))
            if isinstance(given, pl.LazyFrame):
                given = given.collect()
            arrow = given if isinstance(given, pa.Table) else pl.DataFrame(given).to_arrow()
            assert arrow["mood"].to_pylist() == [None, "calm"]
    # Where there is no file yet, a further column is not known to be wrong.
    empty = load(storage, ["three"], (), annotation=pa.Table, selection=Selection(["seed", "mood"]))
    assert (empty.num_rows, empty.schema.names) == (0, ["seed", "mood"])


@pytest.fixture(params=["a folder", "behind a URL"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    """Two images and a row without one, in two partitions."""
    url = f"memory://io-{tmp_path.name}"
    storage = Storage(str(tmp_path) if request.param == "a folder" else url)
    for number, key in enumerate(["one", "two"]):
        file = io.BytesIO()
        Image.new("RGB", (8, 4 + number), "teal").save(file, "PNG")
        content = file.getvalue()
        storage.write(f"images/{number}.png", lambda file, content=content: put(file, content))  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        rows = [{"prompt_id": key, "image_path": storage.locate(f"images/{number}.png")}]
        rows += [{"prompt_id": "none"}] if key == "two" else []
        write_manifest(storage, key, pa.Table.from_pylist(rows, MANIFEST_SCHEMA))
    return storage


def put(file: BinaryIO, content: bytes) -> None:
    file.write(content)


def give(storage: Storage, annotation: Any, **wishes: Any) -> Any:
    return load(storage, ["one", "two"], (), annotation=annotation, selection=Selection(**wishes))


@pytest.mark.parametrize(
    "annotation", [pa.Table, pd.DataFrame, pl.DataFrame, duckdb.DuckDBPyRelation]
)
def test_images_come_as_bytes_in_a_column(stored: Storage, annotation: Any) -> None:
    given = give(stored, annotation, images="bytes", columns=["seed"])
    if isinstance(given, duckdb.DuckDBPyRelation | pl.DataFrame):
        given = pl.DataFrame(given).to_arrow()
    if isinstance(given, pd.DataFrame):
        given = pa.Table.from_pandas(given, preserve_index=False)
    assert given.schema.names == ["seed", "image"]
    first, second, none = given["image"].to_pylist()
    assert Image.open(io.BytesIO(first)).size == (8, 4)
    assert Image.open(io.BytesIO(second)).size == (8, 5)
    assert none is None


def test_images_come_as_pil_in_pandas_and_nowhere_else(stored: Storage) -> None:
    frame = give(stored, pd.DataFrame, images="pil")
    first, second, none = frame["image"]
    assert (first.size, second.size, none) == ((8, 4), (8, 5), None)
    assert first.getpixel((0, 0)) == (0, 128, 128)
    with pytest.raises(ConfigError, match=r"needs the annotation pandas\.DataFrame"):
        give(stored, pl.DataFrame, images="pil")


def test_more_images_than_agreed_are_refused_before_one_is_read(stored: Storage) -> None:
    with pytest.raises(ConfigError, match=r"2 images would be loaded, but the limit is 1"):
        give(stored, pa.Table, images="bytes", most_images=1)
    assert give(stored, pa.Table, images="bytes", most_images=2).num_rows == 3


def test_an_image_that_is_gone_is_named(stored: Storage) -> None:
    table = pa.Table.from_pylist(
        [{"prompt_id": "lost", "image_path": stored.locate("images/9.png")}], MANIFEST_SCHEMA
    )
    write_manifest(stored, "two", table)
    with pytest.raises(ConfigError, match=r"the image of lost is missing at .*; a run of images"):
        give(stored, pa.Table, images="bytes")

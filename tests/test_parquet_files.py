"""Parquet files that Arrow reads itself."""

from __future__ import annotations

import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.engine.storage.storage import Storage
from krea_dagster.parquet_files import open_parquet

TABLE = pa.table({"number": range(1000)})


def test_arrow_needs_no_python_object_of_a_local_file(tmp_path: Path) -> None:
    """Else a thread of Arrow could need the interpreter after its end, which aborts the process."""
    storage = Storage(str(tmp_path))
    storage.write("a.parquet", lambda file: pq.write_table(TABLE, file))
    with storage.open("a.parquet") as file:
        opened = open_parquet(file)
    assert opened.read() == TABLE, "it is read after Python has closed its file"


def test_any_other_file_is_read_as_it_is() -> None:
    file = io.BytesIO()
    pq.write_table(TABLE, file)
    assert open_parquet(file).read(["number"]) == TABLE


def test_a_file_that_is_no_parquet_file_is_an_error_of_arrow(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"not a table")
    with path.open("rb") as file, pytest.raises(pa.ArrowInvalid):
        open_parquet(file)

"""Fixtures of the tests of the prompt table: write tables, open them, list their problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.errors import Problem, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.prompts.reference import PromptRow, read_rows

Write = Callable[..., str]
Open = Callable[..., PromptTable]
Problems = Callable[..., list[Problem]]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Write columns as a Parquet file; the path as text."""

    def write_table(
        columns: Mapping[str, Any] | pa.Table, name: str = "prompts.parquet", **options: Any
    ) -> str:
        table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(table, path, **options)
        return str(path)

    return write_table


@pytest.fixture
def memory() -> Iterator[Any]:
    """A store behind URLs, in memory."""
    filesystem = fsspec.filesystem("memory")
    yield filesystem
    filesystem.store.clear()
    filesystem.pseudo_dirs[:] = [""]


@pytest.fixture
def open_table(write: Write) -> Open:
    """Write columns and open them as a prompt table."""

    def opened(columns: Mapping[str, Any], by: str = "hash:4", **options: Any) -> PromptTable:
        return PromptTable(write(columns), parse_partition_by(by), **options)

    return opened


@pytest.fixture
def problems(open_table: Open) -> Problems:
    """Write columns that are wrong; the problems that reading them names."""

    def found(columns: Mapping[str, Any], by: str = "hash:4", **options: Any) -> list[Problem]:
        with pytest.raises(PromptTableError) as caught:
            read_rows(open_table(columns, by, **options))
        return list(caught.value.problems)

    return found


@pytest.fixture
def only(open_table: Open) -> Callable[..., PromptRow]:
    """Write columns of one row; that row as it is read."""

    def read(columns: Mapping[str, Any], **options: Any) -> PromptRow:
        (row,) = read_rows(open_table(columns, **options)).rows
        return row

    return read

"""Data versions of the columns that are passed through to the manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from krea_dagster.application.column_versions import carried_columns
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import write_table


@pytest.mark.parametrize(
    "other",
    [
        {"note": ["x", "z"]},
        {"note": ["y", "x"]},
        {"remark": ["x", "y"]},
        {"note": [1, 2]},
        {"note": ["x", "y"], "more": [1, 2]},
        {},
    ],
)
def test_the_version_of_carried_columns_hangs_on_names_types_and_each_rows_values(
    tmp_path: Path, other: dict[str, list[Any]]
) -> None:
    def versions(ids: list[str], **columns: Any) -> Any:
        source = write_table(
            tmp_path / "p.parquet", {"prompt_id": ids, "prompt": ["p", "q"], **columns}
        )
        return carried_columns(PromptTable(source, parse_partition_by("hash:1"))).versions

    first = versions(["a", "b"], note=["x", "y"])
    assert versions(["b", "a"], note=["y", "x"]) == first
    assert versions(["a", "b"], **other) != first


def test_nested_columns_and_nulls_have_versions_too(tmp_path: Path) -> None:
    columns = {"tags": [["a", None], None], "size_of": [{"w": 1}, {"w": None}]}
    source = write_table(tmp_path / "p.parquet", {"prompt": ["p", "q"], **columns})
    table = PromptTable(source, parse_partition_by("hash:2"))
    assert carried_columns(table).versions == carried_columns(table).versions

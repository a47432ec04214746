"""Folders such as theme=sea give a column to the files in them."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.prompts import PromptTable, parse_partition_by
from krea_dagster.prompts.files import open_files
from krea_dagster.prompts.pushdown import row_group_filter
from tests.prompts.conftest import Write
from tests.prompts.reference import read_rows


def opened(source: Path, by: str = "column:theme") -> PromptTable:
    return PromptTable(source, parse_partition_by(by))


def test_the_columns_of_the_path_are_columns_of_the_table(write: Write, tmp_path: Path) -> None:
    write({"prompt_id": ["a", "b"], "prompt": ["a boat", "a gull"]}, "table/theme=sea/a.parquet")
    write({"prompt_id": ["c"], "prompt": ["a lamp"]}, "table/theme=the%20coast/b.parquet")
    write({"prompt_id": ["d"], "prompt": ["a tree"]}, "table/theme=007/c.parquet")
    table = opened(tmp_path / "table")
    assert table.partition_keys() == ["007", "sea", "the coast"]
    assert [row.prompt for row in read_rows(table, ["the coast"]).rows] == ["a lamp"]
    assert read_rows(table).passthrough["theme"].to_pylist() == ["007", "sea", "sea", "the coast"]


def test_only_the_files_of_the_wanted_partitions_are_read(write: Write, tmp_path: Path) -> None:
    for theme in ("sea", "coast"):
        write({"prompt": [theme]}, f"table/theme={theme}/a.parquet")
    by = parse_partition_by("column:theme")
    found = []
    for file in open_files(str(tmp_path / "table")):
        keep = row_group_filter(by, file.schema, frozenset({"sea"}))
        found += [file.name for _ in file.batches(["prompt", "theme"], keep)]
    assert found == [f"{tmp_path}/table/theme=sea/a.parquet"]


def test_a_table_that_duckdb_has_partitioned_is_read_as_it_was(tmp_path: Path) -> None:
    rows = "select 'p' || i as prompt, i as seed, i % 3 as part, date '2026-11-01' + i::int as day"
    folder = tmp_path / "table"
    written = "format parquet, partition_by (part, day)"
    duckdb.sql(f"copy ({rows} from range(1, 10) t(i)) to '{folder}' ({written})")
    table = opened(folder, "day:day")
    assert table.row_count() == 9
    assert table.partition_keys()[0] == "2026-11-02"
    assert [row.seed for row in read_rows(table, ["2026-11-05"]).rows] == [4]


def test_a_column_that_means_something_is_typed(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/seed=7/size=1%3A2/nsfw_check=true/a.parquet")
    (row,) = read_rows(opened(tmp_path / "table", "hash:2")).rows
    assert (row.seed, row.size, row.nsfw_check) == (7, "1:2", True)
    write({"prompt": ["a"]}, "other/seed=seven/a.parquet")
    with pytest.raises(ConfigError, match=r"seed=seven/a.parquet: seed is 'seven' by its folder"):
        opened(tmp_path / "other", "hash:2").plan()


def test_a_missing_value_is_missing(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/seed=__HIVE_DEFAULT_PARTITION__/a.parquet")
    assert read_rows(opened(tmp_path / "table", "hash:2")).rows[0].seed is None


def test_a_column_of_both_path_and_file_must_agree(write: Write, tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b"], "year": pa.array([2026, 2026], pa.int32())}
    write(columns, "table/year=2026/a.parquet")
    found = read_rows(opened(tmp_path / "table", "hash:2"))
    assert found.passthrough["year"].to_pylist() == [2026, 2026]
    write({**columns, "year": pa.array([2026, None], pa.int32())}, "table/year=2026/a.parquet")
    with pytest.raises(ConfigError, match=r"a.parquet row 2: year is None in the file and '2026'"):
        opened(tmp_path / "table", "hash:2").plan()
    write({"prompt": ["a"], "year": ["x"]}, "other/year=2026/a.parquet")
    with pytest.raises(ConfigError, match=r"year is 'x' in the file and '2026' by its folder"):
        opened(tmp_path / "other", "column:year").partition_keys()


def test_a_folder_without_the_column_is_a_problem(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/theme=sea/a.parquet")
    write({"prompt": ["b"]}, "table/b.parquet")
    with pytest.raises(PromptTableError, match=r"theme is missing in .*table/b.parquet"):
        opened(tmp_path / "table").plan()


def test_a_path_that_names_a_column_twice_is_refused(write: Write, tmp_path: Path) -> None:
    write({"prompt": ["a"]}, "table/theme=sea/theme=coast/a.parquet")
    with pytest.raises(ConfigError, match=r"two folders of its path name the column 'theme'"):
        opened(tmp_path / "table").plan()


def test_a_column_is_read_also_where_it_is_all_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "table" / "theme=sea"
    folder.mkdir(parents=True)
    pq.write_table(pa.table({"prompt": ["a"] * 40_000}), folder / "a.parquet")
    (file,) = open_files(str(tmp_path / "table"))
    batches = [batch for _, batch in file.batches(["theme"])]
    assert sum(batch.num_rows for batch in batches) == 40_000
    assert batches[-1].column("theme")[-1].as_py() == "sea"

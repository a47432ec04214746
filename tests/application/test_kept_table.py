"""The value that an asset makes, kept as files: newest, atomic, and not written twice."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.application.kept_table import KeptTable
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import write_table

SHOWN = "the value of raw/prompts"


@pytest.fixture
def table(tmp_path: Path) -> PromptTable:
    return PromptTable(str(tmp_path / "kept"), parse_partition_by("hash:1"))


def frame(*prompts: str) -> pa.Table:
    return pa.table({"prompt_id": list(prompts), "prompt": list(prompts)})


def prompts_in(table: PromptTable) -> list[str]:
    assert table.row_count() >= 0  # it is a table for the package too
    ids: list[str] = pq.read_table(table.place)["prompt_id"].to_pylist()
    return ids


def test_a_value_is_read_as_the_table_and_replaced_by_the_next(table: PromptTable) -> None:
    kept = KeptTable(table)
    assert not kept.exists()
    kept.keep(frame("a", "b"), SHOWN, mark="1")
    assert prompts_in(table) == ["a", "b"]
    kept.keep(frame("c"), SHOWN, mark="2")
    assert prompts_in(table) == ["c"]
    assert kept.mark(None) == "2"


def test_partitions_are_files_of_their_own_and_the_table_is_all_of_them(table: PromptTable) -> None:
    kept = KeptTable(table)
    for day in ("2026-11-01", "2026-11-02", "a/b"):
        kept.keep(frame(day), SHOWN, partition=day, mark=day)
    assert sorted(prompts_in(table)) == ["2026-11-01", "2026-11-02", "a/b"]
    kept.keep(frame("late"), SHOWN, partition="2026-11-01", mark="later")
    assert sorted(prompts_in(table)) == ["2026-11-02", "a/b", "late"]
    assert [kept.mark(day) for day in ("2026-11-01", "a/b", "unknown")] == ["later", "a/b", ""]


def test_an_asset_that_gets_or_loses_partitions_leaves_no_rows_behind(table: PromptTable) -> None:
    kept = KeptTable(table)
    kept.keep(frame("whole"), SHOWN)
    kept.keep(frame("day"), SHOWN, partition="2026-11-01")
    assert prompts_in(table) == ["day"]
    kept.keep(frame("whole"), SHOWN)
    assert prompts_in(table) == ["whole"]


def test_the_same_value_is_not_written_again_unless_it_is_now_known_which_it_is(
    table: PromptTable,
) -> None:
    kept = KeptTable(table)
    kept.keep(frame("a"), SHOWN)
    first = table.mark()
    kept.keep(frame("a"), SHOWN)
    assert table.mark() == first
    kept.keep(frame("a"), SHOWN, mark="1")
    assert kept.mark(None) == "1"
    known = table.mark()
    kept.keep(frame("a"), SHOWN)
    assert (kept.mark(None), table.mark()) == ("1", known)


def test_a_value_of_which_nobody_knows_how_new_it_is_says_so(table: PromptTable) -> None:
    """The next look at the asset then loads its newest value again."""
    kept = KeptTable(table)
    kept.keep(frame("newer"), SHOWN, mark="2")
    kept.keep(frame("older"), SHOWN)
    assert kept.mark(None) == ""


def test_a_path_means_the_table_there_also_a_folder_whose_files_differ(
    table: PromptTable, tmp_path: Path
) -> None:
    write_table(tmp_path / "made" / "1.parquet", pa.table({"prompt": ["a"], "seed": [5]}))
    write_table(tmp_path / "made" / "2.parquet", pa.table({"prompt": ["b"], "style": ["oil"]}))
    KeptTable(table).keep(tmp_path / "made", SHOWN)
    assert pq.read_table(table.place).to_pylist() == [
        {"prompt": "a", "seed": 5, "style": None},
        {"prompt": "b", "seed": None, "style": "oil"},
    ]


@pytest.mark.parametrize("value", [None, 7, "nowhere.parquet", pd.Series([1, 2])])
def test_what_is_no_table_is_refused_and_the_kept_one_stays(
    table: PromptTable, value: object
) -> None:
    kept = KeptTable(table)
    kept.keep(frame("a"), SHOWN)
    with pytest.raises(ConfigError):
        kept.keep(value, SHOWN)
    assert prompts_in(table) == ["a"]


def test_it_is_kept_behind_a_url_too() -> None:
    table = PromptTable("memory://kept-table/prompts", parse_partition_by("hash:1"))
    kept = KeptTable(table)
    assert not kept.exists()
    kept.keep(frame("whole"), SHOWN, mark="1")
    assert (table.row_count(), kept.mark(None)) == (1, "1")
    for day in ("2026-11-01", "2026-11-02"):
        kept.keep(frame(day), SHOWN, partition=day, mark=day)
    assert (table.row_count(), kept.mark("2026-11-02"), kept.mark(None)) == (2, "2026-11-02", "")

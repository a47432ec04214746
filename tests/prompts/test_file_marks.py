"""The mark of a table's files."""

from __future__ import annotations

import os
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.prompts.file_marks import mark_of_files
from tests.dagster_bench import write_table


def test_a_file_that_was_written_to_just_now_is_read_again(tmp_path: Path) -> None:
    """Another write within the clock's grain would leave no trace."""
    source = write_table(tmp_path / "prompts.parquet", {"prompt": ["one"]})
    now_s = Path(source).stat().st_mtime
    assert mark_of_files(source, now_s=now_s + 0.5) == ""
    assert mark_of_files(source, now_s=now_s + 5) != ""


def test_the_mark_of_a_folder_moves_with_every_file_in_it(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    write_table(folder / "a.parquet", {"prompt": ["one"]})
    marks = {mark_of_files(str(folder), now_s=0)}
    write_table(folder / "deep" / "b.parquet", {"prompt": ["two"]})
    marks.add(mark_of_files(str(folder), now_s=0))
    os.utime(folder / "a.parquet", (1000, 1000))
    marks.add(mark_of_files(str(folder), now_s=0))
    (folder / "deep" / "b.parquet").unlink()
    marks.add(mark_of_files(str(folder), now_s=0))
    assert len(marks - {""}) == 4


def test_a_link_is_marked_by_the_file_that_it_names(tmp_path: Path) -> None:
    source = tmp_path / "prompts.parquet"
    write_table(tmp_path / "first.parquet", {"prompt": ["one"]})
    source.symlink_to("first.parquet")
    first = mark_of_files(str(source), now_s=0)
    write_table(tmp_path / "first.parquet", {"prompt": ["one", "two"]})
    assert mark_of_files(str(source), now_s=0) not in {first, ""}


def test_nothing_is_known_of_a_table_that_is_not_there(tmp_path: Path) -> None:
    assert mark_of_files(str(tmp_path / "none.parquet"), now_s=0) == ""
    (tmp_path / "dangling.parquet").symlink_to("none.parquet")
    assert mark_of_files(str(tmp_path), now_s=0) == ""


def test_of_an_object_store_its_own_words_are_taken(tmp_path: Path) -> None:
    """The store in memory tells the time at which an object was made."""
    store = fsspec.filesystem("memory")
    pq.write_table(pa.table({"prompt": ["one"]}), "/watched/a.parquet", filesystem=store)
    source = "memory://watched"
    first = mark_of_files(source, now_s=0)
    assert first == mark_of_files(source, now_s=0) != ""
    pq.write_table(pa.table({"prompt": ["two"]}), "/watched/a.parquet", filesystem=store)
    assert mark_of_files(source, now_s=0) != first
    store.rm("/watched", recursive=True)
    assert mark_of_files(source, now_s=0) == ""

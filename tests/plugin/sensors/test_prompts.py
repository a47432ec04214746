"""The sensor that watches the prompt table: cheap while nothing moves, and it forgets nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData

from krea_dagster import KreaResource, build_krea_assets
from krea_dagster.application.column_versions import carried_versions
from krea_dagster.plugin.data_versions import last_versions, report_prompts
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.sensors.change_marks import Marks, hash_of_versions, mark_of_files
from krea_dagster.plugin.sensors.prompts import build_prompts_sensor
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import tick, write_table
from tests.prompts.reference import key_for, partition_version

PROMPTS = dg.AssetKey("prompts")
COLUMNS = dg.AssetKey("prompt_columns")
SAME = "The prompt table requests the same images as before."

#: Long enough ago that a file of this time is not written to any more.
LONG_AGO_S = 1_700_000_000.0


class WatchedTable:
    """A table on disk, and the sensor over it as a code server holds it from tick to tick."""

    def __init__(
        self, folder: Path, instance: dg.DagsterInstance, by: str = "hash:4", **options: Any
    ) -> None:
        self.path = folder / "prompts.parquet"
        self.instance = instance
        self.krea = KreaResource(storage=str(folder / "krea"))
        self.table = PromptTable(
            str(self.path), parse_partition_by(by), count_tokens=self._count_tokens
        )
        self.reads = 0
        self._by, self._options = by, options
        self._writes = 0
        self.cursor: str | None = None

    def write(self, rows: int = 8, **columns: Any) -> None:
        """Write it, as if some time ago, and each time later than before."""
        names = [f"s-{number:02d}" for number in range(rows)]
        write_table(self.path, {"prompt_id": names, "prompt": names, **columns})
        self._writes += 1
        os.utime(self.path, (LONG_AGO_S, LONG_AGO_S + self._writes))

    def _count_tokens(self, prompt: str) -> int:
        """ReceivedCallback for every row that is read: the first row's calls are counted."""
        self.reads += prompt == "s-00"
        return 1

    def restart(self) -> None:
        """The code server starts anew, and knows nothing but the cursor."""
        partitions_def = build_krea_assets(self.table).partitions_def
        sensor = build_prompts_sensor(Names(), self.table, partitions_def, **self._options)
        self._defs = dg.Definitions(sensors=[sensor], resources={"krea": self.krea})

    def tick(self) -> SensorExecutionData:
        """One tick, with the cursor kept as the daemon keeps it."""
        if not hasattr(self, "_defs"):
            self.restart()
        outcome = tick(self._defs, self.instance, "krea_prompts", self.cursor)
        self.cursor = outcome.cursor
        return outcome

    def reported(self, key: dg.AssetKey = PROMPTS) -> set[str]:
        """The partitions that a tick reports."""
        events = self.tick().asset_events
        assert len(events) % 2 == 0
        return {str(event.partition) for event in events if event.asset_key == key}

    def settled(self) -> bool:
        """Whether two ticks in a row report nothing."""
        return not self.reported() and self.tick().skip_message == SAME


@pytest.fixture
def own(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "home"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        yield instance


def all_buckets(count: int = 4) -> set[str]:
    return {f"bucket-{number:03d}" for number in range(count)}


# -- cheap ------------------------------------------------------------------------------------


def test_a_table_whose_files_have_not_moved_is_not_read(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    assert table.reported() == all_buckets()
    assert table.settled()
    reads = table.reads
    table.restart()
    assert (table.tick().skip_message, table.reads) == (SAME, reads)
    table.write()
    assert table.settled()
    assert table.reads == 2 * reads


def test_looking_makes_no_journal(tmp_path: Path, own: dg.DagsterInstance) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    table.tick()
    assert not (tmp_path / "krea").exists()


def test_the_cursor_stays_small_however_many_partitions_there_are() -> None:
    versions = {f"2026-11-{day:05d}": partition_version([str(day)]) for day in range(10_000)}
    marks = Marks("f" * 32, "10000/12345", "123456789/123456789", hash_of_versions(versions))
    assert len(marks.cursor()) < 250
    assert Marks.from_cursor(marks.cursor()) == marks
    assert hash_of_versions({**versions, "2026-11-00001": ""}) != marks.versions


def test_one_tick_reports_only_so_many_partitions_and_the_next_ones_the_rest(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own, by="hash:10", most_reports=8)
    table.write()
    ticks = [table.reported() for _ in range(3)]
    assert [len(one) for one in ticks] == [4, 4, 2]
    assert set.union(*ticks) == all_buckets(10)
    assert table.settled()


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


# -- forgets nothing --------------------------------------------------------------------------


def test_a_raised_attempt_reports_its_partition(tmp_path: Path, own: dg.DagsterInstance) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    with table.krea.krea().open_journal():
        pass
    table.tick()
    assert table.settled()
    table.krea.krea().raise_attempts(table.table, [("s-03", 0)], raised_by="somebody")
    assert table.reported() == {key_for(table.table.partition_by, "s-03")}
    assert table.settled()


def test_what_a_run_reported_is_not_reported_again(tmp_path: Path, own: dg.DagsterInstance) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    report_prompts(own, PROMPTS, dict(list(table.table.versions().items())[:3]))
    assert table.reported() == {"bucket-003"}


def test_an_older_version_that_a_run_reports_late_does_not_stay(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    """The run had read the table before it changed, and says so after the sensor has."""
    table = WatchedTable(tmp_path, own)
    table.write()
    read_by_the_run = table.table.versions()
    table.tick()
    table.write(prompt=["all", "of", "them", "are", "new", "by", "now", "!"])
    changed = table.reported()
    assert table.settled()
    report_prompts(own, PROMPTS, read_by_the_run)
    assert table.reported() == changed
    assert dict(last_versions(own, PROMPTS)) == table.table.versions()
    assert table.settled()


def test_a_table_that_changed_and_changed_back_is_reported_as_it_is_now(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    table.tick()
    assert table.settled()
    report_prompts(own, PROMPTS, {"bucket-001": "of a table in between"})
    assert table.reported() == {"bucket-001"}


def test_a_value_that_left_the_table_is_reported_with_the_version_of_no_rows(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own, by="column:style")
    table.write(rows=2, style=["ink", "oil"])
    assert table.reported() == {"ink", "oil"}
    table.write(rows=2, style=["ink", "ink"])
    assert table.reported() == {"ink", "oil"}
    assert last_versions(own, PROMPTS)["oil"] == partition_version([])
    assert own.get_dynamic_partitions("krea_style") == ["ink", "oil"]
    assert table.settled()


def test_days_to_come_are_reported_when_they_come(tmp_path: Path, own: dg.DagsterInstance) -> None:
    table = WatchedTable(tmp_path, own, by="day:day")
    table.write(rows=2, day=["2026-01-01", "2999-01-01"])
    assert table.reported() == {"2026-01-01"}
    assert table.settled()


def test_by_day_and_column_new_values_are_registered_and_reported(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own, by="day:day,column:style")
    table.write(rows=2, day=["2026-01-01", "2026-01-02"], style=["ink", "oil"])
    assert table.reported() == {"ink|2026-01-01", "oil|2026-01-02"}
    assert set(own.get_dynamic_partitions("krea_style")) == {"ink", "oil"}


def test_a_cursor_of_another_version_is_no_cursor() -> None:
    for cursor in (None, "", "{", '{"bucket-000": "abc"}', "[1]"):
        assert Marks.from_cursor(cursor) is None


# -- the columns that are carried along -------------------------------------------------------


def test_a_carried_column_is_reported_for_the_manifest_and_not_for_the_images(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    table.tick()
    assert table.settled()
    table.write(note=["x"] * 8)
    events = table.tick().asset_events
    assert {event.asset_key for event in events} == {COLUMNS}
    assert table.settled()
    table.write(note=["x"] * 7 + ["y"])
    assert table.reported(COLUMNS) == {key_for(table.table.partition_by, "s-07")}


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
        return carried_versions(PromptTable(source, parse_partition_by("hash:1")))

    first = versions(["a", "b"], note=["x", "y"])
    assert versions(["b", "a"], note=["y", "x"]) == first
    assert versions(["a", "b"], **other) != first


def test_nested_columns_and_nulls_have_versions_too(tmp_path: Path) -> None:
    columns = {"tags": [["a", None], None], "size_of": [{"w": 1}, {"w": None}]}
    source = write_table(tmp_path / "p.parquet", {"prompt": ["p", "q"], **columns})
    table = PromptTable(source, parse_partition_by("hash:2"))
    assert carried_versions(table) == carried_versions(table)

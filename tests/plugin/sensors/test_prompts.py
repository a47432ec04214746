"""The sensor that watches the prompt table: cheap while nothing moves, and it forgets nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from deltalake import write_deltalake

from krea_dagster import KreaResource, build_krea_assets
from krea_dagster.plugin.data_versions import last_versions, report_prompts
from krea_dagster.plugin.names import Names
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
    """A table on disk, and its sensor from tick to tick."""

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
        """Count the reads of the table by those of its first row."""
        self.reads += prompt == "s-00"
        return 1

    def restart(self) -> None:
        """Restart the code server, which then knows only the cursor."""
        partitions_def = build_krea_assets(self.table).partitions_def
        sensor = build_prompts_sensor(Names(), self.table, partitions_def, **self._options)
        self._defs = dg.Definitions(sensors=[sensor], resources={"krea": self.krea})

    def tick(self) -> SensorExecutionData:
        """Evaluate one tick, and keep its cursor as the daemon does."""
        if not hasattr(self, "_defs"):
            self.restart()
        outcome = tick(self._defs, self.instance, "krea_prompts", self.cursor)
        self.cursor = outcome.cursor
        return outcome

    def evaluate(self) -> SensorExecutionData:
        """Evaluate one tick, of which nothing is stored."""
        if not hasattr(self, "_defs"):
            self.restart()
        context = dg.build_sensor_context(
            self.instance, self.cursor, resources=self._defs.resources
        )
        return self._defs.resolve_sensor_def("krea_prompts").evaluate_tick(context)

    def reported(self, key: dg.AssetKey = PROMPTS) -> set[str]:
        """Return the partitions that a tick reports."""
        return {
            str(event.partition) for event in self.tick().asset_events if event.asset_key == key
        }

    def settled(self) -> bool:
        """Return whether two ticks in a row report nothing."""
        return not self.reported() and self.tick().skip_message == SAME


@pytest.fixture
def own(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    home = tmp_path / "home"
    home.mkdir()
    with dg.DagsterInstance.ephemeral() as instance:
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


def write_csv(table: WatchedTable, prompts: list[str]) -> Path:
    path = table.path.with_suffix(".csv")
    path.write_text("prompt_id,prompt\n" + "".join(f"{name},{name}\n" for name in prompts))
    os.utime(path, (LONG_AGO_S, LONG_AGO_S + len(prompts)))
    return path


def write_delta(table: WatchedTable, prompts: list[str]) -> Path:
    path = table.path.with_suffix(".delta")
    rows = pa.table({"prompt_id": prompts, "prompt": prompts})
    write_deltalake(str(path), rows, mode="overwrite")
    return path


@pytest.mark.parametrize("write", [write_csv, write_delta])
def test_a_table_of_another_kind_is_read_only_when_it_has_changed(
    tmp_path: Path, own: dg.DagsterInstance, write: Callable[[WatchedTable, list[str]], Path]
) -> None:
    table = WatchedTable(tmp_path, own)
    source = write(table, ["s-00", "s-01"])
    table.table = replace(table.table, source=source)
    assert table.reported() == all_buckets()
    assert table.settled()
    before = table.reads
    table.restart()
    assert table.tick().skip_message == SAME
    assert table.reads == before, "the cursor has its mark"
    write(table, ["s-00", "s-01", "s-02"])
    assert table.reported() == {key_for(table.table.partition_by, "s-02")}
    assert table.reads > before
    assert table.settled()


def test_a_function_is_called_in_each_tick_and_its_rows_are_read_if_they_differ(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    rows = [{"prompt_id": "s-00", "prompt": "s-00"}]
    calls: list[int] = []

    def ideas() -> list[dict[str, str]]:
        calls.append(len(rows))
        return rows

    table = WatchedTable(tmp_path, own)
    table.table = replace(table.table, source=ideas, name="ideas")
    assert table.reported() == all_buckets()
    assert table.settled()
    read, called = table.reads, len(calls)
    assert table.tick().skip_message == SAME
    assert (table.reads, len(calls)) == (read, called + 1)
    rows.append({"prompt_id": "s-01", "prompt": "s-01"})
    assert table.reported() == {key_for(table.table.partition_by, "s-01")}


def test_looking_makes_no_journal(tmp_path: Path, own: dg.DagsterInstance) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    table.tick()
    assert not (tmp_path / "krea").exists()


def test_one_tick_reports_only_so_many_partitions_and_the_next_ones_the_rest(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own, by="hash:10", most_reports=8)
    table.write()
    ticks = [table.reported() for _ in range(3)]
    assert [len(one) for one in ticks] == [4, 4, 2]
    assert set.union(*ticks) == all_buckets(10)
    assert table.settled()


def test_a_thousand_new_partitions_are_known_after_one_tick_by_one_event_for_each_asset(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own, by="hash:1000")
    table.write()
    events = table.evaluate().asset_events
    assert len(events) == 2 * 1000
    assert {type(event) for event in events} == {dg.AssetMaterialization}


def test_a_new_version_is_an_observation_and_then_a_materialization(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    """Dagster's conditions use the one, its "unsynced" the other."""
    table = WatchedTable(tmp_path, own, by="hash:1")
    table.write()
    table.tick()
    table.write(rows=9)
    observed, made = (event for event in table.tick().asset_events if event.asset_key == PROMPTS)
    assert isinstance(observed, dg.AssetObservation)
    assert isinstance(made, dg.AssetMaterialization)
    assert observed.tags == made.tags


# -- forgets nothing --------------------------------------------------------------------------


def test_a_tick_that_is_killed_half_way_is_continued_by_the_next(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    table = WatchedTable(tmp_path, own)
    table.write()
    reported = table.evaluate().asset_events[:5]
    for event in reported:
        own.report_runless_asset_event(event)
    rest = table.tick().asset_events
    assert len(rest) == 3
    assert not {(one.asset_key, one.partition) for one in rest} & {
        (one.asset_key, one.partition) for one in reported
    }
    assert table.settled()


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

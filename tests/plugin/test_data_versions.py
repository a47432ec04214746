"""The data versions of ``prompts``: they change where what is asked for changes, and only there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._core.loader import LoadingContextForTest

from krea_dagster import KreaResource, PromptTable, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import HashPartitions
from tests.dagster_bench import latest, posts, run_job, tick, write_table
from tests.prompts.reference import key_for

VERSION = "dagster/data_version"
BY = HashPartitions(8)
COUNT = 20


def table(**changed: Any) -> pa.Table:
    """Twenty rows that the emulator refuses at once, so that a run over them takes no time."""
    columns: dict[str, Any] = {
        "prompt_id": [f"v-{number:02d}" for number in range(COUNT)],
        "prompt": [f"version {number} [emulator: refuse]" for number in range(COUNT)],
    }
    return pa.table(columns | changed)


def partition_of(number: int) -> str:
    return key_for(BY, f"v-{number:02d}")


def definitions(folder: Path, prefix: str, base_url: str = "http://127.0.0.1:9") -> dg.Definitions:
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by=str(BY),
        krea=KreaResource(
            api_key="emulator",
            base_url=base_url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        ),
        key_prefix=prefix,
    )


def versions(outcome: SensorExecutionData, asset: str = "prompts") -> Mapping[str, str]:
    """What a tick has reported of one of the two assets of the table."""
    reported = {}
    for event in outcome.asset_events:
        if event.asset_key.path[-1] == asset and isinstance(event, dg.AssetMaterialization):
            assert event.partition is not None
            assert event.tags is not None
            reported[event.partition] = event.tags[VERSION]
    return reported


def test_the_first_look_reports_every_partition_and_the_second_none(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    write_table(tmp_path / "prompts.parquet", table())
    defs = definitions(tmp_path, "first")
    first = tick(defs, instance, "first_krea_prompts")
    assert sorted(versions(first)) == [f"bucket-{number:03d}" for number in range(8)]
    second = tick(defs, instance, "first_krea_prompts", first.cursor)
    assert not second.asset_events
    assert second.skip_message == "The prompt table requests the same images as before."


@pytest.mark.parametrize(
    ("how", "same"),
    [
        ("written again", table()),
        ("in another order", table().take(list(reversed(range(COUNT))))),
        ("with a further column", table(note=["x"] * COUNT)),
        ("with the defaults spelt out", table(size=["1:1"] * COUNT, quality=["1K"] * COUNT)),
    ],
)
def test_a_table_that_asks_for_the_same_reports_nothing(
    tmp_path: Path, instance: dg.DagsterInstance, how: str, same: pa.Table
) -> None:
    write_table(tmp_path / "prompts.parquet", table())
    defs = definitions(tmp_path, "same")
    first = tick(defs, instance, "same_krea_prompts")
    pq.write_table(same, tmp_path / "prompts.parquet", compression="zstd", row_group_size=3)
    again = tick(defs, instance, "same_krea_prompts", first.cursor)
    assert versions(again) == {}, how
    assert bool(versions(again, "prompt_columns")) is (how == "with a further column")


# The tester of automation conditions uses a beta parameter of Dagster's own.
@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")
def test_only_the_partitions_whose_rows_changed_are_reported_and_trigger_what_is_downstream(
    tmp_path: Path, instance: dg.DagsterInstance
) -> None:
    defs = definitions(tmp_path, "changed")
    write_table(tmp_path / "prompts.parquet", table())

    # An asset that Dagster's own automation launches wherever its dependency is updated.
    @dg.asset(
        deps=[["changed", "prompts"]],
        partitions_def=dg.StaticPartitionsDefinition(BY.keys()),
        automation_condition=dg.AutomationCondition.any_deps_updated(),
    )
    def downstream() -> None: ...

    both = dg.Definitions.merge(defs, dg.Definitions(assets=[downstream]))
    first = tick(defs, instance, "changed_krea_prompts")
    before = dg.evaluate_automation_conditions(defs=both, instance=instance)

    rows = table().to_pydict()
    for number in (3, 11, 17):
        rows["prompt"][number] += ", in the rain"
    write_table(tmp_path / "prompts.parquet", rows)
    second = tick(defs, instance, "changed_krea_prompts", first.cursor)
    changed = {partition_of(number) for number in (3, 11, 17)}
    assert set(versions(second)) == changed
    assert all(version != versions(first)[key] for key, version in versions(second).items())

    after = dg.evaluate_automation_conditions(defs=both, instance=instance, cursor=before.cursor)
    assert after.get_requested_partitions(downstream.key) == changed


def unsynced(defs: dg.Definitions, instance: dg.DagsterInstance, key: Sequence[str]) -> set[str]:
    """The partitions that the UI marks as out of date. Dagster has no public name for it."""
    resolver = CachingStaleStatusResolver(
        instance, defs.resolve_asset_graph(), LoadingContextForTest(instance)
    )
    partitions = BY.keys()
    return {
        partition
        for partition in partitions
        if resolver.get_status(dg.AssetKey(key), partition) is StaleStatus.STALE
    }


def test_the_ui_marks_the_images_of_the_changed_partitions_as_out_of_date_until_the_next_run(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    defs = definitions(tmp_path, "synced", emulator.url)
    write_table(tmp_path / "prompts.parquet", table())
    first = tick(defs, instance, "synced_krea_prompts")
    everything = ("bucket-000", "bucket-007")
    assert run_job(defs, instance, *everything, job="synced_krea_images").success
    assert unsynced(defs, instance, ("synced", "images")) == set()

    rows = table().to_pydict()
    rows["prompt"][5] += ", at night"
    write_table(tmp_path / "prompts.parquet", rows)
    tick(defs, instance, "synced_krea_prompts", first.cursor)
    assert unsynced(defs, instance, ("synced", "images")) == {partition_of(5)}

    assert run_job(defs, instance, partition_of(5), job="synced_krea_images").success
    assert unsynced(defs, instance, ("synced", "images")) == set()


def test_a_run_reports_the_versions_that_the_sensor_would_and_no_version_twice(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    write_table(tmp_path / "prompts.parquet", table())
    defs = definitions(tmp_path, "run", emulator.url)
    first, last = "bucket-000", "bucket-003"
    for _ in range(2):
        assert run_job(defs, instance, first, last, job="run_krea_images").success
    by_run = {}
    for number in range(4):
        bucket = f"bucket-{number:03d}"
        found = instance.fetch_materializations(
            dg.AssetRecordsFilter(
                asset_key=dg.AssetKey(["run", "prompts"]), asset_partitions=[bucket]
            ),
            limit=10,
        )
        assert len(found.records) == 1, "the second run had nothing new to report"
        tags = latest(instance, ("run", "prompts"), bucket).tags
        assert tags is not None
        by_run[bucket] = tags[VERSION]
    # Only of the partitions that no run has reported.
    by_sensor = versions(tick(defs, instance, "run_krea_prompts"))
    assert sorted(by_sensor) == [f"bucket-{number:03d}" for number in range(4, 8)]
    all_of_them = PromptTable(str(tmp_path / "prompts.parquet"), BY).versions()
    assert {**by_run, **by_sensor} == all_of_them


def test_a_table_that_cannot_be_read_is_a_skipped_tick_that_says_why_and_keeps_the_cursor(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    defs = definitions(tmp_path, "broken")
    before = posts(emulator)
    missing = tick(defs, instance, "broken_krea_prompts")
    assert "does not exist" in str(missing.skip_message)
    write_table(tmp_path / "prompts.parquet", table(quality=["1K"] * 19 + ["8K"]))
    wrong = tick(defs, instance, "broken_krea_prompts")
    assert wrong.asset_events == []
    assert "row 20 (prompt_id v-19): quality is '8K'" in str(wrong.skip_message)
    assert posts(emulator) == before


def test_the_sensor_watches_without_being_switched_on(tmp_path: Path) -> None:
    sensor = definitions(tmp_path, "on").resolve_sensor_def("on_krea_prompts")
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING

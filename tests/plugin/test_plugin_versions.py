"""The data versions of ``prompts``: they change where what is asked for changes, and only there."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import parse_partition_by
from tests.dagster_bench import latest, posts, run_job, write_table

VERSION = "dagster/data_version"
BY = "hash:16"
COUNT = 40


def table(**changed: Any) -> pa.Table:
    """Forty rows that the emulator refuses at once, so that a run over them takes no time."""
    columns: dict[str, Any] = {
        "prompt_id": [f"v-{number:02d}" for number in range(COUNT)],
        "prompt": [f"version {number} [emulator: refuse]" for number in range(COUNT)],
    }
    return pa.table(columns | changed)


def partition_of(number: int) -> str:
    return str(parse_partition_by(BY).key_for(f"v-{number:02d}"))  # type: ignore[union-attr]  # hash:N


def definitions(folder: Path, prefix: str, base_url: str = "http://127.0.0.1:9") -> dg.Definitions:
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by=BY,
        krea=KreaResource(api_key="emulator", base_url=base_url, storage=str(folder / "krea")),
        key_prefix=prefix,
    )


def tick(
    defs: dg.Definitions, instance: dg.DagsterInstance, sensor: str, cursor: str | None = None
) -> dg.SensorResult | dg.SkipReason:
    """Evaluate the sensor, as the daemon does every minute."""
    context = dg.build_sensor_context(instance=instance, cursor=cursor)
    outcome = defs.resolve_sensor_def(sensor)(context)
    assert isinstance(outcome, dg.SensorResult | dg.SkipReason)
    return outcome


def versions(outcome: dg.SensorResult | dg.SkipReason) -> Mapping[str, str]:
    assert isinstance(outcome, dg.SensorResult)
    reported = {}
    for event in outcome.asset_events:
        assert isinstance(event, dg.AssetMaterialization)
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
    assert sorted(versions(first)) == [f"bucket-{number:03d}" for number in range(16)]
    assert isinstance(first, dg.SensorResult)
    second = tick(defs, instance, "first_krea_prompts", first.cursor)
    assert isinstance(second, dg.SkipReason)
    assert second.skip_message == "The prompt table asks for the same images as before."


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
    assert isinstance(first, dg.SensorResult)
    pq.write_table(same, tmp_path / "prompts.parquet", compression="zstd", row_group_size=3)
    assert isinstance(tick(defs, instance, "same_krea_prompts", first.cursor), dg.SkipReason), how


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
        partitions_def=dg.StaticPartitionsDefinition(parse_partition_by(BY).keys()),  # type: ignore[union-attr]  # hash:N
        automation_condition=dg.AutomationCondition.any_deps_updated(),
    )
    def downstream() -> None: ...

    both = dg.Definitions.merge(defs, dg.Definitions(assets=[downstream]))
    first = tick(defs, instance, "changed_krea_prompts")
    assert isinstance(first, dg.SensorResult)
    report(instance, first)
    before = dg.evaluate_automation_conditions(defs=both, instance=instance)

    rows = table().to_pydict()
    for number in (3, 17, 29):
        rows["prompt"][number] += ", in the rain"
    write_table(tmp_path / "prompts.parquet", rows)
    second = tick(defs, instance, "changed_krea_prompts", first.cursor)
    changed = {partition_of(number) for number in (3, 17, 29)}
    assert set(versions(second)) == changed
    assert all(version != versions(first)[key] for key, version in versions(second).items())

    assert isinstance(second, dg.SensorResult)
    report(instance, second)
    after = dg.evaluate_automation_conditions(defs=both, instance=instance, cursor=before.cursor)
    assert after.get_requested_partitions(downstream.key) == changed


def report(instance: dg.DagsterInstance, result: dg.SensorResult) -> None:
    for event in result.asset_events:
        assert isinstance(event, dg.AssetMaterialization)
        instance.report_runless_asset_event(event)


def test_a_run_reports_the_versions_that_the_sensor_would_and_no_version_twice(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    write_table(tmp_path / "prompts.parquet", table())
    defs = definitions(tmp_path, "run", emulator.url)
    first, last = "bucket-000", "bucket-003"
    for _ in range(2):
        assert run_job(defs, instance, first, last, job="run_krea_images").success
    by_sensor = versions(tick(defs, instance, "run_krea_prompts"))
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
        assert tags[VERSION] == by_sensor[bucket]


def test_a_table_that_cannot_be_read_is_a_skipped_tick_that_says_why_and_keeps_the_cursor(
    tmp_path: Path, instance: dg.DagsterInstance, emulator: Emulator
) -> None:
    defs = definitions(tmp_path, "broken")
    before = posts(emulator)
    missing = tick(defs, instance, "broken_krea_prompts")
    assert isinstance(missing, dg.SkipReason)
    assert "does not exist" in str(missing.skip_message)
    write_table(tmp_path / "prompts.parquet", table(quality=["1K"] * 39 + ["8K"]))
    wrong = tick(defs, instance, "broken_krea_prompts")
    assert isinstance(wrong, dg.SkipReason)
    assert "row 40 (prompt_id v-39): quality is '8K'" in str(wrong.skip_message)
    assert posts(emulator) == before


def test_the_sensor_watches_without_being_switched_on(tmp_path: Path) -> None:
    sensor = definitions(tmp_path, "on").resolve_sensor_def("on_krea_prompts")
    assert sensor.default_status is dg.DefaultSensorStatus.RUNNING

"""Schedules: what a tick launches, for every kind of partitions."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from zoneinfo import ZoneInfo

import dagster as dg
import pytest

from krea_dagster import KreaAssets, KreaResource, build_krea_assets, build_krea_definitions
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.schedules import build_krea_schedule
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import write_table

START = "dagster/asset_partition_range_start"
END = "dagster/asset_partition_range_end"
MIDNIGHT = datetime(2026, 11, 9, tzinfo=timezone.utc)  # a Monday


@pytest.fixture
def own(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        yield instance


def assets_by(
    folder: Path, partition_by: str, policy: dg.BackfillPolicy | None = None
) -> KreaAssets:
    columns = {
        "prompt": ["one", "two"],
        "day": ["2026-10-01", "2026-10-02"],
        "style": ["ink", "oil"],
    }
    source = write_table(folder / "prompts.parquet", columns)
    table = PromptTable(source, parse_partition_by(partition_by))
    return build_krea_assets(table, backfill_policy=policy)


def launched(
    schedule: dg.ScheduleDefinition, instance: dg.DagsterInstance, at: datetime = MIDNIGHT
) -> list[tuple[str, str]]:
    """The first and the last partition of each run that a tick launches."""
    context = dg.build_schedule_context(instance, scheduled_execution_time=at)
    requests = schedule.evaluate_tick(context).run_requests
    assert requests is not None
    assert len({request.run_key for request in requests}) == len(requests)
    return [(request.tags[START], request.tags[END]) for request in requests]


@pytest.mark.parametrize(
    ("partition_by", "ended", "cron"),
    [
        ("day:day", "2026-11-08", "0 0 * * *"),
        ("week:day", "2026-11-02", "0 0 * * 1"),
        ("month:day", "2026-10-01", "0 0 1 * *"),
    ],
)
def test_by_time_the_partition_that_has_just_ended_is_launched_when_it_ends(
    tmp_path: Path, own: dg.DagsterInstance, partition_by: str, ended: str, cron: str
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, partition_by))
    assert (schedule.cron_schedule, schedule.execution_timezone) == (cron, "UTC")
    assert launched(schedule, own) == [(ended, ended)]


def test_a_day_ends_in_the_partitions_time_zone(tmp_path: Path, own: dg.DagsterInstance) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "day:day@Europe/Berlin"))
    assert schedule.execution_timezone == "Europe/Berlin"
    midnight = datetime(2026, 11, 9, tzinfo=ZoneInfo("Europe/Berlin"))
    assert launched(schedule, own, midnight) == [("2026-11-08", "2026-11-08")]


def test_a_later_hour_of_ones_own_launches_the_same_partition(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "day:day"), cron_schedule="30 6 * * *")
    assert launched(schedule, own, MIDNIGHT.replace(hour=6, minute=30)) == [
        ("2026-11-08", "2026-11-08")
    ]


def test_before_the_first_partition_has_ended_nothing_is_launched(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "day:day"))
    context = dg.build_schedule_context(
        own, scheduled_execution_time=datetime(2026, 10, 1, tzinfo=timezone.utc)
    )
    assert schedule.evaluate_tick(context).skip_message == "There is no partition to launch."


def test_all_buckets_are_one_run(tmp_path: Path, own: dg.DagsterInstance) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "hash:20"))
    assert launched(schedule, own) == [("bucket-000", "bucket-019")]


def test_runs_take_as_many_partitions_as_the_backfill_policy_says(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    assets = assets_by(tmp_path, "hash:20", dg.BackfillPolicy.multi_run(8))
    assert launched(build_krea_schedule(assets), own) == [
        ("bucket-000", "bucket-007"),
        ("bucket-008", "bucket-015"),
        ("bucket-016", "bucket-019"),
    ]


def test_of_a_columns_values_those_that_dagster_knows_are_launched(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "column:style"))
    context = dg.build_schedule_context(own, scheduled_execution_time=MIDNIGHT)
    assert schedule.evaluate_tick(context).skip_message == "There is no partition to launch."
    own.add_dynamic_partitions("krea_style", ["oil", "ink", "chalk"])
    assert launched(schedule, own) == [("oil", "chalk")]


def test_by_day_and_column_each_value_has_a_run_for_the_day_that_has_ended(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "day:day,column:style"))
    own.add_dynamic_partitions("krea_style", ["oil", "ink"])
    keys = ["oil|2026-11-08", "ink|2026-11-08"]
    assert launched(schedule, own) == [(key, key) for key in keys]


def test_a_tick_that_is_repeated_asks_for_the_same_runs_so_that_dagster_launches_none_twice(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    schedule = build_krea_schedule(assets_by(tmp_path, "hash:4", dg.BackfillPolicy.multi_run(1)))
    ticks = [
        schedule.evaluate_tick(
            dg.build_schedule_context(own, scheduled_execution_time=MIDNIGHT)
        ).run_requests
        for _ in range(2)
    ]
    keys = [[request.run_key for request in tick or ()] for tick in ticks]
    assert keys[0] == keys[1]
    assert len(set(keys[0])) == 4


def test_it_goes_with_what_the_factory_returns_and_is_off_until_it_is_switched_on(
    tmp_path: Path, own: dg.DagsterInstance
) -> None:
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", {"prompt": ["one"]}),
        krea=KreaResource(storage=str(tmp_path)),
        key_prefix="ads",
    )
    schedule = build_krea_schedule(defs, key_prefix="ads", tags={"team": "ads"})
    both = dg.Definitions.merge(defs, dg.Definitions(schedules=[schedule]))
    dg.Definitions.validate_loadable(both)
    assert (schedule.name, schedule.job_name) == ("ads_krea_schedule", "ads_krea_images")
    assert schedule.default_status is dg.DefaultScheduleStatus.STOPPED
    assert launched(schedule, own) == [("bucket-000", "bucket-007")]
    with pytest.raises(ConfigError, match="give the key_prefix"):
        build_krea_schedule(defs)

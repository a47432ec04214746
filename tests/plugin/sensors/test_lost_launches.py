"""A launch of the automation that came to nothing is made again, once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

import dagster as dg
import pytest
from dagster._core.definitions.assets.graph.asset_graph_subset import AssetGraphSubset
from dagster._core.definitions.events import AssetKeyPartitionKey
from dagster._core.execution.backfill import BulkActionStatus, PartitionBackfill

from krea_dagster import KreaResource, build_krea_definitions, on_prompts_changed
from krea_dagster.emulator import Emulator
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import RANGE_END_TAG, RANGE_START_TAG
from krea_dagster.plugin.sensors.lost_launches import RELAUNCH_TAG
from krea_dagster.plugin.sensors.retries import build_retries_sensor
from tests.dagster_bench import QUIET, OpenAccount, posts, run_job, write_table

KEYS: Final = [f"bucket-{number:03d}" for number in range(4)]
AUTOMATION: Final = {"dagster/from_automation_condition": "true"}


def lost_backfill(
    name: str,
    keys: list[str],
    partitions_def: dg.PartitionsDefinition[str],
    *,
    tags: Mapping[str, str] = AUTOMATION,
    status: BulkActionStatus = BulkActionStatus.FAILED,
) -> PartitionBackfill:
    """A backfill as the automation makes it, which the daemon could not work on."""
    assets = [dg.AssetKey(one) for one in ("images", "image_manifest")]
    specs = [dg.AssetSpec(key, partitions_def=partitions_def) for key in assets]
    targets = {AssetKeyPartitionKey(asset, key) for asset in assets for key in keys}
    backfill = PartitionBackfill.from_asset_graph_subset(
        backfill_id=name,
        backfill_timestamp=datetime.now(timezone.utc).timestamp(),
        tags=tags,
        dynamic_partitions_store=dg.DagsterInstance.ephemeral(),
        asset_graph_subset=AssetGraphSubset.from_asset_partition_set(
            targets, dg.Definitions(assets=specs).resolve_asset_graph()
        ),
        title=None,
        description=None,
        run_config=None,
    )
    made: PartitionBackfill = backfill._replace(status=status)
    return made


class Launches:
    """An instance, and backfills in it that the daemon could not work on."""

    def __init__(self, defs: dg.Definitions, instance: dg.DagsterInstance) -> None:
        self.defs, self.instance = defs, instance

    def lost(self, name: str, keys: list[str], **options: Any) -> None:
        partitions_def = self.defs.resolve_assets_def(dg.AssetKey("images")).partitions_def
        assert partitions_def is not None
        self.instance.add_backfill(lost_backfill(name, keys, partitions_def, **options))

    def tick(self, *, later: timedelta = timedelta(minutes=1)) -> list[dg.RunRequest]:
        images = self.defs.resolve_assets_def(dg.AssetKey("images"))
        sensor = build_retries_sensor(
            Names(), images, utc_now=lambda: datetime.now(timezone.utc) + later
        )
        with dg.build_sensor_context(self.instance, definitions=self.defs) as context:
            return list(sensor.evaluate_tick(context).run_requests or ())


@pytest.fixture
def launches(tmp_path: Path, emulator: Emulator, open_account: OpenAccount) -> Iterator[Launches]:
    rows = [f"a launch {number} of {tmp_path.name}" for number in range(12)]
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", {"prompt": rows}),
        krea=KreaResource(
            api_key=open_account(),
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path / "krea"),
        ),
        partition_by=f"hash:{len(KEYS)}",
        automation_condition=on_prompts_changed(),
    )
    with dg.DagsterInstance.ephemeral() as instance:
        yield Launches(defs, instance)


def ranges_of(requests: list[dg.RunRequest]) -> list[tuple[str, str]]:
    return [(one.tags[RANGE_START_TAG], one.tags[RANGE_END_TAG]) for one in requests]


def test_a_backfill_that_failed_before_its_first_run_is_launched_again_and_bought_once(
    launches: Launches, emulator: Emulator
) -> None:
    launches.lost("okgmlpxv", KEYS)
    (request,) = launches.tick()
    assert ranges_of([request]) == [(KEYS[0], KEYS[-1])]
    assert request.tags[RELAUNCH_TAG] == "okgmlpxv"
    # Dagster's daemon launches a run key once; a second tick asks for the same key.
    assert [one.run_key for one in launches.tick()] == [request.run_key]
    before = posts(emulator)
    job = launches.defs.resolve_job_def("krea_images")
    result = job.execute_in_process(
        instance=launches.instance, tags=dict(request.tags), run_config=QUIET
    )
    assert result.success
    assert posts(emulator) - before == 12
    assert launches.tick() == [], "all is delivered"


def test_partitions_with_a_run_of_the_backfill_are_left_alone_however_it_ended(
    launches: Launches,
) -> None:
    launches.lost("half", KEYS)
    job = launches.defs.resolve_job_def("krea_images")
    run = launches.instance.create_run_for_job(
        job,
        tags={"dagster/backfill": "half", RANGE_START_TAG: KEYS[0], RANGE_END_TAG: KEYS[1]},
    )
    launches.instance.report_run_failed(run, "the worker died")
    assert ranges_of(launches.tick()) == [(KEYS[2], KEYS[3])]


def test_a_launch_that_was_made_again_is_left_alone_also_if_its_run_fails(
    launches: Launches,
) -> None:
    launches.lost("again", KEYS)
    (request,) = launches.tick()
    job = launches.defs.resolve_job_def("krea_images")
    run = launches.instance.create_run_for_job(job, tags=dict(request.tags))
    launches.instance.report_run_failed(run, "the worker died")
    assert launches.tick() == []


def test_partitions_that_were_bought_since_are_left_alone(launches: Launches) -> None:
    launches.lost("late", KEYS)
    assert run_job(launches.defs, launches.instance, KEYS[1], KEYS[1]).success
    assert ranges_of(launches.tick()) == [(KEYS[0], KEYS[0]), (KEYS[2], KEYS[3])]


def test_backfills_of_people_running_ones_and_old_ones_are_left_alone(launches: Launches) -> None:
    launches.lost("person", KEYS, tags={})
    launches.lost("running", KEYS, status=BulkActionStatus.REQUESTED)
    assert launches.tick() == []
    launches.lost("old", KEYS)
    assert launches.tick(later=timedelta(hours=25)) == []

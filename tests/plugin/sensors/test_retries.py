"""The sensor that reports a failed run again whose retry Dagster has missed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData
from dagster._daemon.auto_run_reexecution.auto_run_reexecution import should_retry

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.sensors.retries import REPORTED_TAG, build_retries_sensor
from tests.dagster_bench import write_table

FAILURE = {dg.DagsterEventType.RUN_FAILURE}


@pytest.fixture
def retrying(tmp_path: Path) -> Iterator[dg.DagsterInstance]:
    """An instance with run retries, and no daemon."""
    settings = {"run_retries": {"enabled": True, "max_retries": 3}}
    with dg.instance_for_test(overrides=settings, temp_dir=str(tmp_path)) as instance:
        yield instance


@pytest.fixture
def defs(tmp_path: Path) -> dg.Definitions:
    prompts = write_table(tmp_path / "prompts.parquet", {"prompt": ["a gull"]})
    krea = KreaResource(emulator=True, storage=str(tmp_path / "krea"))
    return build_krea_definitions(prompts=prompts, krea=krea, partition_by="hash:2")


FailedRun = Callable[..., dg.DagsterRun]


@pytest.fixture
def failed_run(defs: dg.Definitions, retrying: dg.DagsterInstance) -> FailedRun:
    """Return a function that makes a run and reports that its worker died."""

    def make(job: str = "krea_images", *, tags: dict[str, str] | None = None) -> dg.DagsterRun:
        run = retrying.create_run_for_job(defs.resolve_job_def(job), tags=tags)
        retrying.report_run_failed(run, "the worker died")
        found = retrying.get_run_by_id(run.run_id)
        assert found is not None
        return found

    return make


def tick(
    defs: dg.Definitions, instance: dg.DagsterInstance, *, later: timedelta = timedelta(minutes=1)
) -> SensorExecutionData:
    images = defs.resolve_assets_def(dg.AssetKey("images"))
    sensor = build_retries_sensor(
        Names(), images, utc_now=lambda: datetime.now(timezone.utc) + later
    )
    with dg.build_sensor_context(instance, definitions=defs) as context:
        return sensor.evaluate_tick(context)


def failures_after(instance: dg.DagsterInstance, storage_id: int) -> int:
    """Return how many failures Dagster's daemon finds after this event."""
    found = instance.event_log_storage.get_logs_for_all_runs_by_log_id(
        after_cursor=storage_id, dagster_event_type=FAILURE
    )
    return len(found)


def newest(instance: dg.DagsterInstance) -> int:
    return instance.event_log_storage.get_maximum_record_id() or 0


def test_dagster_misses_the_retry_of_a_run_that_it_reads_too_early(
    defs: dg.Definitions, retrying: dg.DagsterInstance, failed_run: FailedRun
) -> None:
    """The reason for the sensor: the event is stored first, and the run's status after it."""
    early = retrying.create_run_for_job(defs.resolve_job_def("krea_images"))
    assert not should_retry(early, retrying)
    assert should_retry(failed_run(), retrying)


def test_a_missed_failure_is_reported_again_once(
    defs: dg.Definitions, retrying: dg.DagsterInstance, failed_run: FailedRun
) -> None:
    run = failed_run()
    seen = newest(retrying)
    assert run.run_id in str(tick(defs, retrying).skip_message)
    assert failures_after(retrying, seen) == 1
    found = retrying.get_run_by_id(run.run_id)
    assert found is not None
    assert found.tags[REPORTED_TAG] == "true"
    assert should_retry(found, retrying)
    seen = newest(retrying)
    assert "has retried every run" in str(tick(defs, retrying, later=timedelta(hours=1)))
    assert failures_after(retrying, seen) == 0


@pytest.mark.parametrize(
    ("age", "reported"),
    [(timedelta(seconds=5), 0), (timedelta(hours=23), 1), (timedelta(hours=25), 0)],
)
def test_a_failure_is_left_alone_while_dagster_may_still_see_it_and_after_a_day(
    defs: dg.Definitions,
    retrying: dg.DagsterInstance,
    failed_run: FailedRun,
    age: timedelta,
    reported: int,
) -> None:
    failed_run()
    seen = newest(retrying)
    tick(defs, retrying, later=age)
    assert failures_after(retrying, seen) == reported


def test_runs_that_were_retried_or_are_not_to_be_or_are_of_other_assets_are_left_alone(
    defs: dg.Definitions, retrying: dg.DagsterInstance, failed_run: FailedRun
) -> None:
    failed_run(tags={"dagster/auto_retry_run_id": "another"})
    failed_run(tags={"dagster/max_retries": "0"})
    failed_run("krea_spend")
    seen = newest(retrying)
    tick(defs, retrying)
    assert failures_after(retrying, seen) == 0


def test_a_run_of_chosen_assets_counts_by_these(
    defs: dg.Definitions, retrying: dg.DagsterInstance
) -> None:
    for job, chosen in (
        ("krea_images", ["images"]),
        ("krea_spend", ["spend_ledger", "spend_daily"]),
    ):
        run = retrying.create_run_for_job(
            defs.resolve_job_def(job), asset_selection=frozenset(map(dg.AssetKey, chosen))
        )
        retrying.report_run_failed(run)
    seen = newest(retrying)
    tick(defs, retrying)
    assert failures_after(retrying, seen) == 1


def test_without_run_retries_the_sensor_does_nothing(defs: dg.Definitions, tmp_path: Path) -> None:
    with dg.instance_for_test(temp_dir=str(tmp_path)) as instance:
        assert "Run retries are off" in str(tick(defs, instance).skip_message)

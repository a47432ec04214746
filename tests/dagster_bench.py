"""Helpers of tests with Dagster: write a table, run a job or a sensor, read the instance."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
from dagster._core.definitions.sensor_definition import SensorExecutionData

from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.prompts import PlannedImage

#: Opens an account at the emulator, with 1,000 credits or as many as are given; returns its key.
OpenAccount = Callable[..., str]

RANGE_START = "dagster/asset_partition_range_start"
RANGE_END = "dagster/asset_partition_range_end"

#: Dagster writes its log to the instance in full, and to the terminal only what kills a run.
QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}


def write_table(path: Path, columns: Mapping[str, Any] | pa.Table) -> str:
    """Write a prompt table, and return its path."""
    table = columns if isinstance(columns, pa.Table) else pa.table(dict(columns))
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)
    return str(path)


class SettingsOf(Protocol):
    """Makes the settings of a project in the test's folder, which buys from the emulator."""

    def __call__(self, partition_by: str, **further: Any) -> Settings: ...


def run_job(
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    first: str | None = None,
    last: str | None = None,
    *,
    job: str = "krea_images",
) -> dg.ExecuteInProcessResult:
    """Run the job for one partition, for a range of them in one run, or without partitions."""
    resolved = defs.resolve_job_def(job)
    if first is None or last is None:
        return resolved.execute_in_process(
            instance=instance, partition_key=first, run_config=QUIET, raise_on_error=False
        )
    return resolved.execute_in_process(
        instance=instance,
        tags={RANGE_START: first, RANGE_END: last},
        run_config=QUIET,
        raise_on_error=False,
    )


def tick(
    defs: dg.Definitions, instance: dg.DagsterInstance, sensor: str, cursor: str | None = None
) -> SensorExecutionData:
    """Evaluate a sensor, and apply its result as the daemon does."""
    context = dg.build_sensor_context(
        instance, cursor, resources=defs.resources, repository_def=defs.get_repository_def()
    )
    outcome = defs.resolve_sensor_def(sensor).evaluate_tick(context)
    for request in outcome.dynamic_partitions_requests or []:
        if isinstance(request, dg.AddDynamicPartitionsRequest):
            name, keys = request.partitions_def_name, list(request.partition_keys)
            instance.add_dynamic_partitions(name, keys)
            continue
        for key in request.partition_keys:
            instance.delete_dynamic_partition(request.partitions_def_name, key)
    for event in outcome.asset_events:
        assert isinstance(event, dg.AssetMaterialization | dg.AssetObservation)
        instance.report_runless_asset_event(event)
    return outcome


def wanted(images: Iterable[PlannedImage]) -> list[RequestedImage]:
    """Return planned images as the requests of a run."""
    return [RequestedImage(image.request, image.partition_key) for image in images]


def latest(
    instance: dg.DagsterInstance, key: Sequence[str], partition: str
) -> dg.AssetMaterialization:
    """Return the last materialization of a partition in the instance."""
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(key), asset_partitions=[partition]), limit=1
    )
    assert found.records, f"{key} {partition} was never materialized"
    materialization = found.records[0].asset_materialization
    assert materialization is not None
    return materialization


def values(materialization: dg.AssetMaterialization) -> dict[str, Any]:
    """Return its metadata as plain values, without the prefix of this package's entries."""
    return {
        name.removeprefix("krea/"): entry.value for name, entry in materialization.metadata.items()
    }


def bought(emulator: Emulator, marker: str) -> list[dict[str, Any]]:
    """Return the emulator's tasks whose prompt contains this text."""
    tasks: list[dict[str, Any]] = emulator.stats()["tasks"]
    return [task for task in tasks if marker in task["prompt"]]


def posts(emulator: Emulator) -> int:
    """Return the number of create calls that the emulator has received."""
    return int(emulator.stats(tasks=False)["submit_posts"])


def check_of(
    result: dg.ExecuteInProcessResult, name: str = "all_rows_delivered"
) -> dg.AssetCheckEvaluation:
    """Return the result of a check in a run."""
    (found,) = [one for one in result.get_asset_check_evaluations() if one.check_name == name]
    return found


def failure_text(result: dg.ExecuteInProcessResult, step: str) -> str:
    """Return the text of a failed step on the run's page."""
    for event in result.all_events:
        if event.event_type_value == "STEP_FAILURE" and event.step_key == step:
            data = event.step_failure_data
            assert data.user_failure_data is not None
            return data.user_failure_data.description or ""
    raise AssertionError(f"step {step} did not fail")


def end_group(leader: subprocess.Popen[bytes]) -> None:
    """End a process group, first by an interrupt."""
    os.killpg(leader.pid, signal.SIGINT)
    try:
        leader.wait(timeout=60)
    except subprocess.TimeoutExpired:  # on a busy machine Dagster takes its time
        os.killpg(leader.pid, signal.SIGKILL)
        leader.wait()

"""Many partitions in Dagster: runs with nothing to do, and a sensor that sees new prompts.

python -m benchmarks.partitions [--quick] [--json]

The floor is what Dagster itself needs for the same: empty assets over the same partitions, and the
same events reported one by one. ``--work KIND`` is a process of the benchmark.
"""

from __future__ import annotations

import json
import os
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import BenchmarkServer, note_progress, run
from benchmarks.report import Report, finish, options_of

PARTITIONS: Final = 200
QUICK_PARTITIONS: Final = 40
ROWS: Final = 3  # of a partition
NEW: Final = 1_000  # partitions that the sensor sees for the first time
QUICK_NEW: Final = 100
COMMAND: Final = 1.3
RUN: Final = 1.3
SENSOR: Final = 1.2

SERVER: Final = ("--latency", 0.1, "--concurrent", 64, "--image-bytes", 1)


def main() -> None:
    """Run the command, or one process of it."""
    parser = options_of("partitions")
    parser.add_argument("--work", choices=WORK)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--url", default="https://nowhere.invalid")
    parser.add_argument("--count", type=int)
    options = parser.parse_args()
    if options.work:
        print(json.dumps(WORK[options.work](options)))
        return
    count = QUICK_PARTITIONS if options.quick else PARTITIONS
    new = QUICK_NEW if options.quick else NEW
    report = Report(
        "partitions",
        "Many partitions in Dagster",
        setting=(
            f"{count} partitions of {ROWS} stored images of 13 KB; {new:,} partitions whose "
            "prompts are new; an instance on disk (SQLite); CPU of a whole process, the sensor's "
            "without imports; n = 1"
        ),
        columns=["what", "CPU, s"],
    )
    _nothing_to_do(report, count)
    _new_prompts(report, new)
    report.note(
        "A run of `krea_images` materializes two assets, so its floor are two empty assets in one "
        "job, without checks. The command launches no run for partitions with nothing to do."
    )
    finish(report, options)


def _nothing_to_do(report: Report, count: int) -> None:
    with TemporaryDirectory() as folder:
        where = ["--folder", folder, "--count", str(count)]
        with BenchmarkServer.start(*SERVER) as server:
            note_progress(f"{ROWS * count} images")
            url = ["--url", server.url]
            _run("table", *where)
            bought = _run("command", *where, *url)[1]
            if bought["delivered"] != ROWS * count:
                raise RuntimeError(f"bought {bought}")
            cpu_s = {
                kind: _checked(kind, count, *where, *url)
                for kind in ("command", "job", "empty", "two-empty")
            }
    report.add("`krea-dagster materialize`, nothing to do", f"{cpu_s['command']:.1f}")
    report.add("a run of `krea_images`, nothing to do", f"{cpu_s['job']:.1f}")
    report.add("a run of one empty asset", f"{cpu_s['empty']:.1f}")
    report.add("a run of two empty assets", f"{cpu_s['two-empty']:.1f}")
    report.claim(
        "the command to a run of one empty asset", cpu_s["command"] / cpu_s["empty"], COMMAND
    )
    report.claim("a run to that of two empty assets", cpu_s["job"] / cpu_s["two-empty"], RUN)


def _new_prompts(report: Report, new: int) -> None:
    note_progress(f"sensor, {new:,} partitions")
    with TemporaryDirectory() as folder:
        found = _run("sensor", "--folder", folder, "--count", str(new))[1]
    ours_s, floor_s = found["sensor_s"], found["events_s"]
    events, ticks = found["events"], found["ticks"]
    report.add(f"sensor `krea_prompts` until {new:,} partitions are known", f"{ours_s:.1f}")
    report.add(f"its {events:,} events, reported to Dagster", f"{floor_s:.1f}")
    report.claim("ticks of the sensor", ticks, 1)
    report.claim("events per partition and asset", events / new / 2, 1)
    report.claim("the sensor to its events", ours_s / floor_s, SENSOR)


def _run(kind: str, *arguments: str) -> tuple[float, dict[str, Any]]:
    ended = run(["benchmarks.partitions", "--work", kind, *arguments])
    return ended.cpu_s, ended.output


def _checked(kind: str, count: int, *arguments: str) -> float:
    note_progress(f"{kind}, {count} partitions")
    cpu_s, output = _run(kind, *arguments)
    if output.get("reused", ROWS * count) != ROWS * count or not output["success"]:
        raise RuntimeError(f"{kind}: {output}")
    return cpu_s


# -- the processes ----------------------------------------------------------------------------


def _table(options: Namespace) -> dict[str, Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f"p-{number:06d}" for number in range(ROWS * options.count)]
    buckets = [f"b-{number // ROWS:04d}" for number in range(ROWS * options.count)]
    pq.write_table(
        pa.table({"prompt_id": names, "prompt": names, "bucket": buckets}),
        options.folder / "prompts.parquet",
    )
    return {}


def _settings(options: Namespace) -> Any:
    os.environ.update(
        {
            "EVOLINK_API_KEY": "bench",
            "EVOLINK_BASE_URL": options.url,
            "KREA_PROMPTS": str(options.folder / "prompts.parquet"),
            "KREA_STORAGE": str(options.folder / "krea"),
            "KREA_PARTITION_BY": "column:bucket",
        }
    )
    from krea_dagster.application.settings import Settings

    return Settings.from_environment()


def _command(options: Namespace) -> dict[str, Any]:
    settings = _settings(options)
    from krea_dagster.plugin.materialize import materialize

    done = materialize(settings)
    progress = done.progress
    return {
        "success": not done.failures and progress.ended == progress.total == ROWS * options.count,
        "delivered": progress.delivered,
        **({"reused": progress.reused} if not progress.delivered else {}),
    }


def _job(options: Namespace) -> dict[str, Any]:
    settings = _settings(options)
    from krea_dagster.plugin.environment import definitions_of

    job = definitions_of(settings).resolve_job_def("krea_images")
    return _executed(job, options, options.folder / "krea" / "dagster")


def _empty(options: Namespace) -> dict[str, Any]:
    return _empty_assets(options, 1)


def _two_empty(options: Namespace) -> dict[str, Any]:
    return _empty_assets(options, 2)


def _empty_assets(options: Namespace, number: int) -> dict[str, Any]:
    import dagster as dg

    common: dict[str, Any] = {
        "partitions_def": dg.DynamicPartitionsDefinition(name="krea_bucket"),
        "backfill_policy": dg.BackfillPolicy.single_run(),
    }

    def nothing() -> None: ...

    first: dg.AssetsDefinition = dg.asset(name="first", **common)(nothing)
    second: dg.AssetsDefinition = dg.asset(name="second", deps=[first], **common)(nothing)
    chosen = [first, second][:number]
    job = dg.define_asset_job("empty", chosen)
    defs = dg.Definitions(chosen, jobs=[job], executor=dg.in_process_executor)
    home = options.folder / f"empty-{number}-{time.monotonic_ns()}"
    home.mkdir()
    return _executed(defs.resolve_job_def("empty"), options, home)


def _executed(job: Any, options: Namespace, home: Path) -> dict[str, Any]:
    """Run a job over all partitions, in one run."""
    import dagster as dg

    keys = [f"b-{number:04d}" for number in range(options.count)]
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.add_dynamic_partitions("krea_bucket", keys)
        result = job.execute_in_process(
            instance=instance,
            tags={
                "dagster/asset_partition_range_start": keys[0],
                "dagster/asset_partition_range_end": keys[-1],
            },
            run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
        )
        return {"success": result.success}


def _sensor(options: Namespace) -> dict[str, Any]:
    """Evaluate the sensor as the daemon does, until it reports nothing more."""
    _table(options)
    settings = _settings(options)
    import dagster as dg

    from krea_dagster.plugin.environment import definitions_of

    defs = definitions_of(settings)
    sensor = defs.resolve_sensor_def("krea_prompts")
    table = options.folder / "prompts.parquet"
    os.utime(table, (1_700_000_000, 1_700_000_000))  # so that it is not about to change
    homes = [options.folder / name for name in ("ours", "floor")]
    reported: list[Any] = []
    ticks, cursor, more = 0, None, True
    for home in homes:
        home.mkdir()
    with dg.DagsterInstance.from_config(str(homes[0])) as instance:
        began_s = time.process_time()
        while more:
            context = dg.build_sensor_context(instance, cursor, resources=defs.resources)
            outcome = sensor.evaluate_tick(context)
            for event in outcome.asset_events:
                instance.report_runless_asset_event(event)
            for request in outcome.dynamic_partitions_requests or []:
                instance.add_dynamic_partitions(
                    request.partitions_def_name, list(request.partition_keys)
                )
            more, cursor = bool(outcome.asset_events), outcome.cursor
            reported += outcome.asset_events
            ticks += more
        sensor_s = time.process_time() - began_s
    with dg.DagsterInstance.from_config(str(homes[1])) as instance:
        began_s = time.process_time()
        for event in reported:
            instance.report_runless_asset_event(event)
        events_s = time.process_time() - began_s
    return {"ticks": ticks, "events": len(reported), "sensor_s": sensor_s, "events_s": events_s}


WORK: Final[dict[str, Callable[[Namespace], dict[str, Any]]]] = {
    "table": _table,
    "command": _command,
    "job": _job,
    "empty": _empty,
    "two-empty": _two_empty,
    "sensor": _sensor,
}


if __name__ == "__main__":
    main()

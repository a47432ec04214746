"""What a run left undone is in its tags, for people and for their sensors."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.errors import OutOfCredits, RunStopped
from krea_dagster.plugin.failures import KreaFailure, failure_of, failure_tags, stop_failure
from tests.dagster_bench import OpenAccount, run_job, write_table

NOTHING_LEFT = RunReport(0, Progress(total=4), 1.0)


def test_a_run_without_a_missing_row_has_no_tags() -> None:
    assert failure_tags(NOTHING_LEFT, 0) == {}


def test_rows_that_failed_are_counted_and_the_person_is_sent_to_the_check() -> None:
    tags = failure_tags(NOTHING_LEFT, 2)
    assert (tags["krea/outcome"], tags["krea/rows_missing"]) == ("rows_missing", "2")
    assert tags["krea/credits_at_stake"] == "0"
    assert "all_rows_delivered" in tags["krea/to_do"]
    assert "krea/stopped" not in tags


def test_a_cap_says_that_it_can_be_raised() -> None:
    report = RunReport(0, Progress(total=4), 1.0, caps_reached=["run_credits of 1"])
    assert failure_tags(report, 2)["krea/to_do"].startswith("raise the cap")


@pytest.mark.parametrize("code", ["api_away", "tasks_not_found", "price_doubted"])
def test_what_stopped_this_run_is_not_said_to_be_another_runs(code: str) -> None:
    report = RunReport(0, Progress(total=1), 1.0, stopped=RunStopped(code, "its message"))
    said = str(stop_failure(report).description)
    assert "another run" not in said
    assert "its message" in said


def test_dagster_takes_the_tags_as_they_are() -> None:
    """It warns of keys that it does not take, and the tests' warnings are errors."""
    report = RunReport(0, Progress(total=1), 1.0, stopped=OutOfCredits("no", status=402))
    tags = failure_tags(report, 1)

    @dg.job(tags=tags)
    def taken() -> None: ...

    assert taken.tags == tags


def test_a_users_failure_sensor_reads_what_is_missing_what_it_costs_and_what_to_do(
    tmp_path: Path, emulator: Emulator, instance: dg.DagsterInstance, open_account: OpenAccount
) -> None:
    """An account with credits for two images of four."""
    rows = {"prompt": [f"tagged {number}" for number in range(4)]}
    defs = build_krea_definitions(
        prompts=write_table(tmp_path / "prompts.parquet", rows),
        partition_by="hash:1",
        krea=KreaResource(
            api_key=open_account(1.0),
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path / "krea"),
        ),
        key_prefix="tagged",
    )
    result = run_job(defs, instance, "bucket-000", job="tagged_krea_images")
    told: list[KreaFailure | None] = []

    @dg.run_failure_sensor
    def tell_us(context: dg.RunFailureSensorContext) -> None:
        told.append(failure_of(context.dagster_run))

    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    event = result.get_run_failure_event()
    tell_us(
        dg.build_run_status_sensor_context(
            "tell_us", dagster_event=event, dagster_instance=instance, dagster_run=run
        ).for_run_failure()
    )
    assert told == [
        KreaFailure(
            run_id=result.run_id,
            outcome="stopped",
            rows_missing=2,
            credits_at_stake="0",
            stopped="insufficient_quota",
            to_do="top up, then launch these partitions again: only missing images are bought",
        )
    ]


def test_a_run_without_the_tags_has_nothing_to_say(instance: dg.DagsterInstance) -> None:
    @dg.job
    def other() -> None: ...

    result = other.execute_in_process(instance=instance)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    assert failure_of(run) is None


@pytest.mark.parametrize("code", ["", "x" * 400])
def test_a_stop_without_a_code_is_named_by_its_kind(code: str) -> None:
    report = RunReport(0, Progress(total=1), 1.0, stopped=OutOfCredits("no", status=402, code=code))
    stopped = failure_tags(report, 1)["krea/stopped"]
    assert stopped == (code or "OutOfCredits")

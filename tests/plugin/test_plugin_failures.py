"""What a run left undone is in its tags, for people and for their sensors."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.engine.progress import Progress
from krea_dagster.engine.runner import RunReport, Wanted
from krea_dagster.errors import OutOfCredits
from krea_dagster.plugin.failures import KreaFailure, failure_of, failure_tags, tag_run
from krea_dagster.prompts import PromptTable, parse_partition_by, plan_images
from tests.dagster_bench import OpenAccount, write_table

NOTHING_LEFT = RunReport(0, Progress(total=4), 1.0)


def test_a_run_without_a_missing_row_has_no_tags() -> None:
    assert failure_tags(NOTHING_LEFT, 0, {}) == {}


def test_rows_that_failed_are_counted_and_the_person_is_sent_to_the_check() -> None:
    tags = failure_tags(NOTHING_LEFT, 2, {})
    assert (tags["krea/outcome"], tags["krea/rows_missing"]) == ("rows_missing", "2")
    assert tags["krea/credits_at_stake"] == "0"
    assert "all_rows_delivered" in tags["krea/to_do"]
    assert "krea/stopped" not in tags


def test_a_cap_says_that_it_can_be_raised() -> None:
    report = RunReport(0, Progress(total=4), 1.0, caps_reached=["run_credits of 1"])
    assert failure_tags(report, 2, {})["krea/to_do"].startswith("raise the cap")


def test_dagster_takes_the_tags_as_they_are() -> None:
    """It warns of keys that it does not take, and the tests' warnings are errors."""
    report = RunReport(0, Progress(total=1), 1.0, stopped=OutOfCredits("no", status=402))
    tags = failure_tags(report, 1, {})

    @dg.job(tags=tags)
    def taken() -> None: ...

    assert taken.tags == tags


def test_a_run_that_the_account_stopped_says_in_its_tags_what_is_missing_and_what_to_do(
    tmp_path: Path, emulator: Emulator, instance: dg.DagsterInstance, open_account: OpenAccount
) -> None:
    """A step adds tags to its own run, which a failure sensor then reads."""
    source = write_table(
        tmp_path / "prompts.parquet", {"prompt": [f"tagged {number}" for number in range(4)]}
    )
    table = PromptTable(source, parse_partition_by("hash:1"))
    krea = KreaResource(
        api_key=open_account(1.0), base_url=emulator.url, storage=str(tmp_path / "krea")
    )

    @dg.op
    def buy() -> None:
        context = dg.OpExecutionContext.get()
        images = plan_images(table.read().rows)
        wanted = [Wanted(image.request, image.partition_key) for image in images]
        report = krea.carry(wanted, run_id=context.run_id)
        tag_run(context.instance, context.run_id, krea, report, len(report.left))
        raise dg.Failure("as the asset does")

    @dg.job
    def buying() -> None:
        buy()

    result = buying.execute_in_process(instance=instance, raise_on_error=False)
    run = instance.get_run_by_id(result.run_id)
    assert run is not None
    failure = failure_of(run)
    assert failure == KreaFailure(
        run_id=result.run_id,
        outcome="stopped",
        rows_missing=2,
        credits_at_stake="0",
        stopped="insufficient_quota",
        to_do="top up, then launch these partitions again: only what is missing is bought",
    )


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
    stopped = failure_tags(report, 1, {})["krea/stopped"]
    assert stopped == (code or "OutOfCredits")

"""Cancelled, executed again and retried by Dagster itself: each image is bought once."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.emulator import Emulator
from krea_dagster.engine.states import State
from tests.daemon.daemon_bench import Dagster, dagster_dev
from tests.dagster_bench import write_table

pytestmark = pytest.mark.daemon

COUNT = 12
BUCKET = "bucket-000"


def terminate(dagster: Dagster, run_id: str) -> None:
    """Press the button that cancels a run."""
    data = dagster.ask(
        "mutation($id: String!) { terminateRun(runId: $id) "
        "{ __typename ... on TerminateRunFailure { message } } }",
        id=run_id,
    )
    assert data["terminateRun"]["__typename"] == "TerminateRunSuccess", data


def execute_again(dagster: Dagster, run_id: str) -> str:
    """Press the button that executes a run again from failure."""
    data = dagster.ask(
        "mutation($id: String!) { launchRunReexecution(reexecutionParams: "
        "{parentRunId: $id, strategy: FROM_FAILURE}) "
        "{ __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }",
        id=run_id,
    )["launchRunReexecution"]
    assert data["__typename"] == "LaunchRunSuccess", data
    return str(data["run"]["runId"])


def status(dagster: Dagster, run_id: str) -> dg.DagsterRunStatus:
    run = dagster.instance.get_run_by_id(run_id)
    assert run is not None
    return run.status


def write_rows(folder: Path, count: int, more: str = "") -> None:
    write_table(
        folder / "prompts.parquet",
        {"prompt": [f"image {number}{more}" for number in range(count)]},
    )


def test_a_run_that_is_cancelled_executed_again_or_retried_buys_each_image_once(
    tmp_path: Path,
) -> None:
    """The journal decides, also when Dagster repeats a run."""
    success = dg.DagsterRunStatus.SUCCESS
    write_rows(tmp_path, COUNT)
    with (
        Emulator(latency_s=0.05, state=tmp_path / "emulator") as emulator,
        dagster_dev(
            tmp_path,
            base_url=emulator.url,
            api_key="emulator",
            partition_by="hash:1",
            settings="run_retries:\n  enabled: true\n  max_retries: 0\n",
        ) as dagster,
    ):
        krea = KreaResource(storage=str(tmp_path / "krea"))

        # Cancelled while all of its tasks are at the server.
        emulator.world.latency_s = 40.0
        run = dagster.launch(BUCKET)
        dagster.wait(lambda: emulator.stats(tasks=False)["creates"] == COUNT)
        terminate(dagster, run)
        dagster.wait(lambda: status(dagster, run) is dg.DagsterRunStatus.CANCELED)
        with krea.krea().open_journal() as journal:
            records = list(journal.all_records())
        assert Counter(record.state for record in records) == {State.SUBMITTED: COUNT}
        assert {record.claimed_by for record in records} == {None}
        created = {task["task_id"] for task in emulator.stats()["tasks"]}
        assert {record.task_id for record in records} == created

        # Executed again from failure, while the account has credits for three more images only.
        emulator.world.latency_s = 0.05
        emulator.world.set_quota((COUNT + 3) * 0.45)
        write_rows(tmp_path, COUNT + 6)
        poor = dagster.launch(BUCKET)
        dagster.wait(lambda: status(dagster, poor) is dg.DagsterRunStatus.FAILURE)
        emulator.world.set_quota(None)
        again = execute_again(dagster, poor)
        dagster.wait(lambda: status(dagster, again) is success)

        # Retried by the daemon, which a tag of the run allows.
        emulator.world.set_quota((COUNT + 6 + 1) * 0.45)
        write_rows(tmp_path, COUNT + 9)
        retried = dagster.launch(BUCKET, {"dagster/max_retries": "1"})
        dagster.wait(lambda: status(dagster, retried) is dg.DagsterRunStatus.FAILURE)
        emulator.world.set_quota(None)
        dagster.wait(lambda: len(dagster.runs()) == 5 and dagster.runs()[-1].is_finished)
        last = dagster.runs()[-1]
        assert (last.parent_run_id, last.status) == (retried, success)

        tasks = Counter(task["prompt"] for task in emulator.stats()["tasks"])
        assert set(tasks) >= {f"image {number}" for number in range(COUNT + 9)}
        with krea.krea().open_journal() as journal:
            states = Counter(record.state for record in journal.all_records())
        assert states == {State.STORED: COUNT + 9}
        assert tasks == dict.fromkeys(tasks, 1)

"""The salvage's sensor, and the runs that it starts."""

from __future__ import annotations

import asyncio
import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.sensor_definition import SensorExecutionData

from krea_dagster import build_krea_definitions
from krea_dagster.application.runner import open_runner
from krea_dagster.emulator import Emulator
from krea_dagster.engine.states import State
from tests.dagster_bench import tick
from tests.engine.harness import ServerClock
from tests.spend.project_harness import LEARNED, ProjectHarness

NOW = datetime(2026, 11, 2, 12, 0, tzinfo=timezone.utc)
EVER = datetime(1970, 1, 1, tzinfo=timezone.utc)
TICK = timedelta(minutes=5)
HOUR = timedelta(hours=1)


@pytest.fixture
def server_clock() -> ServerClock:
    return ServerClock()


@pytest.fixture
def slow(tmp_path: Path, server_clock: ServerClock) -> Iterator[Emulator]:
    """Tasks that take an hour of the server's clock."""
    with Emulator(
        state=tmp_path / "server", latency_s=3600.0, latency_jitter=0.0, clock=server_clock
    ) as emulator:
        emulator.world.add_account("sk-of-the-salvage", 10_000_000)
        yield emulator


class SalvageHarness:
    """A project whose run was killed after it had bought, and the daemon that looks after it."""

    def __init__(self, project: ProjectHarness, instance: dg.DagsterInstance) -> None:
        self.project, self.instance = project, instance
        project.table  # noqa: B018 - written where it is asked for
        self.defs = build_krea_definitions(
            prompts=str(project.folder / "prompts.parquet"),
            krea=project.resource,
            partition_by="hash:2",
        )
        self.cursor: str | None = None
        self.runs = 0
        krea = project.krea
        with (
            open_runner(krea, "run-1", lambda _: None, project.table) as runner,
            project.batch() as batch,
        ):
            wanted = batch.state(krea).wanted()
            policy = replace(runner.policy, patience_s=0.05)
            asyncio.run(replace(runner, policy=policy, latencies=LEARNED).run(wanted))

    def tick(self) -> SensorExecutionData:
        """Five minutes later: look, and run what was asked for."""
        self.pass_by(TICK)
        looked = tick(self.defs, self.instance, "krea_salvage", self.cursor)
        self.cursor = looked.cursor
        for request in looked.run_requests or ():
            self.runs += 1
            job = self.defs.resolve_job_def("krea_salvage")
            assert job.execute_in_process(instance=self.instance, tags=dict(request.tags)).success
        return looked

    def pass_by(self, time: timedelta) -> None:
        """Let everything that is written down be older."""
        journal = self.project.folder / "krea" / "journal.db"
        with closing(sqlite3.connect(journal)) as connection, connection:
            connection.execute(
                "UPDATE submissions SET submitted_at = submitted_at - ?, sent_at = sent_at - ?",
                [time // timedelta(microseconds=1)] * 2,
            )
        if self.cursor is not None:
            times = map(datetime.fromisoformat, json.loads(self.cursor))
            self.cursor = json.dumps([(at - time).isoformat() for at in times])


def test_a_rejected_image_is_downloaded_once(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    project = ProjectHarness(tmp_path, slow, "sk-of-the-salvage").with_rows("ash [emulator: black]")
    with dg.DagsterInstance.ephemeral() as instance:
        harness = SalvageHarness(project, instance)
        server_clock.move(3601.0)
        for _ in range(4):
            harness.tick()
        (record,) = project.records().values()
        assert (record.state, record.error_code) == (State.COMPLETED, "flat_image")
        assert (harness.runs, slow.stats()["file_gets"]) == (1, 1)


def test_a_task_that_does_not_end_is_salvaged_at_growing_pauses_and_its_end_is_told_once(
    tmp_path: Path, slow: Emulator
) -> None:
    project = ProjectHarness(tmp_path, slow, "sk-of-the-salvage").with_rows("ash")
    with dg.DagsterInstance.ephemeral() as instance:
        harness = SalvageHarness(project, instance)
        harness.pass_by(2 * HOUR)
        looks = [harness.tick() for _ in range(4)]
        assert [len(look.run_requests or ()) for look in looks] == [1, 0, 0, 0]
        assert looks[1].skip_message == (
            "1 images that are paid for are not collected yet; none is due now."
        )
        harness.pass_by(60 * HOUR)
        last, told, after = harness.tick(), harness.tick(), harness.tick()
        assert len(last.run_requests or ()) == 1, "its last look"
        assert "1 images that were paid for (0.45 credits) could not be fetched" in str(
            told.skip_message
        )
        assert after.skip_message == "All images that were paid for are collected."
        assert not [*(told.run_requests or ()), *(after.run_requests or ())]


def test_a_salvage_that_a_person_starts_takes_up_everything(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    project = ProjectHarness(tmp_path, slow, "sk-of-the-salvage").with_rows("ash", "birch")
    with dg.DagsterInstance.ephemeral() as instance:
        harness = SalvageHarness(project, instance)
        harness.pass_by(60 * HOUR)
        server_clock.move(3601.0)
        job = harness.defs.resolve_job_def("krea_salvage")
        assert job.execute_in_process(instance=instance).success
        assert {record.state for record in project.records().values()} == {State.STORED}


def test_what_was_given_up_is_asked_about_for_a_week(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    project = ProjectHarness(tmp_path, slow, "sk-of-the-salvage").with_rows("ash")
    with dg.DagsterInstance.ephemeral() as instance:
        harness = SalvageHarness(project, instance)
        with closing(sqlite3.connect(tmp_path / "krea" / "journal.db")) as database, database:
            database.execute("UPDATE requests SET state = 'expired', error_code = 'task_not_found'")
        server_clock.move(3601.0)
        harness.pass_by(timedelta(days=8))
        _, found = project.krea.salvage(run_id="old", table=project.table)
        assert found == {}
        harness.pass_by(timedelta(days=-2))
        _, found = project.krea.salvage(run_id="young", table=project.table)
        assert [record.state for record in found.values()] == [State.STORED]

"""Submit now, collect later: which partitions are collected when, and by which runs."""

import sqlite3
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import Engine, event

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.plugin.sensors.collect import (
    COLLECTS_TAG,
    GOES_ON,
    GOES_ON_TAG,
    due_collections,
    due_to_go_on,
)
from tests.dagster_bench import run_job, tick, write_table
from tests.engine.harness import ServerClock, make_request

NOW = datetime(2026, 11, 2, 12, 0, tzinfo=timezone.utc)
#: Partitions of two runs.
FIRST, SECOND = (("dagster/partition", "a"),), (("dagster/partition", "b"),)
PARTITIONS = {"run-a": FIRST, "run-b": SECOND}


def waiting(age_s: float, run_id: str = "run-a", seed: int = 1, **fields: Any) -> Record:
    submitted_at = NOW - timedelta(seconds=age_s)
    values = {"task_id": f"task-{seed}", "submitted_at": submitted_at, "run_id": run_id, **fields}
    return Record(make_request(seed=seed), State.SUBMITTED, "p", **values)


def call_about(record: Record, ago_s: float) -> dict[str, ReceivedCallback]:
    at = NOW - timedelta(seconds=ago_s)
    return {record.request_key: ReceivedCallback(record.request_key, None, at, at, 1)}


def due(*records: Record, **given: Any) -> list[Any]:
    values: dict[str, Any] = {
        "partitions": PARTITIONS, "called": {}, "launched": {}, "now": NOW, **given
    }  # fmt: skip
    return [one.partitions for one in due_collections(records, **values)]


URL = "https://hooks.example.com/x"


# -- when -------------------------------------------------------------------------------------


def test_images_are_collected_once_they_are_called_about() -> None:
    record = waiting(5, callback_url=URL)
    assert due(record) == []
    assert due(record, called=call_about(record, 1)) == [FIRST]


def test_a_call_that_a_run_has_followed_is_no_reason_for_another() -> None:
    record = waiting(30, callback_url=URL)
    called = call_about(record, 20)
    launched = {FIRST: NOW - timedelta(seconds=10)}
    assert due(record, called=called, launched=launched) == []
    assert due(record, called=call_about(record, 5), launched=launched) == [FIRST]


def test_without_calls_the_clock_says_when() -> None:
    assert due(waiting(50)) == []
    assert due(waiting(70)) == [FIRST]
    assert due(waiting(70, callback_url=URL)) == [], "its call is still to be expected"
    assert due(waiting(700, callback_url=URL)) == [FIRST], "its call was missed"


def test_what_was_not_finished_is_collected_at_growing_ages() -> None:
    launched = {FIRST: NOW - timedelta(seconds=30)}
    assert due(waiting(110), launched=launched) == [], "looked at when it was 80 s old"
    assert due(waiting(110), launched={FIRST: NOW - timedelta(seconds=45)}) == [FIRST]


def test_a_link_at_hand_is_fetched_at_the_next_look() -> None:
    record = waiting(2, completed_at=NOW)
    assert due(record) == []
    completed = Record(**{**vars(record), "state": State.COMPLETED})
    assert due(completed) == [FIRST]


def test_links_that_expire_soonest_are_collected_first() -> None:
    young, old = waiting(100, "run-a", 1), waiting(21 * 3600, "run-b", 2)
    assert due(young, old) == [SECOND, FIRST]
    launched = {SECOND: NOW - timedelta(minutes=29)}
    assert due(young, old, launched=launched) == [FIRST]
    launched = {SECOND: NOW - timedelta(minutes=31)}
    assert due(young, old, launched=launched) == [SECOND, FIRST], "every half hour from 20 h on"
    assert due(waiting(49 * 3600.0)) == [], "what could be had was had"


def test_a_file_that_cannot_be_stored_launches_no_run_at_every_look() -> None:
    record = Record(**{**vars(waiting(3600, completed_at=NOW)), "state": State.COMPLETED})
    assert due(record) == [FIRST]
    assert due(record, launched={FIRST: NOW - timedelta(minutes=4)}) == []
    assert due(record, launched={FIRST: NOW - timedelta(minutes=21)}) == [FIRST]


def test_an_unknown_purchase_is_collected_only_once_it_is_called_about() -> None:
    values = {**vars(waiting(100)), "state": State.UNKNOWN, "sent_at": NOW, "submitted_at": None}
    record = Record(**values)
    assert due(record) == []
    assert due(record, called=call_about(record, 1)) == [FIRST]


def test_partitions_with_rows_that_found_no_room_are_launched_again_after_a_pause() -> None:
    left = [(FIRST, NOW - timedelta(minutes=6)), (SECOND, NOW - timedelta(minutes=4))]
    assert due_to_go_on(left, {}, NOW) == [FIRST]
    assert due_to_go_on(left, {FIRST: NOW - timedelta(minutes=1)}, NOW) == []


def test_what_a_failed_or_cancelled_run_left_is_not_collected_here() -> None:
    assert due(waiting(1000, "run-cancelled")) == []


def test_each_collection_says_for_how_many_images_it_is() -> None:
    records = [waiting(100 + n, "run-a", n + 1) for n in range(3)]
    (one,) = due_collections(records, PARTITIONS, {}, {}, NOW)
    assert (one.images, one.oldest_at) == (3, NOW - timedelta(seconds=102))


# -- through Dagster --------------------------------------------------------------------------


@pytest.fixture
def server_clock() -> ServerClock:
    return ServerClock()


@pytest.fixture
def slow(server_clock: ServerClock) -> Iterator[Emulator]:
    """Tasks that take an hour of the server's clock."""
    with Emulator(latency_s=3600.0, latency_jitter=0.0, clock=server_clock) as emulator:
        yield emulator


def location(folder: Path, emulator: Emulator, **settings: Any) -> dg.Definitions:
    table = folder / "prompts.parquet"
    if not table.exists():
        write_table(table, {"prompt": [f"boat {n}" for n in range(6)]})
    return build_krea_definitions(
        prompts=str(table),
        krea=KreaResource(
            api_key="emulator", base_url=emulator.url, storage=str(folder / "krea"), **settings
        ),
        partition_by="hash:2",
        collect_later=True,
    )  # fmt: skip


RANGE = {
    "dagster/asset_partition_range_start": "bucket-000",
    "dagster/asset_partition_range_end": "bucket-001",
}


def test_a_run_submits_and_ends_and_the_sensor_launches_the_one_that_collects(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    defs = location(tmp_path, slow)
    job = defs.resolve_job_def("krea_images")
    with dg.DagsterInstance.ephemeral() as instance:
        first = job.execute_in_process(instance=instance, tags=RANGE)
        assert first.success
        assert slow.stats()["in_flight"] == 6
        (check,) = first.get_asset_check_evaluations()[:1]
        assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert "a later run collects them" in (check.description or "")
        run = instance.get_run_by_id(first.run_id)
        assert run is not None
        assert "krea/outcome" not in run.tags, "nothing is wrong with such a run"

        assert not tick(defs, instance, "krea_collect").run_requests, "they are seconds old"
        _make_older(tmp_path / "krea" / "journal.db", seconds=120)
        launched = tick(defs, instance, "krea_collect")
        (request,) = launched.run_requests or ()
        assert {name: request.tags[name] for name in RANGE} == RANGE
        assert request.tags[COLLECTS_TAG] == "6"
        assert not tick(defs, instance, "krea_collect", launched.cursor).run_requests, (
            "it has just been launched"
        )

        server_clock.move(3601.0)
        second = job.execute_in_process(instance=instance, tags=dict(request.tags))
        assert second.success
        books = slow.stats()
        assert (books["creates"], books["submit_posts"]) == (6, 6)
        assert second.get_asset_check_evaluations()[0].passed
        assert not tick(defs, instance, "krea_collect").run_requests


def test_what_collects_a_trial_buys_no_other_rows(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    defs = location(tmp_path, slow)
    job = defs.resolve_job_def("krea_images")
    with dg.DagsterInstance.ephemeral() as instance:
        limited = {"ops": {"images": {"config": {"limit": 2}}}}
        assert job.execute_in_process(instance=instance, tags=RANGE, run_config=limited).success
        assert slow.stats()["creates"] == 2
        _make_older(tmp_path / "krea" / "journal.db", seconds=120)
        (request,) = tick(defs, instance, "krea_collect").run_requests or ()
        assert request.tags["krea/trial"] == "limit=2"

        server_clock.move(3601.0)
        second = job.execute_in_process(instance=instance, tags=dict(request.tags))
        assert second.success
        assert slow.stats()["creates"] == 2
        (check,) = second.get_asset_check_evaluations()[:1]
        assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
        assert check.description == (
            "A trial: 2 of 6 rows, and each has its image. 4 images of the other rows are not "
            "bought; a run without limit and sample buys them."
        )
        assert check.metadata["trial"].value == "2 of 6 rows"


def _make_older(journal: Path, *, seconds: float) -> None:
    with sqlite3.connect(journal) as connection:
        connection.execute(
            "UPDATE submissions SET submitted_at = submitted_at - ?", [int(seconds * 1e6)]
        )


def test_rows_that_found_no_room_are_bought_by_a_later_run(tmp_path: Path, slow: Emulator) -> None:
    defs = location(tmp_path, slow, max_in_flight=2)
    with dg.DagsterInstance.ephemeral() as instance:
        done = defs.resolve_job_def("krea_images").execute_in_process(instance=instance, tags=RANGE)
        assert slow.stats()["in_flight"] == 2
        run = instance.get_run_by_id(done.run_id)
        assert run is not None
        assert run.tags[GOES_ON_TAG] == "yes"
        assert not tick(defs, instance, "krea_collect").run_requests, "it has just ended"


@dg.op
def _look_at_it() -> None:
    """What somebody does with the partition downstream."""


@dg.job
def downstream() -> None:
    _look_at_it()


def _ended_earlier(instance: dg.DagsterInstance, *, seconds: float) -> None:
    with sqlite3.connect(Path(instance.root_directory) / "history" / "runs.db") as connection:
        connection.execute("UPDATE runs SET end_time = end_time - ?", [seconds])


def test_rows_left_for_room_are_not_forgotten_when_other_jobs_ran_in_between(
    tmp_path: Path, slow: Emulator
) -> None:
    defs = location(tmp_path, slow, max_in_flight=2)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        defs.resolve_job_def("krea_images").execute_in_process(instance=instance, tags=RANGE)
        for _ in range(6):
            downstream.execute_in_process(instance=instance, tags=RANGE)
        _ended_earlier(instance, seconds=400)
        (request,) = tick(defs, instance, "krea_collect").run_requests or ()
        assert {name: request.tags[name] for name in RANGE} == RANGE


def test_rows_left_for_room_are_taken_up_once_and_looked_for_no_more(
    tmp_path: Path, slow: Emulator, server_clock: ServerClock
) -> None:
    defs = location(tmp_path, slow, max_in_flight=4)
    job = defs.resolve_job_def("krea_images")
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        first = job.execute_in_process(instance=instance, tags=RANGE)
        server_clock.move(3601.0)
        _make_older(tmp_path / "krea" / "journal.db", seconds=3700)
        assert job.execute_in_process(instance=instance, tags=RANGE).success
        assert slow.stats()["creates"] == 6
        _ended_earlier(instance, seconds=400)
        _make_older(tmp_path / "krea" / "journal.db", seconds=-3700)
        assert not tick(defs, instance, "krea_collect").run_requests, "nothing is left for room"
        run = instance.get_run_by_id(first.run_id)
        assert run is not None
        assert run.tags[GOES_ON_TAG] != GOES_ON, "the next look does not find it"


def test_a_look_asks_dagster_the_same_few_questions_however_many_runs_there_are(
    tmp_path: Path, slow: Emulator
) -> None:
    defs = location(tmp_path, slow, max_in_flight=1)
    with dg.DagsterInstance.ephemeral() as instance:
        for bucket in ("bucket-000", "bucket-001"):
            run_job(defs, instance, bucket)
        first = _questions(defs, instance)
        for number in range(20):
            instance.add_run(
                dg.DagsterRun(
                    job_name="krea_images",
                    run_id=str(uuid.UUID(int=number)),
                    status=dg.DagsterRunStatus.SUCCESS,
                    tags={GOES_ON_TAG: GOES_ON, "dagster/partition": f"other-{number}"},
                )
            )
        assert _questions(defs, instance) == first


def _questions(defs: dg.Definitions, instance: dg.DagsterInstance) -> int:
    """How many statements a look makes of Dagster's runs."""
    asked = []

    def note(conn: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "FROM runs" in statement:
            asked.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        tick(defs, instance, "krea_collect")
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    return len(asked)


def test_a_person_may_have_one_run_wait_all_the_same(tmp_path: Path, emulator: Emulator) -> None:
    defs = location(tmp_path, emulator)
    with dg.DagsterInstance.ephemeral() as instance:
        done = defs.resolve_job_def("krea_images").execute_in_process(
            instance=instance,
            tags=RANGE,
            run_config={"ops": {"images": {"config": {"wait": True}}}},
        )
        assert done.success
        assert done.get_asset_check_evaluations()[0].passed

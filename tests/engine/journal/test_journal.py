"""The journal: requests and payments, in a database that is either right or an error."""

from __future__ import annotations

import json
import random
import sqlite3
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, Engine, create_engine, select, text
from sqlalchemy.event import listen, remove

from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.bulk_reads import request_count
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.engine.journal.sql import upsert_prices
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import TRANSITIONS, Event, State
from krea_dagster.errors import ConfigError, IllegalTransition, JournalError, TakenOver
from tests.engine.harness import (
    EVENTS_TO_STATE,
    NOW,
    JournalWriter,
    all_rows,
    change,
    make_request,
    make_requests,
    rows,
)


def only(records: Any) -> Any:
    (record,) = records.values()
    return record


# -- planning ---------------------------------------------------------------------------------


def test_planning_the_same_requests_again_changes_nothing(
    journal: Journal, journal_url: str
) -> None:
    writer = JournalWriter(journal)
    assert writer.plan(*make_requests(3)) == 3
    writer.write(make_requests(1)[0], Event.SUBMITTING)
    before = all_rows(journal_url)
    assert writer.plan(*make_requests(3)) == 0
    assert all_rows(journal_url) == before
    assert writer.plan(*make_requests(5)) == 2


def test_a_request_that_is_planned_twice_in_one_call_is_entered_once(journal: Journal) -> None:
    assert JournalWriter(journal).plan(make_request(), make_request()) == 1


def test_a_planned_request_is_read_back_unchanged(journal: Journal) -> None:
    request = make_request(
        "Fuchs, 狐, 🦊\n\"quoted\" 'twice' %s :name", quality="2K", nsfw_check=True
    )
    JournalWriter(journal).plan(request)
    record = only(journal.records([request.request_key]))
    assert record.request == request
    assert record.state is State.PLANNED
    assert (record.submission, record.idempotency_key) == (0, None)


def test_more_requests_than_fit_in_a_statement_are_planned_claimed_and_read(
    journal: Journal,
) -> None:
    many = make_requests(1203)
    writer = JournalWriter(journal)
    assert writer.plan(*many) == 1203
    assert len(journal.records([request.request_key for request in many])) == 1203
    assert journal.count_by_state() == {State.PLANNED: 1203}
    assert len({record.claimed_by for record in journal.all_records()}) == 1


def test_unknown_keys_are_left_out(journal: Journal) -> None:
    assert journal.records(["no such key"]) == {}
    assert journal.history("no such key") == []


# -- events -----------------------------------------------------------------------------------


def test_event_and_state_are_written_in_one_transaction(journal: Journal, journal_url: str) -> None:
    """If the state cannot be written, neither is the event."""
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.COMPLETED)
    before = all_rows(journal_url)
    with pytest.raises(JournalError):
        writer.write(request, Event.STORED, image_sha256=None)  # breaks the table's own rule
    assert all_rows(journal_url) == before


def test_an_event_keeps_its_time_kind_and_data(journal: Journal) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTING)
    later = NOW + timedelta(seconds=3)
    answer = {"id": "task-unified-1", "usage": {"credits_reserved": 0.45}, "text": "é"}
    accepted = Change(
        request.request_key, Event.ACCEPTED, later, {"task_id": "t"}, {"answer": answer}
    )
    writer.append(accepted)
    history = journal.history(request.request_key)
    assert [event for _, event, _ in history] == [
        Event.PLANNED,
        Event.SUBMITTING,
        Event.ACCEPTED,
    ]
    assert history[-1][0] == later
    assert history[-1][2] == {"answer": answer}


def test_a_record_describes_a_request_from_intent_to_file(journal: Journal) -> None:
    writer, request = JournalWriter(journal), make_request()
    record = writer.bring_to(request, State.STORED)
    assert record.submission == 1
    assert record.idempotency_key == f"krea-{request.request_key}-1"
    assert (record.sent_at, record.submitted_at) == (NOW, NOW)
    assert (record.completed_at, record.stored_at) == (NOW, NOW)
    assert (record.reserved_units, record.charged_units) == (4500, 4500)
    assert record.run_id == "run-by-hand"
    assert record.image is not None
    assert record.image.path == "images/a.png"


def test_one_bad_change_does_not_prevent_the_others(journal: Journal) -> None:
    writer, (first, second) = JournalWriter(journal), make_requests(2)
    writer.plan(first, second)
    good, bad, good_too = writer.append(
        change(first, Event.SUBMITTING),
        change(second, Event.COMPLETED),
        change(first, Event.ACCEPTED),
    )
    assert isinstance(bad, IllegalTransition)
    assert isinstance(good, Record)
    assert isinstance(good_too, Record)
    assert good_too.state is State.SUBMITTED


def test_two_requests_cannot_have_the_same_task(journal: Journal) -> None:
    writer, (first, second) = JournalWriter(journal), make_requests(2)
    writer.bring_to(first, State.SUBMITTING)
    writer.bring_to(second, State.SUBMITTING)
    writer.write(first, Event.ACCEPTED, task_id="task-unified-1")
    with pytest.raises(JournalError):
        writer.write(second, Event.ACCEPTED, task_id="task-unified-1")
    assert only(journal.records([second.request_key])).state is State.SUBMITTING


@pytest.mark.parametrize("units", [-1, -4500])
def test_amounts_cannot_be_negative(journal: Journal, units: int) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTING)
    with pytest.raises(JournalError):
        writer.write(request, Event.ACCEPTED, reserved_units=units)


def test_texts_that_a_database_refuses_are_cleaned(
    journal: Journal,
) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTING)
    hostile = "a\x00b\ud800c\udfffd \U0001f98a"
    record = writer.write(
        request, Event.OUTCOME_UNKNOWN, error_code="x\x00", error_message=hostile + "é" * 100_000
    )
    assert record.error_code == "x\ufffd"
    assert str(record.error_message).startswith("a\ufffdb?c?d \U0001f98a")


def test_long_texts_of_the_server_do_not_lose_the_task_id(journal: Journal) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTING)
    record = writer.write(
        request, Event.ACCEPTED, task_id="t" * 128, billing_rule="r" * 200, user_group="g" * 300
    )
    assert record.task_id == "t" * 128


# -- records that the writer knows already ------------------------------------------------------


def test_known_and_read_records_lead_to_the_same_rows(journal: Journal, journal_url: str) -> None:
    """For every event, the computed record is the one that another reader finds."""
    writer = JournalWriter(journal)
    for request, state in zip(make_requests(len(State)), State, strict=True):
        known = writer.bring_to(request, State.PLANNED)
        for event in EVENTS_TO_STATE[state]:
            (known,) = journal.append(  # type: ignore[assignment]  # nothing is refused here
                [change(request, event)],
                owner=writer.owner.owner,
                run_id=writer.run_id,
                known={request.request_key: known},
            )
            assert only(journal.records([request.request_key])) == known
        for event in (Event.PLANNED, Event.SUBMITTING, Event.FILE_MISSING, Event.TURNED_AWAY):
            if (known.state, event) in TRANSITIONS:
                known = writer.write(request, event)
                assert only(journal.records([request.request_key])) == known


def test_a_stale_record_is_read_again_and_written_once(
    journal: Journal,
) -> None:
    writer, (first, second) = JournalWriter(journal), make_requests(2)
    old = writer.bring_to(first, State.PLANNED)
    writer.bring_to(second, State.PLANNED)
    writer.write(first, Event.SUBMITTING)
    answers = journal.append(
        [change(second, Event.SUBMITTING), change(first, Event.SUBMITTING)],
        owner=writer.owner.owner,
        run_id=writer.run_id,
        known={first.request_key: old},
    )
    assert isinstance(answers[0], Record)
    assert isinstance(answers[1], IllegalTransition)
    assert [event for _, event, _ in journal.history(second.request_key)] == [
        Event.PLANNED,
        Event.SUBMITTING,
    ]
    assert len(journal.charges()) == 2


def test_a_record_from_before_a_takeover_buys_nothing(
    journal: Journal,
) -> None:
    mine, theirs = JournalWriter(journal, "mine"), JournalWriter(journal, "theirs")
    old = mine.bring_to(make_request(), State.PLANNED)
    journal.claims.release(mine.owner.owner)
    journal.claims.claim([old.request_key], theirs.owner.owner)
    (answer,) = journal.append(
        [change(make_request(), Event.SUBMITTING)],
        owner=mine.owner.owner,
        run_id="mine",
        known={old.request_key: old},
    )
    assert isinstance(answer, TakenOver)
    assert journal.charges() == []


# -- money ------------------------------------------------------------------------------------


def test_a_replay_keeps_the_idempotency_key_and_the_time_of_the_first_try(
    journal: Journal,
) -> None:
    writer, request = JournalWriter(journal), make_request()
    first = writer.bring_to(request, State.UNKNOWN)
    again = writer.write(request, Event.REPLAYING)
    writer.write(request, Event.OUTCOME_UNKNOWN)
    taken = writer.write(request, Event.ACCEPTED)
    assert again.idempotency_key == taken.idempotency_key == first.idempotency_key
    assert again.sent_at == taken.sent_at == first.sent_at
    assert taken.submission == 1


@pytest.mark.parametrize("free", [Event.TURNED_AWAY, Event.DEFERRED])
def test_a_purchase_that_was_not_created_is_sent_again_with_its_key_and_a_new_time(
    journal: Journal, journal_url: str, free: Event
) -> None:
    writer, request = JournalWriter(journal), make_request()
    first = writer.bring_to(request, State.SUBMITTING)
    writer.write(request, free)
    later = NOW + timedelta(days=3)
    (again,) = writer.append(change(request, Event.SUBMITTING, later))
    assert isinstance(again, Record)
    assert again.idempotency_key == first.idempotency_key
    assert again.sent_at == later
    assert [row["posts"] for row in rows(journal_url, schema.submissions)] == [2]


@pytest.mark.parametrize("state", [State.FAILED, State.REFUSED])
def test_a_purchase_after_a_certain_failure_has_a_new_key_and_the_old_one_is_kept(
    journal: Journal, journal_url: str, state: State
) -> None:
    writer, request = JournalWriter(journal), make_request()
    first = writer.bring_to(request, state)
    planned = writer.write(request, Event.PLANNED)
    assert (planned.idempotency_key, planned.task_id, planned.error_code) == (None, None, None)
    second = writer.write(request, Event.SUBMITTING)
    assert second.submission == 2
    assert second.idempotency_key == f"krea-{request.request_key}-2"
    kept = {row["idempotency_key"] for row in rows(journal_url, schema.submissions)}
    assert kept == {first.idempotency_key, second.idempotency_key}


def test_a_failed_task_and_a_refused_request_cost_nothing(journal: Journal) -> None:
    writer, (failed, refused) = JournalWriter(journal), make_requests(2)
    writer.bring_to(failed, State.SUBMITTED)
    assert writer.write(failed, Event.FAILED).charged_units == 0
    writer.bring_to(refused, State.SUBMITTING)
    assert writer.write(refused, Event.REFUSED, charged_units=0).charged_units == 0


def test_the_charge_of_an_open_purchase_is_unknown(journal: Journal) -> None:
    writer, (unknown, submitted) = JournalWriter(journal), make_requests(2)
    assert writer.bring_to(unknown, State.UNKNOWN).charged_units is None
    record = writer.bring_to(submitted, State.SUBMITTED)
    assert (record.reserved_units, record.charged_units) == (4500, None)


def test_a_fresh_link_keeps_charge_and_completion_time(
    journal: Journal,
) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.COMPLETED)
    fresh = change(request, Event.COMPLETED, NOW + timedelta(hours=1), result_url="https://b")
    (record,) = writer.append(replace(fresh, values={"result_url": "https://b"}))
    assert isinstance(record, Record)
    assert record.result_url == "https://b"
    assert (record.charged_units, record.completed_at) == (4500, NOW)


def test_a_missing_file_keeps_its_record(
    journal: Journal,
) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.STORED)
    before = journal.records([request.request_key])[request.request_key]
    record = writer.write(request, Event.FILE_MISSING)
    assert (record.image, record.stored_at) == (before.image, before.stored_at)
    assert record.image is not None
    assert (record.charged_units, record.submission) == (4500, 1)
    assert record.result_url is not None


# -- claims -----------------------------------------------------------------------------------


def test_a_request_belongs_to_its_first_claimant_until_released(
    journal: Journal,
) -> None:
    first, second = JournalWriter(journal, "first"), JournalWriter(journal, "second")
    key = make_request().request_key
    first.plan(make_request())
    assert journal.claims.claim([key], second.owner.owner) == set()
    assert journal.claims.claim([key], first.owner.owner) == {key}
    journal.claims.release(first.owner.owner)
    assert journal.claims.claim([key], second.owner.owner) == {key}


def test_only_the_holder_writes_and_others_get_taken_over(
    journal: Journal, journal_url: str
) -> None:
    first, second = JournalWriter(journal, "first"), JournalWriter(journal, "second")
    first.bring_to(make_request(), State.SUBMITTING)
    before = all_rows(journal_url)
    with pytest.raises(TakenOver):
        second.write(make_request(), Event.ACCEPTED)
    assert all_rows(journal_url) == before


def test_unclaiming_some_requests_keeps_the_others(journal: Journal) -> None:
    first, second = JournalWriter(journal, "first"), JournalWriter(journal, "second")
    requests = make_requests(3)
    keys = [request.request_key for request in requests]
    first.plan(*requests)
    journal.claims.unclaim(keys[:1], first.owner.owner)
    journal.claims.unclaim(keys, second.owner.owner)  # nothing of its own
    assert journal.claims.claim(keys, second.owner.owner) == set(keys[:1])


def test_claiming_unplanned_requests_claims_nothing(journal: Journal) -> None:
    assert journal.claims.claim(["no such key"], JournalWriter(journal).owner.owner) == set()


def test_concurrent_claims_cover_every_request_once(journal_url: str, journal: Journal) -> None:
    """In any order; the journal may be new and opened by all of them at once."""
    requests = make_requests(1100)
    journal.plan([(r, "p") for r in requests], run_id="r", at=NOW)
    keys = [request.request_key for request in requests]
    claimed: list[set[str]] = []
    start, end = threading.Barrier(4), threading.Barrier(4)

    def claim(number: int) -> None:
        with closing(Journal(journal_url)) as mine:
            me = JournalWriter(mine, f"run-{number}").owner.owner
            start.wait()
            claimed.append(mine.claims.claim(keys[:: 1 if number % 2 else -1], me))
            end.wait()  # its claims end with its journal

    threads = [threading.Thread(target=claim, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(len(part) for part in claimed) == len(set().union(*claimed)) == 1100


# -- trust ------------------------------------------------------------------------------------


def test_a_journal_is_bound_to_one_origin(journal: Journal) -> None:
    journal.bind("api.evolink.ai")
    journal.bind("api.evolink.ai")
    with pytest.raises(ConfigError, match=r"holds images from api\.evolink\.ai.*an emulator"):
        journal.bind("an emulator")


def test_a_new_journal_can_be_opened_concurrently(journal_url: str) -> None:
    start = threading.Barrier(6)
    opened: list[Journal] = []

    def open_it() -> None:
        start.wait()
        opened.append(Journal(journal_url))

    threads = [threading.Thread(target=open_it) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 6
    for one in opened:
        one.close()


def test_a_journal_of_another_version_is_not_changed(journal_url: str, journal: Journal) -> None:
    engine = create_engine(journal_url)
    with engine.begin() as connection:
        connection.execute(text("update journal_version set version_num = '9999'"))
    engine.dispose()
    before = all_rows(journal_url)
    with pytest.raises(JournalError, match="schema revision 9999"):
        Journal(journal_url)
    assert all_rows(journal_url) == before


def _assert_explained(error: pytest.ExceptionInfo[JournalError], path: Path) -> bool:
    """Assert that the error names the file and says what it means for the money."""
    return str(path) in str(error.value) and "Nothing more is bought" in str(error.value)


def test_a_file_that_is_not_a_database_is_an_error_and_not_changed(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    path.write_bytes(b"this is not a database, " * 100)
    with pytest.raises(JournalError) as caught:
        Journal(f"sqlite:///{path}")
    assert _assert_explained(caught, path)
    assert path.read_bytes() == b"this is not a database, " * 100


def test_a_damaged_journal_is_an_error_and_never_an_empty_one(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(f"sqlite:///{path}")) as journal:
        JournalWriter(journal).plan(*make_requests(200))
        keys = [request.request_key for request in make_requests(200)]
        data = bytearray(path.read_bytes())
        data[4096:] = b"\xff" * (len(data) - 4096)
        path.write_bytes(data)
        for question in (
            lambda: journal.records(keys),
            lambda: list(journal.all_records()),
            journal.count_by_state,
            lambda: journal.history(keys[0]),
        ):
            with pytest.raises(JournalError) as caught:
                question()
            assert _assert_explained(caught, path)


def test_a_journal_that_cannot_be_written_is_an_error_and_can_still_be_read(
    tmp_path: Path,
) -> None:
    path = tmp_path / "journal.db"
    with closing(Journal(f"sqlite:///{path}")) as journal:
        JournalWriter(journal).plan(make_request())
    read_only = Journal(f"sqlite:///file:{path}?mode=ro&uri=true")
    assert read_only.count_by_state() == {State.PLANNED: 1}
    with pytest.raises(JournalError, match="readonly"):
        read_only.plan([(make_request(), "p")], run_id="r", at=NOW)


def test_a_journal_at_an_impossible_path_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(JournalError, match="could not open the journal"):
        Journal(f"sqlite:///{tmp_path / 'file' / 'journal.db'}")


def test_a_journal_that_another_process_keeps_locked_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "journal.db"
    journal = Journal(f"sqlite:///{path}", lock_timeout_s=0.05)
    JournalWriter(journal).plan(make_request())
    before = all_rows(f"sqlite:///{path}")
    with closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        with pytest.raises(JournalError, match="locked") as caught:
            journal.plan(several_pairs(), run_id="r", at=NOW)
        assert _assert_explained(caught, path)
        other.rollback()
    assert all_rows(f"sqlite:///{path}") == before
    assert journal.plan(several_pairs(), run_id="r", at=NOW) == 2


def several_pairs() -> list[tuple[Any, str]]:
    return [(request, "p") for request in make_requests(2)]


@pytest.mark.parametrize(
    "url",
    [
        "not a url",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite://user:secret@/journal.db",
        "nosuchdatabase://here/journal",
        "postgresql+nosuchdriver://here/journal",
    ],
)
def test_an_unusable_url_is_a_config_error(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Journal(url)
    assert "secret" not in str(caught.value)


def test_error_messages_do_not_contain_prompts(journal: Journal) -> None:
    secret = make_request("a secret prompt")
    writer = JournalWriter(journal)
    writer.bring_to(secret, State.COMPLETED)
    with pytest.raises(JournalError) as caught:
        writer.write(secret, Event.STORED, image_sha256=None)
    assert "secret" not in str(caught.value)


def test_writes_are_on_disk_when_the_call_returns(tmp_path: Path) -> None:
    """A process that is killed loses nothing."""
    path = tmp_path / "journal.db"
    program = f"""
import os
from datetime import datetime, timezone
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
from tests.engine.harness import make_requests
journal = Journal("sqlite:///{path}")
journal.plan([(r, "p") for r in make_requests(7)], run_id="r", at=datetime.now(timezone.utc))
os._exit(9)
"""
    root = Path(__file__).parents[2]
    ended = subprocess.run([sys.executable, "-c", program], cwd=root, check=False)
    assert ended.returncode == 9
    assert Journal(f"sqlite:///{path}").count_by_state() == {State.PLANNED: 7}


def test_the_answer_of_the_server_is_kept_as_json(journal: Journal, journal_url: str) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTING)
    answer = {"a": [1, 2.5, None, True], "b": {"c": "\U0001f98a", "d": "\ufffd"}}
    writer.append(replace(change(request, Event.ACCEPTED), data=answer))
    kept = rows(journal_url, schema.events)[-1]["data"]
    assert json.loads(json.dumps(kept)) == answer


# -- at the same time -------------------------------------------------------------------------


def test_one_of_two_concurrent_first_runs_binds_the_journal(journal_url: str) -> None:
    """Else it would mix an emulator's images with EvoLink's."""
    for _ in range(10):
        with closing(Journal(journal_url)) as one, closing(Journal(journal_url)) as other:
            make_unbound(journal_url)
            start = threading.Barrier(2)

            def bind(journal: Journal, origin: str, start: threading.Barrier = start) -> str:
                start.wait()
                try:
                    journal.bind(origin)
                except ConfigError:
                    return ""
                return origin

            with ThreadPoolExecutor(2) as pool:
                bound = list(pool.map(bind, (one, other), ("an emulator", "api.evolink.ai")))
            assert min(bound) == ""
            assert len(set(bound)) == 2


def make_unbound(journal_url: str) -> None:
    engine = create_engine(journal_url)
    with engine.begin() as connection:
        connection.execute(text("update about set origin = null"))
    engine.dispose()


def test_overlapping_claims_do_not_deadlock(journal_url: str, journal: Journal) -> None:
    """In chunks of all sizes, because a database finds the rows of each in another order."""
    wanted = make_requests(1200)
    journal.plan([(one, "p") for one in wanted], run_id="r", at=NOW)
    keys = [one.request_key for one in wanted]

    def claim_and_let_go(number: int) -> None:
        chance = random.Random(number)
        with closing(Journal(journal_url)) as mine:
            me = JournalWriter(mine, f"run-{number}").owner.owner
            for _ in range(15):
                some = chance.sample(keys, chance.randint(1, len(keys)))
                mine.claims.unclaim(mine.claims.claim(some, me), me)

    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(claim_and_let_go, number) for number in range(3)]:
            done.result(timeout=120)
    assert not any(record.claimed_by for record in journal.all_records())


def test_concurrent_prices_keep_the_highest(journal_url: str, journal: Journal) -> None:
    first, second = make_requests(2)
    dear, cheap = JournalWriter(journal, "dear"), JournalWriter(journal, "cheap")
    for writer, request in ((dear, first), (cheap, second)):
        writer.bring_to(request, State.SUBMITTING)
    with closing(Database(journal_url)) as database:

        def write(connection: Connection) -> None:
            # Another run's answer, of a transaction that had read no price yet.
            for units in (9000, 4500):
                row = {"quality": "1K", "highest_units": units, "latest_units": units}
                none = {"doubted_units": None, "doubted_in_row": 0}
                upsert_prices(connection, [{**row, **none, "seen_at": NOW}])

        database.write("write prices to", write)
    assert journal.prices.highest() == {"1K": 9000}


# -- at scale ---------------------------------------------------------------------------------


def test_stops_of_launches_that_ended_long_ago_are_removed(journal: Journal) -> None:
    journal.stop("a launch", "key_rejected", "401", NOW)
    two_days_earlier = text("update stops set at = at - 2 * 86400000000")
    journal.database.write("age a stop in", lambda connection: connection.execute(two_days_earlier))
    journal.stop("another", "key_rejected", "401", NOW)
    journal.stop("one more", "key_rejected", "401", NOW)
    kept = journal.database.fetch(select(schema.stops.c.launch))
    assert {row.launch for row in kept} == {"another", "one more"}


def test_what_a_run_reads_at_its_start_does_not_grow_with_the_journal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    asked: list[tuple[str, Any]] = []

    def note(_: Any, __: Any, statement: str, parameters: Any, *___: Any) -> None:
        asked.append((statement, parameters))

    with closing(Journal(url)) as journal:
        writer = JournalWriter(journal)
        wanted = make_requests(3)
        writer.plan(*wanted)
        listen(Engine, "before_cursor_execute", note)
        try:
            assert journal.has_requests()
            journal.claims.register(new_owner("run-1"))
            journal.claims.claim([request.request_key for request in wanted], "nobody")
            journal.claims.dead()
            with journal.database.read() as connection:
                assert request_count(connection) == 3
        finally:
            remove(Engine, "before_cursor_execute", note)
        journal.claims.close()
    grows = {"requests", "submissions", "events", "files"}
    found = []
    with closing(sqlite3.connect(tmp_path / "journal.db")) as database:
        for statement, parameters in asked:
            if statement.startswith(("SELECT", "UPDATE", "DELETE")) and "LIMIT" not in statement:
                plan = database.execute(f"explain query plan {statement}", parameters).fetchall()
                scanned = [row[3] for row in plan if row[3].startswith("SCAN ")]
                found += [line for line in scanned if line.split()[1] in grows]
    assert asked
    assert found == []

"""Comparing the server's records, the journal and the files: each way they can disagree."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timezone

import pytest

from krea_dagster.drill.reconcile import (
    Reconciliation,
    RequestOutcome,
    ServerTask,
    body_of,
    reconcile,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest

KEY = "a" * 64
SENT = datetime(2026, 5, 1, tzinfo=timezone.utc)
REQUEST = ImageRequest(KEY, "a heron", "1:1", "1K", 7, nsfw_check=False, attempt=0)
TASK = ServerTask("task-1", body_of(REQUEST), "completed", 4500, 4500, "hash", frozenset())
RECORD = Record(
    REQUEST,
    State.STORED,
    "p",
    task_id="task-1",
    sent_at=SENT,
    reserved_units=4500,
    charged_units=4500,
)


def found(
    *tasks: ServerTask,
    record: Record | None = RECORD,
    file: str | None = "hash",
    adopts: bool = False,
) -> Reconciliation:
    records = {} if record is None else {KEY: record}
    files = {} if file is None else {KEY: file}
    return reconcile([REQUEST], len(tasks), tasks, records, files, adopts=adopts)


def in_state(state: State, task_id: str | None = "task-1") -> Record:
    settled = state in (State.COMPLETED, State.STORED)
    charged = 4500 if settled else None
    return replace(RECORD, state=state, task_id=task_id, charged_units=charged)


def test_one_charge_one_file_with_the_servers_hash_is_delivered() -> None:
    reconciliation = found(TASK)
    assert reconciliation.of(RequestOutcome.DELIVERED) == [KEY]
    assert (reconciliation.billed, reconciliation.billed_units) == (1, 4500)
    assert reconciliation.violations("replay") == []


@pytest.mark.parametrize("status", ["completed", "processing"])
def test_a_second_task_that_is_charged_or_may_be_is_bought_twice(status: str) -> None:
    charged = 4500 if status == "completed" else 0
    second = replace(TASK, task_id="task-2", status=status, charged_units=charged)
    assert "1 bought twice" in found(TASK, second).violations("hold")


def test_a_second_task_after_one_that_failed_is_not_bought_twice() -> None:
    failed = replace(TASK, task_id="task-0", status="failed", charged_units=0)
    assert found(failed, TASK).violations("replay") == []


def test_credits_that_the_journal_has_not_down_as_charged_are_unexplained() -> None:
    cheaper = found(TASK, record=replace(RECORD, charged_units=4000))
    assert cheaper.violations("replay") == ["0.05 credits unexplained"]


@pytest.mark.parametrize("file", [None, "another hash"])
def test_a_stored_request_without_the_right_file_is_lost_whatever_the_journal_says(
    file: str | None,
) -> None:
    reconciliation = found(TASK, file=file)
    assert reconciliation.of(RequestOutcome.LOST) == [KEY]
    assert reconciliation.violations("hold") == ["1 lost"]


@pytest.mark.parametrize("state", [State.PLANNED, State.FAILED, State.REFUSED, State.DEFERRED])
def test_a_charge_for_what_the_journal_holds_for_unbought_is_lost_and_unrecorded(
    state: State,
) -> None:
    reconciliation = found(TASK, record=in_state(state, None), file=None)
    assert reconciliation.of(RequestOutcome.LOST) == [KEY]
    assert reconciliation.unrecorded == ["task-1"]


def test_a_charge_that_the_journal_has_never_heard_of_is_lost_and_unrecorded() -> None:
    reconciliation = found(TASK, record=None, file=None)
    assert (reconciliation.of(RequestOutcome.LOST), reconciliation.unrecorded) == (
        [KEY],
        ["task-1"],
    )


def test_a_charge_for_something_that_was_not_asked_for_is_unrecorded() -> None:
    stranger = replace(TASK, task_id="task-9", body=("other", "1:1", "1K", 1))
    assert found(TASK, stranger).unrecorded == ["task-9"]


@pytest.mark.parametrize("state", [State.UNKNOWN, State.SUBMITTING])
@pytest.mark.parametrize("charged", [True, False])
def test_an_open_outcome_is_unknown_with_its_price_and_not_lost(
    state: State, *, charged: bool
) -> None:
    tasks = [TASK] if charged else []
    reconciliation = found(*tasks, record=in_state(state, None), file=None)
    (unknown,) = reconciliation.unknown
    assert (unknown.credits_units, unknown.since, unknown.charged) == (4500, SENT, charged)
    assert reconciliation.violations("hold") == []
    assert reconciliation.violations("replay") == ["1 unknown"]


def test_an_unknown_outcome_before_any_answer_counts_the_published_price() -> None:
    record = replace(in_state(State.UNKNOWN, None), reserved_units=None)
    assert found(record=record, file=None).unknown_units == 4500


def test_a_paid_image_that_the_last_worker_left_behind_is_a_violation() -> None:
    reconciliation = found(TASK, record=in_state(State.COMPLETED), file=None)
    assert reconciliation.violations("hold") == ["1 charged, could be had, and not delivered"]


def test_a_task_that_the_server_denies_is_forgotten_only_where_the_journal_says_expired() -> None:
    vanished = replace(TASK, faults=frozenset({"vanished"}))
    said = found(vanished, record=in_state(State.EXPIRED), file=None)
    assert (said.of(RequestOutcome.FORGOTTEN), said.forgotten_units) == ([KEY], 4500)
    assert said.violations("replay") == []
    unsaid = found(vanished, record=in_state(State.FAILED), file=None)
    assert unsaid.of(RequestOutcome.LOST) == [KEY]
    not_denied = found(TASK, record=in_state(State.EXPIRED), file=None)
    assert not_denied.of(RequestOutcome.LOST) == [KEY]


def test_what_never_ends_failed_or_was_refused_is_told_apart_from_what_was_never_bought() -> None:
    stuck = replace(TASK, status="processing", charged_units=0)
    failed = replace(TASK, status="failed", charged_units=0)
    fates = [
        found(stuck, record=in_state(State.SUBMITTED), file=None),
        found(failed, record=in_state(State.FAILED), file=None),
        found(record=in_state(State.REFUSED, None), file=None),
        found(record=in_state(State.PLANNED, None), file=None),
    ]
    assert [list(one.outcomes) for one in fates] == [
        [RequestOutcome.ENDLESS],
        [RequestOutcome.FAILED],
        [RequestOutcome.REFUSED],
        [RequestOutcome.NEVER_BOUGHT],
    ]
    assert fates[3].violations("hold") == ["1 never bought"]


@pytest.mark.parametrize("state", [State.EXPIRED, State.COMPLETED, State.PLANNED])
def test_a_file_that_the_journal_does_not_hold_as_stored_is_a_violation(state: State) -> None:
    reconciliation = found(TASK, record=in_state(state))
    assert (reconciliation.of(RequestOutcome.DELIVERED), reconciliation.disowned) == ([KEY], [KEY])
    assert "1 stored, and the journal says that it is not" in reconciliation.violations("hold")


@pytest.mark.parametrize("charged", [None, 0, 4500])
def test_an_adopted_file_explains_its_purchase_where_the_journal_may_have_forgotten_it(
    charged: int | None,
) -> None:
    adopted = replace(RECORD, task_id=None, charged_units=charged, reserved_units=None)
    assert found(TASK, record=adopted, adopts=True).violations("replay") == []
    assert "1 charged and not in the journal" in found(TASK, record=adopted).violations("replay")
    again = replace(TASK, task_id="task-2")
    assert "1 bought twice" in found(TASK, again, record=adopted, adopts=True).violations("replay")


def test_an_unknown_outcome_is_listed_and_right_where_no_clock_says_how_old_it_is() -> None:
    reconciliation = found(TASK, record=in_state(State.UNKNOWN, None), file=None)
    assert reconciliation.violations("replay", unknown_is_right=True) == []
    assert [one.request_key for one in reconciliation.unknown] == [KEY]

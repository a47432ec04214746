"""Writing a batch of changes in one transaction, with few statements.

The caller may know the records already, from its last changes. The database has the last word:
every update names the number of the request's last event and its owner, and the number of rows that
it changed must be right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sqlalchemy import Connection

from krea_dagster.engine.journal.changes import (
    AppliedChange,
    Change,
    apply_change,
    check_change,
    event_row,
)
from krea_dagster.engine.journal.commitments import CommitmentLedger
from krea_dagster.engine.journal.sql import (
    ADDED_POSTS,
    NEW_EVENT,
    NEW_SUBMISSION,
    POSTED_UPDATE,
    REQUEST_UPDATE,
    SUBMISSION_UPDATE,
    events_of_run,
    execute_for_all,
    locked_records,
    purchases_of_tasks,
    upsert_files,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event
from krea_dagster.errors import BuyingClosed, JournalError, TaskTaken


class StaleRecord(Exception):
    """A known record is out of date. The transaction must not be committed."""


def write_changes(
    connection: Connection,
    ledger: CommitmentLedger,
    changes: Sequence[Change],
    *,
    owner: str,
    run_id: str,
    root_id: str,
    known: Mapping[str, Record],
    repeated: bool,
) -> list[Record | JournalError | BuyingClosed]:
    """Write the changes that may be written; return a result for each, in their order.

    ``root_id`` is the storage root whose files the changes describe. ``known`` are records by
    request key; others are read and locked. ``repeated``: a change that is written already is
    answered with the present record. Raises StaleRecord.
    """
    present = dict(known)
    missing = {change.request_key for change in changes} - present.keys()
    if missing:
        present.update(locked_records(connection, sorted(missing)))
    ledger.lock(changes, present)
    purchases = _purchases_of_tasks(connection, changes)
    answers: list[Record | JournalError | BuyingClosed] = []
    steps: list[AppliedChange] = []
    written = events_of_run(connection, changes, run_id) if repeated else set()
    for change in changes:
        if (change.request_key, change.event.value, change.at) in written:
            answers.append(present[change.request_key])
            continue
        try:
            before = present.get(change.request_key)
            step = _apply(ledger, change, before, owner=owner, run_id=run_id, purchases=purchases)
        except (JournalError, BuyingClosed) as error:
            answers.append(error)
            continue
        present[change.request_key] = step.after
        answers.append(step.after)
        steps.append(step)
    for round_ in _rounds(steps):
        _write_steps(connection, round_, owner=owner, run_id=run_id, root_id=root_id)
    ledger.write()
    return answers


def _apply(
    ledger: CommitmentLedger,
    change: Change,
    record: Record | None,
    *,
    owner: str,
    run_id: str,
    purchases: dict[str, str],
) -> AppliedChange:
    """Apply a change. ``purchases`` are those of named tasks. Raises JournalError, BuyingClosed."""
    before = check_change(change, record, owner)
    task_id, key = _task_id(change), before.idempotency_key
    if task_id and purchases.get(task_id, key) != key:
        raise TaskTaken(
            f"task {task_id} belongs to the purchase {purchases[task_id]}, not to request "
            f"{change.request_key}"
        )
    if change.event is Event.SUBMITTING:
        committed = expected = ledger.admit(change, before)
    else:
        committed, expected = ledger.settle(change, before), before.expected_units
    step = apply_change(change, before, run_id, committed_units=committed, expected_units=expected)
    ledger.move(step)
    if task_id:
        purchases[task_id] = str(key)
    return step


def _rounds(steps: Sequence[AppliedChange]) -> Iterable[Sequence[AppliedChange]]:
    """Return the steps in rounds that contain each request once, so that their order is free."""
    rounds: list[list[AppliedChange]] = []
    taken: Counter[str] = Counter()
    for step in steps:
        number = taken[step.change.request_key]
        taken[step.change.request_key] += 1
        if number == len(rounds):
            rounds.append([])
        rounds[number].append(step)
    return rounds


def _write_steps(
    connection: Connection,
    steps: Sequence[AppliedChange],
    *,
    owner: str,
    run_id: str,
    root_id: str,
) -> None:
    """Write the rows of four tables; statements of one shape go to the driver together."""
    request_updates: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    submission_updates: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for step in steps:
        request_updates.setdefault(tuple(step.request), []).append(
            {
                **step.request,
                "old_key": step.change.request_key,
                "old_seq": step.before.seq,
                "old_owner": owner,
            }
        )
        if step.submission:
            values = dict(step.submission)
            if "posts" in values:
                values[ADDED_POSTS] = values.pop("posts")
            submission_updates.setdefault(tuple(values), []).append(
                {**values, "old_key": step.after.idempotency_key or step.before.idempotency_key}
            )
    # First, because only these show what is out of date.
    for rows in request_updates.values():
        if not execute_for_all(connection, REQUEST_UPDATE, rows):
            raise StaleRecord
    opened = [step.opens for step in steps if step.opens is not None]
    if opened:
        connection.execute(NEW_SUBMISSION, opened)
    for names, rows in submission_updates.items():
        statement = POSTED_UPDATE if ADDED_POSTS in names else SUBMISSION_UPDATE
        if not execute_for_all(connection, statement, rows):
            raise StaleRecord
    _write_files(connection, steps, root_id)
    connection.execute(NEW_EVENT, [event_row(step, run_id) for step in steps])


def _write_files(connection: Connection, steps: Sequence[AppliedChange], root_id: str) -> None:
    """Note which files are in the run's storage root, and which are missing there."""
    if not root_id:
        return
    rows = [
        {
            "request_key": step.change.request_key,
            "root_id": root_id,
            "at": step.change.at,
            "missing_since": None if step.file else step.change.at,
        }
        for step in steps
        if step.file is not None
    ]
    if rows:
        upsert_files(connection, rows)


def _task_id(change: Change) -> str | None:
    """Return the task that a change gives a request."""
    return change.values.get("task_id") if change.event is Event.ACCEPTED else None


def _purchases_of_tasks(connection: Connection, changes: Sequence[Change]) -> dict[str, str]:
    """Return the purchases that have the tasks of these changes, by task id."""
    named = [task_id for change in changes if (task_id := _task_id(change))]
    return purchases_of_tasks(connection, named) if named else {}

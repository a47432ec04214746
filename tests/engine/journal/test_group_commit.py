"""Group commit: many changes in few transactions, with an answer for each caller."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import anyio
import pytest

from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.group_commit import GroupCommit
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import BuyingClosed, IllegalTransition, JournalError
from krea_dagster.models import ImageRequest
from tests.engine.harness import JournalWriter, change, make_request, make_requests

pytestmark = pytest.mark.anyio


class CountingJournal(Journal):
    """A journal that counts its commits of events."""

    commits = 0

    def append(
        self, changes: Sequence[Change], *args: Any, **who: Any
    ) -> list[Record | JournalError | BuyingClosed]:
        self.commits += 1
        return super().append(changes, *args, **who)


def group_commit(journal_writer: JournalWriter) -> GroupCommit:
    return GroupCommit(
        journal_writer.journal, owner=journal_writer.owner.owner, run_id=journal_writer.run_id
    )


async def results(writer: GroupCommit, *changes: Change) -> list[Record | BaseException]:
    return await asyncio.gather(*map(writer.append, changes), return_exceptions=True)


def states(journal: Journal, requests: Sequence[ImageRequest]) -> list[State]:
    records = journal.records([request.request_key for request in requests])
    return [records[request.request_key].state for request in requests]


async def test_concurrent_changes_share_commits(journal_url: str) -> None:
    journal = CountingJournal(journal_url)
    journal_writer, requests = JournalWriter(journal), make_requests(300)
    journal_writer.plan(*requests)
    async with group_commit(journal_writer) as writer:
        answers = await results(writer, *(change(r, Event.SUBMITTING) for r in requests))
    assert [answer.request for answer in answers if isinstance(answer, Record)] == requests
    assert set(states(journal, requests)) == {State.SUBMITTING}
    assert journal.commits <= 10
    journal.close()


async def test_changes_that_are_given_together_share_one_commit(journal_url: str) -> None:
    journal, request = CountingJournal(journal_url), make_request()
    journal_writer = JournalWriter(journal)
    journal_writer.bring_to(request, State.SUBMITTED)
    journal.commits = 0
    async with group_commit(journal_writer) as writer:
        record = await writer.append(
            change(request, Event.COMPLETED), change(request, Event.STORED)
        )
    assert (record.state, journal.commits) == (State.STORED, 1)
    assert [event for _, event, _ in journal.history(request.request_key)][-2:] == [
        Event.COMPLETED,
        Event.STORED,
    ]
    journal.close()


async def test_answered_changes_are_on_disk(journal: Journal, journal_url: str) -> None:
    journal_writer, request = JournalWriter(journal), make_request()
    journal_writer.plan(request)
    async with group_commit(journal_writer) as writer:
        record = await writer.append(change(request, Event.SUBMITTING))
        with closing(Journal(journal_url)) as other:
            assert other.records([request.request_key]) == {request.request_key: record}


async def test_an_illegal_change_fails_alone(journal: Journal) -> None:
    journal_writer, requests = JournalWriter(journal), make_requests(5)
    journal_writer.plan(*requests)
    wrong = requests[2]
    changes = [change(r, Event.STORED if r is wrong else Event.SUBMITTING) for r in requests]
    async with group_commit(journal_writer) as writer:
        answers = await results(writer, *changes)
    assert [type(answer) for answer in answers].count(Record) == 4
    assert isinstance(answers[2], IllegalTransition)
    assert states(journal, requests).count(State.SUBMITTING) == 4


async def test_a_change_that_the_database_refuses_fails_alone(journal: Journal) -> None:
    """The others' task ids are paid for and must be on disk."""
    journal_writer, requests = JournalWriter(journal), make_requests(5)
    for request in requests:
        journal_writer.bring_to(request, State.SUBMITTING)
    same = {"task_id": "task-unified-same"}
    changes = [
        change(request, Event.ACCEPTED, **(same if number < 2 else {}))
        for number, request in enumerate(requests)
    ]
    async with group_commit(journal_writer) as writer:
        answers = await results(writer, *changes)
    assert sum(isinstance(answer, JournalError) for answer in answers) == 1
    assert states(journal, requests).count(State.SUBMITTED) == 4


async def test_a_change_of_a_cancelled_caller_is_written(
    journal: Journal,
) -> None:
    journal_writer, requests = JournalWriter(journal), make_requests(20)
    journal_writer.plan(*requests)
    async with group_commit(journal_writer) as writer, anyio.create_task_group() as callers:
        for request in requests:
            callers.start_soon(writer.append, change(request, Event.SUBMITTING))
        await anyio.lowlevel.checkpoint()
        callers.cancel_scope.cancel()
    assert set(states(journal, requests)) == {State.SUBMITTING}


async def test_leaving_writes_pending_changes(journal: Journal) -> None:
    journal_writer, requests = JournalWriter(journal), make_requests(600)
    journal_writer.plan(*requests)
    async with group_commit(journal_writer) as writer:
        tasks = [
            asyncio.ensure_future(writer.append(change(r, Event.SUBMITTING))) for r in requests
        ]
        await anyio.lowlevel.checkpoint()
    assert set(states(journal, requests)) == {State.SUBMITTING}
    await asyncio.gather(*tasks)


async def test_changes_of_one_request_keep_their_order(journal: Journal) -> None:
    journal_writer, (first, second) = JournalWriter(journal), make_requests(2)
    journal_writer.plan(first, second)
    changes = [
        change(first, Event.SUBMITTING),
        change(second, Event.SUBMITTING),
        change(first, Event.OUTCOME_UNKNOWN),
        change(second, Event.ACCEPTED),
        change(first, Event.REPLAYING),
        change(first, Event.ACCEPTED),
    ]
    async with group_commit(journal_writer) as writer:
        await results(writer, *changes)
    assert states(journal, [first, second]) == [State.SUBMITTED, State.SUBMITTED]
    assert [event for _, event, _ in journal.history(first.request_key)][-1] is Event.ACCEPTED


async def test_a_locked_database_fails_all_waiting_changes_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not one after the other: each would wait for the lock again."""
    path = tmp_path / "journal.db"
    journal = Journal(f"sqlite:///{path}", lock_timeout_s=0.2)
    journal_writer, requests = JournalWriter(journal), make_requests(40)
    journal_writer.plan(*requests)
    with closing(sqlite3.connect(path)) as other:
        other.execute("begin immediate")
        append = Mock(side_effect=journal.append)
        monkeypatch.setattr(journal, "append", append)
        async with group_commit(journal_writer) as writer:
            answers = await results(writer, *(change(r, Event.SUBMITTING) for r in requests))
        other.rollback()
    assert all(isinstance(answer, JournalError) for answer in answers)
    assert append.call_count < 10, "each waits for the lock"
    assert set(states(journal, requests)) == {State.PLANNED}


async def test_a_broken_writer_fails_present_and_later_callers(
    journal_url: str,
) -> None:
    class Broken(Journal):
        def append(self, *_: Any, **__: Any) -> list[Record | JournalError | BuyingClosed]:
            return []  # not an answer for each change

    with closing(Broken(journal_url)) as journal:
        journal_writer, requests = JournalWriter(journal), make_requests(2)
        journal_writer.plan(*requests)
        with anyio.fail_after(60):
            async with group_commit(journal_writer) as writer:
                for request in requests:
                    with pytest.raises(ValueError, match="shorter"):
                        await writer.append(change(request, Event.SUBMITTING))

"""Callbacks are stored and counted, and change nothing else."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from sqlalchemy import Connection

from krea_dagster.engine.journal.callback_log import CallbackLog
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.schema import metadata
from krea_dagster.engine.journal.sql import locked_records
from krea_dagster.errors import JournalError
from krea_dagster.models import ImageRequest

START = datetime(2026, 5, 1, 12, tzinfo=timezone.utc)
A, B, C = ("a" * 64, "b" * 64, "c" * 64)


class Now:
    """UTC that the test sets."""

    def __init__(self) -> None:
        self.at = START

    def __call__(self) -> datetime:
        return self.at

    def move(self, seconds: float) -> datetime:
        self.at += timedelta(seconds=seconds)
        return self.at


@pytest.fixture
def now() -> Now:
    return Now()


@pytest.fixture
def log(journal: Journal, journal_url: str, now: Now) -> Iterator[CallbackLog]:
    """The callbacks of a journal with the requests A and B."""
    wanted = [
        (
            ImageRequest(
                request_key=key,
                prompt="a fox",
                size="1:1",
                quality="1K",
                seed=7,
                nsfw_check=False,
                attempt=0,
            ),
            "p",
        )
        for key in (A, B)
    ]
    journal.plan(wanted, run_id="run", at=START)
    with closing(CallbackLog.open(journal_url, now=now)) as opened:
        yield opened


def everything_else(journal: Journal) -> dict[str, list[tuple[object, ...]]]:
    with journal.database.read() as connection:
        return {
            name: sorted(map(tuple, connection.execute(table.select())), key=str)
            for name, table in metadata.tables.items()
            if name != "callbacks"
        }


def test_callbacks_are_stored_and_counted(log: CallbackLog, now: Now) -> None:
    assert log.add([(A, "task-1")]) == {A}
    later = now.move(5)
    assert log.add([(A, None), (B, None)]) == {A, B}
    found = log.received([A, B, C])
    assert set(found) == {A, B}
    assert (found[A].first_at, found[A].last_at, found[A].count) == (START, later, 2)
    assert found[A].task_id == "task-1"  # a call that claims nothing takes no claim away
    assert found[B].task_id is None


def test_concurrent_callbacks_are_one_row_with_count_and_last_claim(
    log: CallbackLog,
) -> None:
    assert log.add([(A, "task-1"), (A, "task-2"), (A, None)]) == {A}
    assert (log.received([A])[A].count, log.received([A])[A].task_id) == (3, "task-2")


def test_callbacks_for_unknown_requests_are_ignored(
    log: CallbackLog,
) -> None:
    assert log.add([(C, "task-1"), (A, None)]) == {A}
    assert log.add([(C, None)]) == set()
    assert set(log.received([A, B, C])) == {A}


def test_callbacks_change_only_their_table(log: CallbackLog, journal: Journal) -> None:
    before = everything_else(journal)
    log.add([(A, "task-of-somebody-else"), (B, None), (C, None)] * 10)
    assert everything_else(journal) == before


def test_an_earlier_clock_does_not_lower_last_at(log: CallbackLog, now: Now) -> None:
    log.add([(A, None)])
    now.move(-60)
    log.add([(A, None)])
    assert log.received([A])[A].last_at == START


def test_concurrent_receivers_lose_no_callback(
    log: CallbackLog, journal_url: str, now: Now
) -> None:
    def write() -> None:
        with closing(CallbackLog.open(journal_url, now=now, lock_timeout_s=30)) as other:
            for _ in range(20):
                other.add([(B, None), (A, None)])

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {key: call.count for key, call in log.received([A, B]).items()} == {A: 80, B: 80}


def test_a_locked_request_does_not_delay_its_callback(log: CallbackLog, journal_url: str) -> None:
    """Otherwise the two could deadlock."""
    if journal_url.startswith("sqlite"):
        pytest.skip("SQLite has one writer at a time")
    with closing(Database(journal_url)) as database, ThreadPoolExecutor(1) as pool:

        def hold(connection: Connection) -> None:
            assert set(locked_records(connection, [A, B])) == {A, B}
            assert pool.submit(log.add, [(A, "task-1")]).result(timeout=20) == {A}

        database.write("hold a request of", hold)


def test_more_keys_than_fit_in_a_statement_are_handled(log: CallbackLog) -> None:
    keys = [f"{number:064x}" for number in range(5000)]
    assert log.add([(key, None) for key in keys] + [(A, None)]) == {A}
    assert set(log.received([*keys, A])) == {A}


def test_a_removed_journal_is_an_error(
    log: CallbackLog, journal_url: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    if not journal_url.startswith("sqlite"):
        pytest.skip("a file is removed")
    file = Path(journal_url.removeprefix("sqlite:///"))
    log.check()
    file.rename(tmp_path_factory.mktemp("elsewhere") / "journal.db")
    for use in (log.check, lambda: log.add([(A, None)]), lambda: log.received([A])):
        with pytest.raises(JournalError):
            use()

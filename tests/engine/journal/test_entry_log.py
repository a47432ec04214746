"""The account's entries and the closed months: written once, and never changed or removed."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import date

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from krea_dagster.engine.journal.closed_month_log import ClosedMonth
from krea_dagster.engine.journal.entry_log import AccountEntry, counted_kinds
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.errors import InputError, StorageError
from tests.engine.harness import NOW
from tests.engine.journal.first_release import engine_of

PACK = AccountEntry("top-up", date(2026, 10, 2), 50_000_000, 700_000, "EUR", "INV-123")
WRONG = AccountEntry("refund", date(2026, 10, 3), 45_000, entry_id="wrong")
REVERSAL = AccountEntry("correction", date(2026, 10, 4), 0, reverses="wrong")
CLOSED = ClosedMonth(
    *("2026-10", NOW, "statements/2026-10-a", "a" * 64, "b" * 64, 3, 13_500, 0, 0, 0, 0)
)


def test_entries_are_added_once_and_a_reversal_in_the_same_call(journal: Journal) -> None:
    done = journal.entries.add([PACK, WRONG, REVERSAL], NOW)
    assert [one.units for one in done.added] == [50_000_000, 45_000, -45_000]
    again = journal.entries.add([replace(PACK), REVERSAL], NOW)
    assert (list(again.added), len(again.known)) == ([], 2)
    found = journal.entries.all()
    assert [one.day.day for one in found] == [2, 3, 4]
    assert counted_kinds(found)[found[2].entry_id] == "refund"
    with pytest.raises(InputError, match="nothing was entered"):
        journal.entries.add([replace(PACK, note="a"), replace(PACK, entry_id="new")], NOW)
    assert len(journal.entries.all()) == 3


def test_writers_at_once_enter_an_entry_once(journal: Journal, journal_url: str) -> None:
    def add(_: int) -> int:
        with closing(Journal(journal_url)) as other:
            return len(other.entries.add([PACK, WRONG], NOW).added)

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(add, range(4))) == 2
    assert len(journal.entries.all()) == 2


def test_a_month_is_closed_once(journal: Journal) -> None:
    assert journal.closed_months.add(CLOSED)
    assert not journal.closed_months.add(replace(CLOSED, sha256="c" * 64))
    assert journal.closed_months.all() == [CLOSED]


def test_the_files_of_a_month_are_written_by_the_host_that_closes_it_and_no_other(
    journal: Journal, journal_url: str
) -> None:
    written: list[int] = []

    def close(host: int) -> bool:
        with closing(Journal(journal_url)) as other:
            return other.closed_months.add(CLOSED, lambda: written.append(host))

    with ThreadPoolExecutor(4) as threads:
        closed = list(threads.map(close, range(4)))
    assert written == [closed.index(True)]
    assert closed.count(True) == 1
    assert journal.closed_months.all() == [CLOSED]


def test_a_month_whose_files_cannot_be_written_stays_open(journal: Journal) -> None:
    def fail() -> None:
        raise StorageError("the disk is full")

    with pytest.raises(StorageError, match="the disk is full"):
        journal.closed_months.add(CLOSED, fail)
    assert journal.closed_months.all() == []


@pytest.mark.parametrize("change", ["UPDATE {} SET {} = 'x'", "DELETE FROM {}"])
@pytest.mark.parametrize(
    ("table", "column"), [("account_entries", "note"), ("closed_months", "name")]
)
def test_the_database_refuses_changes(
    journal: Journal, journal_url: str, change: str, table: str, column: str
) -> None:
    journal.entries.add([PACK], NOW)
    journal.closed_months.add(CLOSED)
    statement = text(change.format(table, column))
    refused = pytest.raises(DBAPIError, match=r"never|stays closed")
    with engine_of(journal_url) as engine, refused, engine.begin() as connection:
        connection.execute(statement)

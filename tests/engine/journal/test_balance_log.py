"""The balances of accounts in the journal's database, and what was committed with their keys."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from typing import Any

import pytest
from sqlalchemy import Connection, insert

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.schema import account_readings, api_keys, requests, submissions

AT = datetime(2026, 11, 1, tzinfo=timezone.utc)
KEYS = {"k1": "a", "k2": "a", "k3": "b"}


@pytest.fixture
def journal(journal_url: str) -> Iterator[Journal]:
    with closing(Journal(journal_url)) as journal:
        yield journal


def enter(journal: Journal, keys: dict[str, str], *readings: tuple[int, str | None, int]) -> None:
    """Enter keys with their accounts, and readings: the hour, the key, the units left."""
    rows: list[dict[str, Any]] = [
        {"at": AT + timedelta(hours=hour), "run_id": "r", "used_units": 0}
        | {"remaining_units": units, "api_key": key}
        for hour, key, units in readings
    ]

    def write(connection: Connection) -> None:
        known = [{"fingerprint": k, "account": a, "first_at": AT} for k, a in keys.items()]
        connection.execute(insert(api_keys), known)
        connection.execute(insert(account_readings), rows)

    journal.database.write("enter", write)


def buy(journal: Journal, name: str, key: str, hour: int, units: int) -> None:
    at = AT + timedelta(hours=hour)
    request: dict[str, Any] = {
        "request_key": name,
        "model": "m",
        "prompt": "p",
        "size": "1:1",
        "quality": "1K",
    }
    request |= {"seed": 1, "nsfw_check": False, "attempt": 0, "partition_key": "", "seq": 0}
    request |= {"state": "submitted", "idempotency_key": name, "updated_at": at}
    purchase: dict[str, Any] = {
        "idempotency_key": name,
        "request_key": name,
        "number": 1,
        "run_id": "r",
    }
    purchase |= {"partition_key": "", "api_key": key, "sent_at": at, "posts": 1}
    purchase |= {"expected_units": units, "committed_units": units}

    def write(connection: Connection) -> None:
        connection.execute(insert(requests), [request])
        connection.execute(insert(submissions), [purchase])

    journal.database.write("buy", write)


def test_balances_of_two_accounts_are_not_mixed_and_two_keys_of_one_are_one(
    journal: Journal,
) -> None:
    readings = [(1, "k1", 90), (2, "k2", 80), (3, "k3", 5_000), (4, None, 1)]
    enter(journal, KEYS, *readings)
    for number, (key, hour) in enumerate([("k1", 0), ("k2", 26), ("k3", 27), ("k1", 1)]):
        buy(journal, f"{number}", key, hour, 10**number)
    second, first = journal.balances.accounts()
    assert [second.account, first.account] == ["b", "a"], "the one read last comes first"
    assert [one.remaining_units for one in first.readings] == [90, 80]
    assert [one.remaining_units for one in second.readings] == [5_000]
    assert first.committed == {date(2026, 11, 1): 1_001, date(2026, 11, 2): 10}
    assert second.committed == {date(2026, 11, 2): 100}
    assert (first.since_units, second.since_units) == (10, 100)


def test_readings_of_unknown_keys_belong_to_the_only_account(journal: Journal) -> None:
    assert journal.balances.accounts() == []
    enter(journal, {"k1": "k1"}, (1, None, 90), (2, "k1", 80))
    (found,) = journal.balances.accounts()
    assert [one.remaining_units for one in found.readings] == [90, 80]

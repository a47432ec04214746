"""Posted and acknowledged warnings in the journal's database."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from datetime import datetime, timedelta, timezone

import pytest
from sqlalchemy import text

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.errors import JournalError

AT = datetime(2026, 11, 2, 9, tzinfo=timezone.utc)
HOUR = timedelta(hours=1)


@pytest.fixture
def journal(journal_url: str) -> Iterator[Journal]:
    with closing(Journal(journal_url)) as journal:
        yield journal


@pytest.mark.parametrize(
    "statement",
    ["update spend_acknowledgements set reason = 'x'", "delete from spend_acknowledgements"],
)
def test_the_database_refuses_to_change_or_remove_an_acknowledgement(
    journal: Journal, statement: str
) -> None:
    journal.acknowledgements.add("0f3a9c27d1", "planned", by="ada", text=None, at=AT)
    with pytest.raises(JournalError, match="is never changed or removed; withdraw it"):
        journal.database.write("try", lambda connection: connection.execute(text(statement)))
    assert journal.acknowledgements.current().keys() == {"0f3a9c27d1"}


def test_an_alert_waits_is_claimed_by_one_and_is_forgotten_when_it_has_ended(
    journal: Journal,
) -> None:
    alerts = journal.alerts
    runs = [new_owner("one"), new_owner("other")]
    for run in runs:
        journal.claims.register(run)
    owners = [run.owner for run in runs]
    alerts.update("mail", {"a": "1", "b": "2"}, at=AT)
    assert alerts.waiting("mail") == ["a", "b"]
    assert alerts.waiting("slack") == []
    assert [alerts.claim("mail", "a", owner) for owner in owners] == ["1", None]
    alerts.end("mail", "a", posted_at=AT)
    assert [alerts.claim("mail", "a", owner) for owner in owners] == [None, None]
    alerts.update("mail", {"a": "1 more", "b": "3"}, at=AT + HOUR)
    assert alerts.waiting("mail") == ["b"]
    assert alerts.claim("mail", "b", owners[1]) == "3"
    alerts.end("mail", "b", posted_at=None)
    alerts.update("mail", {}, ["b"], at=AT + 2 * HOUR)
    assert alerts.waiting("mail") == []
    alerts.update("mail", {"a": "1"}, at=AT + 3 * HOUR)
    assert alerts.waiting("mail") == ["a"], "it had ended"


def test_the_claim_of_an_owner_that_has_ended_is_free(journal: Journal) -> None:
    first, second = new_owner("one"), new_owner("other")
    journal.alerts.update("mail", {"a": "1"}, at=AT)
    for owner in (first, second):
        journal.claims.register(owner)
    assert journal.alerts.claim("mail", "a", first.owner) == "1"
    journal.claims.release(first.owner)
    assert journal.alerts.claim("mail", "a", second.owner) == "1"

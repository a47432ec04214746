"""Runs that share a journal share what they learn about their account."""

from __future__ import annotations

from functools import partial

from sqlalchemy import Connection, insert, update

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.owners import Owner, new_owner
from krea_dagster.engine.journal.schema import api_keys, paces
from krea_dagster.engine.pace import InWork, Limit, Pace
from krea_dagster.engine.pace_sharing import Lease, PaceEvent, PaceExchange
from tests.engine.harness import NOW

KEY = "0123456789abcdef"
FULL = InWork(20, 20.0, 0.0)


class Hours:
    """A host's clock in seconds, set by the test."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def begun(journal: Journal) -> Owner:
    owner = new_owner("run")
    journal.claims.register(owner)
    return owner


def exchanged(
    journal: Journal,
    owner: Owner,
    clock: Hours,
    *answers: PaceEvent,
    wants: int = 5,
    key: str = KEY,
) -> PaceExchange:
    lease = Lease(owner.owner, len(answers), wants)
    return journal.paces.exchange(key, lease, answers, clock)


def refused(clock: Hours, wait_s: float = 0.0) -> PaceEvent:
    return PaceEvent(clock(), "refused", 0.01, FULL, wait_s)


def test_a_run_knows_earlier_refusals_before_its_first_submission(
    journal: Journal,
) -> None:
    clock = Hours()
    exchanged(journal, begun(journal), clock, refused(clock, 30.0))
    learned = exchanged(journal, begun(journal), clock).learned
    assert learned.limit is Limit.UNCLEAR
    assert 29.0 < learned.wait_s(clock()) <= 30.0


def test_runs_see_the_leases_of_living_runs(journal: Journal) -> None:
    clock = Hours()
    first, second = begun(journal), begun(journal)
    assert exchanged(journal, first, clock, refused(clock), wants=7).others == ()
    (seen,) = exchanged(journal, second, clock).others
    assert (seen.owner, seen.in_flight, seen.wants) == (first.owner, 1, 7)
    journal.claims.release(first.owner)
    assert exchanged(journal, second, clock).others == ()


def test_keys_of_one_account_share_a_pace(journal: Journal) -> None:
    clock = Hours()
    exchanged(journal, begun(journal), clock, refused(clock))
    other = "fedcba9876543210"
    assert exchanged(journal, begun(journal), clock, key=other).learned == Pace(1_000_000)
    same = {"fingerprint": "0000000000000000", "account": KEY, "first_at": NOW}
    journal.database.write("enter", lambda at: at.execute(insert(api_keys).values(same)))
    one = exchanged(journal, begun(journal), clock, key="0000000000000000")
    assert one.learned.limit is Limit.UNCLEAR


def test_an_unreadable_pace_is_ignored(journal: Journal) -> None:
    clock, owner = Hours(), begun(journal)
    exchanged(journal, owner, clock, refused(clock))
    for kept in ("", "{", "[]", '{"pace": {"window": 3}, "answers": []}', '{"pace": 3}'):
        spoiled = update(paces).values(kept=kept)
        journal.database.write("spoil", partial(Connection.execute, statement=spoiled))
        assert exchanged(journal, owner, clock).learned == Pace(1_000_000)

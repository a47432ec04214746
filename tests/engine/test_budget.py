"""Budgets: how they are written, what they bound, and what is returned to each scope."""

from __future__ import annotations

import random
from collections import Counter
from datetime import date, datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.budget import (
    Budget,
    Caps,
    Commitment,
    admit,
    column_scope,
    next_month,
    scope_name,
    scopes_of,
)
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import CapReached, ConfigError
from tests.engine.harness import NOW, JournalWriter, change, make_requests

NOTHING = Commitment()


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("day=50", Budget("day", 500_000)),
        ("month=900.5", Budget("month", 9_005_000)),
        ("partition=20", Budget("partition", 200_000)),
        ("partition:2026-11-22|a=b=0.45", Budget("partition", 4_500, "", "2026-11-22|a=b")),
        ("column:campaign=100", Budget("column", 1_000_000, "campaign")),
        ("column:campaign:autumn=0", Budget("column", 0, "campaign", "autumn")),
        ("column:campaign:a:b=1", Budget("column", 10_000, "campaign", "a:b")),
        ("column:campaign:=1", Budget("column", 10_000, "campaign", "")),
    ],
)
def test_a_budget_is_a_scope_and_its_credits(text: str, budget: Budget) -> None:
    assert Budget.parse(text) == budget


@pytest.mark.parametrize(
    "text",
    [
        *("", "day", "50", "day=", "day=-1", "day=nan", "day=inf", "day:2026-11-22=1", "week=1"),
        *("column=1", "column:=1", "column:campaign", "month=9,5", "campaign=autumn:100"),
    ],
)
def test_an_invalid_budget_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is invalid; use SCOPE=CREDITS"):
        Budget.parse(text)


def test_a_budget_bounds_its_scope_and_no_similar_one() -> None:
    scopes = scopes_of("r", NOW, "a:b", [column_scope("campaign", "autumn:late")])
    assert scopes[:4] == ("run:r", "day:2026-01-01", "month:2026-01", "partition:a:b")
    bounding = {
        "day=1": "day:2026-01-01",
        "month=1": "month:2026-01",
        "partition=1": "partition:a:b",
        "partition:a:b=1": "partition:a:b",
        "column:campaign=1": "column:campaign:autumn:late",
        "column:campaign:autumn:late=1": "column:campaign:autumn:late",
    }
    for text, scope in bounding.items():
        assert [one for one in scopes if Budget.parse(text).bounds(one)] == [scope]
    for text in ("partition:a=1", "column:campaign:autumn=1", "column:camp=1"):
        assert not any(Budget.parse(text).bounds(scope) for scope in scopes)
    assert column_scope("campaign", None) == column_scope("campaign", "")


@given(st.text(max_size=700), st.text(max_size=700))
def test_scopes_fit_into_every_database_and_stay_distinct(one: str, other: str) -> None:
    for text in (one, other):
        name = scope_name(text)
        assert len(name) <= 300
        assert "\x00" not in name
        name.encode()
    if one.isascii() and other.isascii() and "\x00" not in one + other and one != other:
        assert scope_name(one) != scope_name(other)
    value = Budget("partition", 1, "", one)
    assert value.bounds(scopes_of("r", NOW, one)[3])


def test_a_full_budget_tells_when_it_frees() -> None:
    now = datetime(2026, 12, 5, 7, tzinfo=timezone.utc)
    scopes = scopes_of("r", now, "p", [column_scope("campaign", "autumn")])
    held = Commitment(8_995_500, 8_950_000)

    def said(text: str) -> CapReached:
        caps = Caps(budgets=(Budget.parse(text),))
        reached = admit(caps, scopes, lambda _: held, 4_501, now)
        assert reached is not None
        assert admit(caps, scopes, lambda _: held, 4_500, now) is None, "exactly full"
        return reached

    month = said("month=900")
    assert (month.code, month.scope) == ("month_budget_reached", "month:2026-12")
    assert str(month) == (
        "the budget of month 2026-12 of 900 credits leaves no room for 0.4501 more: 895 spent, "
        "4.55 reserved; it frees at 2027-01-01 00:00 UTC"
    )
    assert "frees at 2026-12-06 00:00 UTC" in str(said("day=900"))
    assert "the budget of column:campaign:autumn of 900" in str(said("column:campaign=900"))
    assert "or the budget is raised" in str(said("partition:p=900"))


@given(st.dates(max_value=date(9000, 1, 1)))
def test_the_next_month_begins_on_its_first_day(day: date) -> None:
    now = datetime(day.year, day.month, day.day, 13, tzinfo=timezone.utc)
    found = next_month(now)
    assert (found.day, found.hour, found.minute) == (1, 0, 0)
    assert timedelta(0) < found - now <= timedelta(days=31)


# -- in the journal -------------------------------------------------------------------------------

AUTUMN = column_scope("campaign", "autumn")


def buy(
    writer: JournalWriter, request: object, *budgets: str, **values: object
) -> Record | CapReached:
    """Enter the intent of a purchase for the campaign autumn, under budgets."""
    given = {"partition_key": "p", "scopes": (AUTUMN,), **values}
    wish = Change(request.request_key, Event.SUBMITTING, NOW, given)  # type: ignore[attr-defined] # any request
    (answer,) = writer.journal.append(
        [wish],
        owner=writer.owner.owner,
        run_id=writer.run_id,
        caps=Caps(budgets=tuple(map(Budget.parse, budgets))),
    )
    assert isinstance(answer, Record | CapReached), answer
    return answer


@pytest.mark.parametrize(
    "budget", ["day=0.9", "month=0.9", "partition=0.9", "partition:p=0.9", "column:campaign=0.9"]
)
def test_a_purchase_that_certainly_cost_nothing_is_returned_to_every_scope(
    journal: Journal, budget: str
) -> None:
    writer = JournalWriter(journal)
    requests = make_requests(4)
    writer.plan(*requests)
    assert isinstance(buy(writer, requests[0], budget), Record)
    assert isinstance(buy(writer, requests[1], budget), Record)
    refused = buy(writer, requests[2], budget)
    assert isinstance(refused, CapReached)
    writer.write(requests[0], Event.ACCEPTED)
    writer.write(requests[1], Event.OUTCOME_UNKNOWN)
    assert isinstance(buy(writer, requests[2], budget), CapReached), (
        "what is unknown stays committed"
    )
    writer.write(requests[0], Event.FAILED)
    assert journal.commitment(refused.scope) == Commitment(4_500, 0)
    assert isinstance(buy(writer, requests[2], budget), Record)
    writer.write(requests[2], Event.ACCEPTED)
    writer.write(requests[2], Event.COMPLETED)
    assert journal.commitment(refused.scope) == Commitment(9_000, 4_500)


def test_a_later_run_returns_to_the_scopes_that_the_purchase_was_made_for(journal: Journal) -> None:
    """Although it has no budget, and would buy it for another partition."""
    first, (request,) = JournalWriter(journal, "run-1"), make_requests(1)
    first.plan(request)
    buy(first, request, "column:campaign=1")
    first.write(request, Event.ACCEPTED)
    journal.claims.release(first.owner.owner)
    later = JournalWriter(journal, "run-2")
    journal.claims.claim([request.request_key], later.owner.owner)
    later.write(request, Event.FAILED)
    for scope in scopes_of("run-1", NOW, "p", [AUTUMN]):
        assert journal.commitment(scope) == NOTHING, scope
    assert journal.commitment("run:run-2") == NOTHING


def test_a_request_that_is_sent_again_counts_for_its_new_scopes(journal: Journal) -> None:
    writer, (request,) = JournalWriter(journal), make_requests(1)
    writer.plan(request)
    buy(writer, request, "month=1")
    writer.write(request, Event.TURNED_AWAY)
    assert journal.commitment(AUTUMN) == NOTHING
    spring = column_scope("campaign", "spring")
    record = buy(writer, request, "month=1", scopes=(spring,), partition_key="q")
    assert isinstance(record, Record)
    assert (record.scopes, record.bought_for) == ((spring,), "q")
    assert journal.records([request.request_key])[request.request_key] == record
    assert journal.commitment(spring) == journal.commitment("partition:q") == Commitment(4_500)
    assert journal.commitment(AUTUMN) == journal.commitment("partition:p") == NOTHING


def test_the_sums_of_all_scopes_are_always_those_of_the_purchases(journal: Journal) -> None:
    chance = random.Random(7)
    writer, requests = JournalWriter(journal), make_requests(30)
    writer.plan(*requests)
    budgets = ("month=8", "partition=5", "column:campaign=4")
    endings = (
        (Event.ACCEPTED, Event.COMPLETED, Event.STORED),
        (Event.ACCEPTED, Event.FAILED),
        (Event.OUTCOME_UNKNOWN,),
        (Event.REFUSED,),
        (Event.TURNED_AWAY,),
        (),
    )
    for request in requests:
        campaign = column_scope("campaign", chance.choice(["autumn", "spring", None]))
        record = buy(
            writer, request, *budgets, partition_key=chance.choice("ab"), scopes=(campaign,)
        )
        if isinstance(record, CapReached):
            continue
        for event in chance.choice(endings):
            writer.append(change(request, event))
    right: Counter[str] = Counter()
    for charge in journal.charges():
        where = (charge.run_id, charge.sent_at, charge.partition_key, charge.scopes)
        for scope in scopes_of(*where):
            right[scope] += charge.committed_units
    assert {scope: journal.commitment(scope).committed_units for scope in right} == right
    assert right["month:2026-01"] <= 80_000
    assert all(right[f"partition:{name}"] <= 50_000 for name in "ab")
    assert journal.count_by_state()[State.STORED] > 0


def test_a_batch_that_passes_a_budget_in_the_middle_writes_what_fits(journal: Journal) -> None:
    writer, requests = JournalWriter(journal), make_requests(5)
    writer.plan(*requests)
    answers = journal.append(
        [
            Change(one.request_key, Event.SUBMITTING, NOW, {"partition_key": "p", "scopes": ()})
            for one in requests
        ],
        owner=writer.owner.owner,
        run_id=writer.run_id,
        caps=Caps(budgets=(Budget.parse("partition=1"),)),
    )
    assert [type(answer) for answer in answers] == [Record] * 2 + [CapReached] * 3

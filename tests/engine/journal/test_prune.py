"""Old events are removed, and nothing else: not a request, not a purchase, not a charge."""

from __future__ import annotations

from datetime import timedelta

import pytest

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.prune import Pruned, prune
from krea_dagster.engine.states import Event, State
from tests.engine.harness import (
    EVENTS_TO_STATE,
    NOW,
    JournalWriter,
    all_rows,
    change,
    make_request,
    make_requests,
)

AFTER = NOW + timedelta(days=1)


def events(journal: Journal, request_key: str) -> list[Event]:
    return [event for _, event, _ in journal.history(request_key)]


@pytest.fixture
def released(journal: Journal) -> JournalWriter:
    """A run that gives its claims back at its end."""
    return JournalWriter(journal)


def end(journal: Journal, writer: JournalWriter) -> None:
    journal.claims.release(writer.owner.owner)


def test_only_the_last_event_of_an_image_stored_long_ago_is_kept(
    journal: Journal, journal_url: str, released: JournalWriter
) -> None:
    requests = make_requests(3)
    for request in requests:
        released.bring_to(request, State.STORED)
    end(journal, released)
    before = all_rows(journal_url)
    assert prune(journal.database, AFTER) == Pruned(requests=3, events=12)
    assert [events(journal, one.request_key) for one in requests] == [[Event.STORED]] * 3
    after = all_rows(journal_url)
    assert after.pop("events") != before.pop("events")
    kept_from = [row.pop("kept_from_seq") for row in after["requests"]]
    assert kept_from == [row["seq"] for row in after["requests"]]
    for row in before["requests"]:
        del row["kept_from_seq"]
    assert after == before
    assert prune(journal.database, AFTER) == Pruned()


@pytest.mark.parametrize("state", [state for state in State if state is not State.STORED])
def test_a_request_that_is_not_stored_keeps_its_events(
    journal: Journal, journal_url: str, released: JournalWriter, state: State
) -> None:
    released.bring_to(make_request(), state)
    end(journal, released)
    before = all_rows(journal_url)
    assert prune(journal.database, AFTER) == Pruned()
    assert all_rows(journal_url) == before


def test_an_image_that_changed_since_or_is_held_by_a_run_keeps_its_events(
    journal: Journal, journal_url: str, released: JournalWriter
) -> None:
    released.bring_to(make_request(), State.STORED)
    before = all_rows(journal_url)
    assert prune(journal.database, AFTER) == Pruned()  # the run holds it
    end(journal, released)
    assert prune(journal.database, NOW) == Pruned()  # it was stored at that time
    assert all_rows(journal_url)["events"] == before["events"]


def test_failures_repeats_and_finds_are_kept_because_accounts_are_made_from_them(
    journal: Journal, released: JournalWriter
) -> None:
    request = make_request()
    released.bring_to(request, State.FAILED)
    released.write(request, Event.PLANNED)
    released.write(request, Event.SUBMITTING)
    released.write(request, Event.OUTCOME_UNKNOWN)
    released.write(request, Event.REPLAYING)
    released.write(request, Event.ACCEPTED, task_id="task-2")
    released.write(request, Event.COMPLETED)
    released.write(request, Event.STORED)
    released.write(request, Event.FILE_MISSING)
    released.write(request, Event.FOUND)
    released.write(request, Event.FILE_MISSING)
    released.write(request, Event.STORED)
    end(journal, released)
    prune(journal.database, AFTER)
    kept = [Event.FAILED, Event.REPLAYING, Event.FOUND, Event.STORED]
    assert events(journal, request.request_key) == kept


def test_a_pruned_request_goes_on_and_is_pruned_again(
    journal: Journal, released: JournalWriter
) -> None:
    request = make_request()
    released.bring_to(request, State.STORED)
    end(journal, released)
    prune(journal.database, AFTER)
    later = JournalWriter(journal)
    journal.claims.claim([request.request_key], later.owner.owner)
    later.write(request, Event.FILE_MISSING)
    later.write(request, Event.STORED)
    end(journal, later)
    both = [Event.STORED, Event.FILE_MISSING, Event.STORED]
    assert events(journal, request.request_key) == both
    assert prune(journal.database, AFTER) == Pruned(requests=1, events=2)
    assert events(journal, request.request_key) == [Event.STORED]


def test_callbacks_of_stored_images_go_and_others_stay(
    journal: Journal, released: JournalWriter
) -> None:
    stored, waiting = make_requests(2)
    released.bring_to(stored, State.STORED)
    released.bring_to(waiting, State.SUBMITTED)
    keys = [stored.request_key, waiting.request_key]
    journal.callbacks.add([(key, None) for key in keys])
    end(journal, released)
    (first,) = journal.callbacks.received(keys[:1]).values()
    assert prune(journal.database, AFTER).callbacks == 0  # they came later
    assert prune(journal.database, first.last_at + timedelta(seconds=1)).callbacks == 1
    assert list(journal.callbacks.received(keys)) == keys[1:]


def test_more_images_than_fit_in_a_transaction_are_pruned(
    journal: Journal, released: JournalWriter
) -> None:
    requests = make_requests(1100)
    released.plan(*requests)
    for event in EVENTS_TO_STATE[State.STORED]:
        released.append(*(change(request, event) for request in requests))
    end(journal, released)
    assert prune(journal.database, AFTER) == Pruned(requests=1100, events=4400)

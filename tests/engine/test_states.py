"""The state machine: what can happen to a request, and what never can."""

from __future__ import annotations

import re
import uuid

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import Engine, create_engine, event, insert
from sqlalchemy.exc import IntegrityError

from krea_dagster.engine import states
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import AT_STAKE, TRANSITIONS, Event, State, advance, replay
from krea_dagster.errors import IllegalTransition, JournalError
from tests.engine.harness import EVENTS_TO_STATE, NOW, JournalWriter, all_rows, change, make_request

BEFORE: list[State | None] = [None, *State]

#: States in which a request may end: its image is stored, or certainly never will be.
ENDS = frozenset({State.STORED, State.FAILED, State.REFUSED, State.EXPIRED})

#: Events after which it is certain that the last purchase cost nothing or did not happen.
CERTAINLY_FREE = frozenset(
    {Event.TURNED_AWAY, Event.REFUSED, Event.DEFERRED, Event.FAILED, Event.RELEASED}
)


def reachable(start: State, *, without: frozenset[Event] = frozenset()) -> set[State]:
    """The states that events lead to from a state, in one step or more."""
    found: set[State] = set()
    ahead = [start]
    while ahead:
        here = ahead.pop()
        steps = {
            after
            for (before, happened), after in TRANSITIONS.items()
            if before is here and happened not in without
        }
        ahead += steps - found
        found |= steps
    return found


@pytest.mark.parametrize("happened", Event)
@pytest.mark.parametrize("before", BEFORE)
def test_each_event_in_each_state_is_in_the_table_or_is_refused(
    before: State | None, happened: Event
) -> None:
    after = TRANSITIONS.get((before, happened))
    if after is not None:
        assert advance(before, happened) is after
        return
    with pytest.raises(IllegalTransition, match=happened.value):
        advance(before, happened)


def test_a_request_is_bought_again_only_after_the_last_purchase_certainly_cost_nothing() -> None:
    assert State.SUBMITTING not in reachable(State.SUBMITTING, without=CERTAINLY_FREE)


def test_an_unknown_outcome_ends_with_the_task_the_file_or_a_person() -> None:
    ways_out = {
        happened
        for (before, happened), after in TRANSITIONS.items()
        if before is State.UNKNOWN and after is not State.UNKNOWN
    }
    assert ways_out <= {Event.ACCEPTED, Event.RELEASED, Event.EXPIRED, Event.FOUND}


def test_every_state_is_reachable_and_leads_to_an_end() -> None:
    assert reachable(State.PLANNED) | {State.PLANNED} == set(State)
    for state in set(State) - ENDS:
        assert reachable(state) & ENDS, state


def test_money_is_at_stake_from_the_intent_until_the_file_or_a_certain_end() -> None:
    free = ENDS | {State.PLANNED, State.DEFERRED}
    assert set(State) - free == AT_STAKE


def test_the_diagram_shows_every_state_and_no_other() -> None:
    diagram = (states.__doc__ or "").partition(".. code-block:: text")[2].partition("\n\n``")[0]
    without_remarks = re.sub(r"\([^)]*\)", "", diagram)
    assert set(re.findall(r"[a-z]+", without_remarks)) == {state.value for state in State}


@given(st.data())
def test_any_sequence_of_legal_events_replays_to_the_present_state(data: st.DataObject) -> None:
    state: State | None = None
    happened: list[Event] = []
    for _ in range(data.draw(st.integers(0, 30))):
        legal = sorted(one for before, one in TRANSITIONS if before is state)
        if not legal:
            break
        chosen = data.draw(st.sampled_from(legal))
        state = advance(state, chosen)
        happened.append(chosen)
        assert replay(happened) is state


def test_the_journal_refuses_every_event_that_the_table_does_not_hold(
    journal: Journal, journal_url: str
) -> None:
    writer = JournalWriter(journal)
    requests = {state: make_request(seed=number) for number, state in enumerate(State, start=1)}
    for state, request in requests.items():
        assert writer.bring_to(request, state).state is state
    illegal = [
        change(request, happened)
        for state, request in requests.items()
        for happened in Event
        if (state, happened) not in TRANSITIONS
    ]
    before = all_rows(journal_url)
    answers = writer.append(*illegal)
    assert [type(answer) for answer in answers] == [IllegalTransition] * len(illegal)
    assert all_rows(journal_url) == before


def test_an_event_that_may_not_set_a_column_changes_nothing(
    journal: Journal, journal_url: str
) -> None:
    writer, request = JournalWriter(journal), make_request()
    writer.bring_to(request, State.SUBMITTED)
    before = all_rows(journal_url)
    with pytest.raises(IllegalTransition, match="task_id"):
        writer.write(request, Event.COMPLETED, task_id="task-unified-other")
    assert all_rows(journal_url) == before


def test_an_event_of_an_unknown_request_is_refused(journal: Journal) -> None:
    with pytest.raises(JournalError, match="not in the journal"):
        JournalWriter(journal).write(make_request(), Event.SUBMITTING)


def test_the_database_itself_refuses_what_the_table_does_not_hold(
    journal: Journal, journal_url: str
) -> None:
    """An illegal event breaks a foreign key, for any code that writes to the tables."""
    request = make_request()
    JournalWriter(journal).plan(request)
    engine = _with_foreign_keys(journal_url)
    legal = {(before, happened, after) for (before, happened), after in TRANSITIONS.items()}
    taken = 0
    with engine.connect() as connection, connection.begin() as outer:
        for before in BEFORE:
            for happened in Event:
                for after in State:
                    savepoint = connection.begin_nested()
                    row = {
                        "request_key": request.request_key,
                        "seq": 1,
                        "at": NOW,
                        "run_id": "r",
                        "from_state": "" if before is None else before.value,
                        "event": happened.value,
                        "to_state": after.value,
                    }
                    if (before, happened, after) in legal:
                        connection.execute(insert(schema.events), row)
                        taken += 1
                    else:
                        with pytest.raises(IntegrityError):
                            connection.execute(insert(schema.events), row)
                    savepoint.rollback()
        outer.rollback()
    engine.dispose()
    assert taken == len(TRANSITIONS)


def _with_foreign_keys(url: str) -> Engine:
    engine = create_engine(url)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _on(connection: object, _record: object) -> None:
            cursor = connection.cursor()  # type: ignore[attr-defined]  # the driver's connection
            cursor.execute("PRAGMA foreign_keys = ON")
            cursor.close()

    return engine


HISTORIES = st.lists(st.integers(0, 100), min_size=1, max_size=12)


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(choices=HISTORIES, others=HISTORIES)
def test_histories_of_two_requests_in_one_commit_end_where_their_events_lead(
    journal: Journal, choices: list[int], others: list[int]
) -> None:
    """In any order of the changes of both, the last event of each decides."""
    writer = JournalWriter(journal)
    first, second = (make_request(f"{name} {uuid.uuid4().hex}") for name in ("one", "other"))
    writer.plan(first, second)
    walks = {first: _walk(choices), second: _walk(others)}
    changes = []
    for number in range(12):
        for request, walk in walks.items():
            if number < len(walk):
                # A task id is given once: each acceptance has its own.
                task = {"task_id": f"{request.seed}-{uuid.uuid4().hex}"}
                given_too = task if walk[number] is Event.ACCEPTED else {}
                changes.append(change(request, walk[number], **given_too))
    assert not [answer for answer in writer.append(*changes) if isinstance(answer, JournalError)]
    for request, walk in walks.items():
        history = [happened for _, happened, _ in journal.history(request.request_key)]
        record = journal.records([request.request_key])[request.request_key]
        assert history == [Event.PLANNED, *walk]
        assert replay(history) is record.state


def _walk(choices: list[int]) -> list[Event]:
    """Legal events from planned on, chosen by numbers."""
    state, walk = State.PLANNED, []
    for choice in choices:
        legal = sorted(happened for before, happened in TRANSITIONS if before is state)
        if not {Event.SUBMITTING, Event.DEFERRED}.isdisjoint(legal):
            legal.remove(
                Event.FOUND
            )  # a file that was found without a purchase has none to go on with
        if legal:
            walk.append(legal[choice % len(legal)])
            state = advance(state, walk[-1])
    return walk


def test_the_events_of_the_harness_lead_to_their_states() -> None:
    for state, way in EVENTS_TO_STATE.items():
        assert replay((Event.PLANNED, *way)) is state

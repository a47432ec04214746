"""The next action for each state and history."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.engine.policy import (
    CONFLICT,
    DONE,
    REJECTED,
    REPEATABLE_TASK_ERRORS,
    Action,
    Adopt,
    Expire,
    Fetch,
    Leave,
    MarkUnknown,
    Policy,
    Poll,
    Replay,
    Requeue,
    RetryState,
    Submit,
    backoff_s,
    next_action,
    task_error_wait_s,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from tests.engine.harness import NOW, make_request

POLICY = Policy()
HOUR = 3600.0
UNANSWERED = MarkUnknown("no_answer_written", "a run ended between its POST and the answer")


def record(state: State, **fields: Any) -> Record:
    """A request in a state, sent, taken and completed just now."""
    times = {"sent_at": NOW, "submitted_at": NOW, "completed_at": NOW, "result_url": "https://x/y"}
    fields = {"task_id": "task-unified-1", "submission": 1, **fields}
    return Record(request=make_request(), state=state, partition_key="p", **{**times, **fields})


def following(
    state: State,
    retry: RetryState | None = None,
    *,
    after_s: float = 1.0,
    policy: Policy = POLICY,
    buying: bool = True,
    **fields: Any,
) -> Action:
    """The next action a number of seconds after the last event."""
    now = NOW + timedelta(seconds=after_s)
    return next_action(record(state, **fields), retry or RetryState(), now, policy, buying=buying)


@pytest.mark.parametrize(
    ("state", "first"),
    [
        (State.PLANNED, Submit()),
        (State.DEFERRED, Submit()),
        (State.SUBMITTING, UNANSWERED),
        (State.UNKNOWN, Replay()),
        (State.SUBMITTED, Poll()),
        (State.COMPLETED, Fetch()),
        (State.STORED, DONE),
        (State.REFUSED, DONE),
        (State.EXPIRED, Poll()),
        (State.FAILED, DONE),
    ],
)
def test_a_run_that_finds_a_request_in_a_state_begins_with(state: State, first: Action) -> None:
    assert following(state) == first


# -- buying -----------------------------------------------------------------------------------


@pytest.mark.parametrize("state", [State.PLANNED, State.DEFERRED])
def test_once_buying_has_stopped_what_is_not_bought_is_deferred(state: State) -> None:
    assert following(state, buying=False) == Leave("not bought: this run has stopped buying")


def test_a_request_that_is_never_taken_is_left_after_its_tries_and_costs_nothing() -> None:
    assert following(State.PLANNED, RetryState(submit_failures=7)) == Submit()
    action = following(State.PLANNED, RetryState(submit_failures=8))
    assert isinstance(action, Leave)
    assert "nothing was bought" in action.reason


@pytest.mark.parametrize("state", State)
def test_a_request_with_a_reason_to_leave_it_is_left_in_any_state(state: State) -> None:
    assert following(state, RetryState(leave_reason="a person decides")) == Leave(
        "a person decides"
    )


# -- unknown outcomes -------------------------------------------------------------------------


def test_an_unknown_outcome_is_repeated_up_to_23_hours_after_the_first_try() -> None:
    assert following(State.UNKNOWN, after_s=23 * HOUR) == Replay()
    late = following(State.UNKNOWN, after_s=23 * HOUR + 1)
    assert late == Leave("outcome unknown, first try over 23 hours ago: a person decides")


def test_an_unknown_outcome_without_a_time_is_not_repeated() -> None:
    assert isinstance(following(State.UNKNOWN, sent_at=None), Leave)


def test_under_the_policy_hold_an_unknown_outcome_is_never_repeated() -> None:
    action = following(State.UNKNOWN, policy=Policy(on_unknown="hold"))
    assert action == Leave("outcome unknown, policy hold: a person decides")


def test_under_the_policy_hold_a_crash_is_still_recorded_as_unknown() -> None:
    assert following(State.SUBMITTING, policy=Policy(on_unknown="hold")) == UNANSWERED


def test_a_run_that_has_stopped_buying_repeats_no_purchase() -> None:
    assert isinstance(following(State.UNKNOWN, buying=False), Leave)
    assert following(State.SUBMITTING, buying=False) == UNANSWERED


def test_an_outcome_that_stays_unknown_is_left_for_the_next_run() -> None:
    assert following(State.UNKNOWN, RetryState(submit_failures=11)) == Replay()
    assert isinstance(following(State.UNKNOWN, RetryState(submit_failures=12)), Leave)


# -- polling ----------------------------------------------------------------------------------


def test_a_task_is_waited_for_until_patience_ends_counted_from_its_submission() -> None:
    asked_before = RetryState(polls=3)
    assert following(State.SUBMITTED, asked_before, after_s=1800) == Poll()
    late = following(State.SUBMITTED, asked_before, after_s=1801)
    assert late == Leave("detached: not finished 1801 s after its submission")


def test_a_run_after_the_deadline_polls_once_before_it_detaches() -> None:
    assert following(State.SUBMITTED, after_s=48 * HOUR) == Poll()


def test_a_paid_image_is_finished_although_buying_has_stopped() -> None:
    assert following(State.SUBMITTED, buying=False) == Poll()
    assert following(State.COMPLETED, buying=False) == Fetch()


def test_failed_reads_detach_from_the_task_and_never_give_it_up() -> None:
    assert following(State.SUBMITTED, RetryState(poll_failures=19)) == Poll()
    action = following(State.SUBMITTED, RetryState(poll_failures=20))
    assert action == Leave("detached: no usable answer to 20 reads of its task")


def test_a_task_is_gone_when_it_is_older_than_its_links_and_was_not_found_three_times() -> None:
    gone = RetryState(not_found=3, poll_failures=3)
    twice = RetryState(not_found=2, poll_failures=2)
    assert following(State.SUBMITTED, twice, after_s=24 * HOUR) == Poll()
    action = following(State.SUBMITTED, gone, after_s=24 * HOUR)
    assert action == Expire("task_not_found", "the server does not know the task any more")


def test_a_younger_task_that_is_not_found_is_not_found_yet() -> None:
    action = following(
        State.SUBMITTED, RetryState(not_found=3, poll_failures=3), after_s=24 * HOUR - 1
    )
    assert action == Leave("the server does not know its task yet: the next run reads it again")


def test_a_task_that_was_given_up_is_read_once_in_every_run_of_the_next_week() -> None:
    assert following(State.EXPIRED, after_s=7 * 24 * HOUR) == Poll()
    assert following(State.EXPIRED, RetryState(poll_failures=1)) == DONE
    assert following(State.EXPIRED, after_s=7 * 24 * HOUR + 1) == DONE
    assert following(State.EXPIRED, after_s=99 * 24 * HOUR, policy=Policy(revive=True)) == Poll()
    assert following(State.EXPIRED, task_id=None) == DONE


def test_an_invalid_task_id_is_an_unknown_outcome() -> None:
    action = following(State.SUBMITTED, task_id="..")
    assert action == MarkUnknown("no_task_id", "'..' cannot be a task's id")


# -- another key, another clock ---------------------------------------------------------------

MINE = Policy(account_keys=frozenset({"mine", "mine before"}))


def test_a_purchase_with_the_key_of_another_account_is_never_repeated() -> None:
    action = following(State.UNKNOWN, policy=MINE, api_key="theirs")
    assert isinstance(action, Leave)
    assert "another API key (fingerprint theirs)" in action.reason
    decided = following(
        State.UNKNOWN, RetryState(replay_decided=True), policy=MINE, api_key="theirs"
    )
    assert isinstance(decided, Leave)


def test_a_purchase_with_another_key_of_this_account_is_repeated() -> None:
    for api_key in ("mine", "mine before", None):
        assert following(State.UNKNOWN, policy=MINE, api_key=api_key) == Replay()


def test_with_the_key_of_another_account_no_task_is_given_up() -> None:
    gone = RetryState(not_found=3, poll_failures=3)
    old = following(State.SUBMITTED, gone, after_s=99 * HOUR, policy=MINE, api_key="theirs")
    assert isinstance(old, Leave)
    dead = RetryState(link_dead=True, stale_link=True, not_found=3, poll_failures=4)
    old = following(State.COMPLETED, dead, after_s=99 * HOUR, policy=MINE, api_key="theirs")
    assert isinstance(old, Leave)


def test_an_unknown_outcome_of_a_future_time_is_left_to_a_person() -> None:
    assert following(State.UNKNOWN, after_s=-299) == Replay()
    action = following(State.UNKNOWN, after_s=-301)
    assert isinstance(action, Leave)
    assert "ahead of this clock: a person decides" in action.reason


def test_a_task_of_a_future_time_is_read_and_neither_waited_for_nor_given_up() -> None:
    assert following(State.SUBMITTED, after_s=-HOUR) == Poll()
    assert isinstance(following(State.SUBMITTED, RetryState(polls=1), after_s=-HOUR), Leave)
    gone = RetryState(not_found=3, poll_failures=3)
    assert isinstance(following(State.SUBMITTED, gone, after_s=-HOUR), Leave)


# -- files ------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", sorted(set(State) - {State.STORED}))
def test_a_file_under_a_requests_own_name_is_verified_first(state: State) -> None:
    assert following(state, RetryState(file="images/a.png")) == Adopt("images/a.png")


@pytest.mark.parametrize("code", sorted(REJECTED))
def test_a_rejected_image_is_fetched_again_only_on_request_and_by_a_new_link(code: str) -> None:
    assert isinstance(following(State.COMPLETED, error_code=code), Leave)
    wished = Policy(retry_codes=frozenset({code}))
    assert following(State.COMPLETED, error_code=code, policy=wished) == Poll()
    assert following(State.COMPLETED, RetryState(polls=1), policy=wished) == Fetch()
    in_vain = RetryState(poll_failures=wished.relink_tries)
    assert isinstance(following(State.COMPLETED, in_vain, error_code=code, policy=wished), Leave)


def test_a_first_post_whose_key_another_purchase_has_is_sent_under_the_next_key() -> None:
    assert following(State.REFUSED, error_code=CONFLICT, submissions=1) == Requeue()
    assert following(State.REFUSED, error_code=CONFLICT, submissions=20) == DONE


# -- fetching ---------------------------------------------------------------------------------


def test_a_finished_image_without_a_valid_link_gets_a_fresh_one() -> None:
    assert following(State.COMPLETED, result_url=None) == Poll()
    assert following(State.COMPLETED, RetryState(stale_link=True, fetch_failures=1)) == Poll()


def test_an_image_that_cannot_be_fetched_keeps_its_link_for_the_next_run() -> None:
    assert following(State.COMPLETED, RetryState(fetch_failures=11)) == Fetch()
    action = following(State.COMPLETED, RetryState(fetch_failures=12))
    assert action == Leave("not stored after 12 tries; its link is kept")


def test_dead_links_are_given_up_only_after_the_day_that_they_are_promised_for() -> None:
    dead = RetryState(fetch_failures=12, link_dead=True)
    assert isinstance(following(State.COMPLETED, dead, after_s=24 * HOUR), Leave)
    action = following(State.COMPLETED, dead, after_s=24 * HOUR + 1)
    assert action == Expire("link_dead", "its links are dead, and a fresh one was dead too")


def test_other_download_failures_never_give_an_image_up() -> None:
    action = following(State.COMPLETED, RetryState(fetch_failures=12), after_s=1000 * HOUR)
    assert isinstance(action, Leave)


def test_an_image_is_lost_when_its_link_is_dead_and_its_task_is_gone() -> None:
    gone = RetryState(link_dead=True, stale_link=True, not_found=3, poll_failures=3)
    assert following(State.COMPLETED, gone, after_s=24 * HOUR) == Poll()
    action = following(State.COMPLETED, gone, after_s=24 * HOUR + 1)
    assert action == Expire("task_not_found", "its link is dead and its task is not known any more")


def test_a_task_that_is_gone_does_not_give_up_a_link_that_is_not_known_to_be_dead() -> None:
    action = following(State.COMPLETED, RetryState(stale_link=True, not_found=4, poll_failures=4))
    assert isinstance(action, Leave)


def test_an_image_that_was_found_without_a_purchase_and_is_gone_is_lost() -> None:
    action = following(State.COMPLETED, submission=0, task_id=None, result_url=None)
    assert isinstance(action, Expire)
    assert "its purchase is not known" in action.message


# -- failed tasks -----------------------------------------------------------------------------


@pytest.mark.parametrize("code", REPEATABLE_TASK_ERRORS)
def test_a_task_error_that_may_pass_is_planned_again(code: str) -> None:
    assert following(State.FAILED, error_code=code) == Requeue()


@pytest.mark.parametrize(
    "code",
    [
        "content_policy_violation",
        "invalid_parameters",
        "image_processing_error",
        "image_dimension_mismatch",
        "request_cancelled",
        "resource_not_found",
        "unknown_error",
        "engine_misaligned",
        None,
    ],
)
def test_any_other_task_error_is_final(code: str | None) -> None:
    assert following(State.FAILED, error_code=code) == DONE


def test_a_run_buys_a_failing_request_three_times_at_most() -> None:
    assert following(State.FAILED, RetryState(task_failures=2), error_code="service_error") == (
        Requeue()
    )
    assert following(State.FAILED, RetryState(task_failures=3), error_code="service_error") == DONE


def test_a_failed_task_is_not_planned_again_once_buying_has_stopped() -> None:
    assert following(State.FAILED, error_code="service_error", buying=False) == DONE


# -- pauses -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("tries", "longest_s"), [(1, 0.5), (2, 1.0), (5, 8.0), (50, 60.0)])
def test_pauses_double_with_jitter_up_to_a_bound(tries: int, longest_s: float) -> None:
    assert backoff_s(tries, 1.0, POLICY) == longest_s
    assert backoff_s(tries, 0.0, POLICY) == longest_s / 2


@given(tries=st.integers(0, 100_000), fraction=st.floats(0, 1), asked_s=st.floats(0, 3600))
def test_a_pause_requested_by_the_server_is_always_kept(
    tries: int, fraction: float, asked_s: float
) -> None:
    hurried = replace(POLICY, wait_scale=0.001)
    assert backoff_s(tries, fraction, hurried, at_least_s=asked_s) >= asked_s


@pytest.mark.parametrize("code", REPEATABLE_TASK_ERRORS)
def test_a_failed_task_is_repeated_after_the_documented_pause(code: str) -> None:
    low_s, high_s = REPEATABLE_TASK_ERRORS[code]
    assert task_error_wait_s(code, 0.0, POLICY) == low_s
    assert task_error_wait_s(code, 1.0, POLICY) == high_s


# -- everything -------------------------------------------------------------------------------

COUNTS = st.integers(0, 40)
TIMES = st.one_of(st.none(), st.timedeltas(timedelta(days=-400), timedelta(days=400)))
TRAILS = st.builds(
    RetryState,
    polls=COUNTS,
    task_failures=COUNTS,
    submit_failures=COUNTS,
    poll_failures=COUNTS,
    not_found=COUNTS,
    fetch_failures=COUNTS,
    stale_link=st.booleans(),
    link_dead=st.booleans(),
    leave_reason=st.none() | st.text(min_size=1),
)


@given(
    state=st.sampled_from(State),
    retry=TRAILS,
    sent=TIMES,
    submitted=TIMES,
    completed=TIMES,
    link=st.none() | st.just("https://x/y"),
    code=st.none() | st.text() | st.sampled_from(sorted(REPEATABLE_TASK_ERRORS)),
    on_unknown=st.sampled_from(["replay", "hold"]),
    buying=st.booleans(),
)
def test_every_state_and_history_has_a_next_step_and_none_buys_against_the_rules(
    *,
    state: State,
    retry: RetryState,
    sent: timedelta | None,
    submitted: timedelta | None,
    completed: timedelta | None,
    link: str | None,
    code: str | None,
    on_unknown: Any,
    buying: bool,
) -> None:
    present = record(
        state,
        sent_at=sent and NOW - sent,
        submitted_at=submitted and NOW - submitted,
        completed_at=completed and NOW - completed,
        result_url=link,
        error_code=code,
    )
    policy = replace(POLICY, on_unknown=on_unknown)
    action = next_action(present, retry, NOW, policy, buying=buying)
    if isinstance(action, Submit):
        assert buying
        assert state in (State.PLANNED, State.DEFERRED)
    if isinstance(action, Replay):
        assert buying
        assert on_unknown == "replay"
        assert sent is not None
        assert timedelta(minutes=-5) <= sent <= timedelta(hours=23)
    if isinstance(action, Fetch):
        assert link is not None
    if isinstance(action, Expire):
        assert state in (State.SUBMITTED, State.COMPLETED)
    if action == DONE:
        assert state in (State.STORED, State.FAILED, State.REFUSED, State.EXPIRED)

"""Error and history to the next step: submit, poll, fetch, wait, or leave. Pure.

Three worlds of retry, never mixed: a *submit* is repeated under a new Idempotency-Key only if
certainly nothing was created, and under the same key if that is not certain; a *poll* and a
*fetch* are repeated freely, because they cost nothing. Deadlines count from the submission, not
from the run, and end in ``Leave``: the request keeps its state, and the next run goes on with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from types import MappingProxyType
from typing import Final, Literal, TypeAlias

from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import is_task_id

OnUnknown: TypeAlias = Literal["replay", "hold"]

# Codes that end the buying of a run.

#: The API stayed away.
API_AWAY: Final = "api_away"
#: The server answered every POST with 429.
RATE_LIMITED: Final = "turned_away"
#: No purchase got a usable answer.
NO_USABLE_ANSWER: Final = "no_usable_answer"
#: The server knows none of the tasks: the API key may be another account's.
TASKS_NOT_FOUND: Final = "tasks_not_found"
#: Several prices in a row were implausible.
PRICE_DOUBTED: Final = "price_doubted"

# Codes of requests.

#: A first POST whose Idempotency-Key another purchase has: it created nothing, and the next one has
#: another key.
CONFLICT: Final = "idempotency_conflict"
#: An image whose task is known, and whose links are dead.
LINK_DEAD: Final = "link_dead"
#: Images that were fetched completely and are not what was requested. They are kept, and would come
#: again as they are.
REJECTED: Final = frozenset({"wrong_size", "wrong_format", "flat_image", "animated"})

#: Task errors that may pass, with the seconds to wait, from and to. EvoLink documents 30–60 s for
#: service_error and 1–5 min for resource_exhausted; the others are like one or the other. Every
#: other code is final: an identical request would fail again.
REPEATABLE_TASK_ERRORS: Final[Mapping[str, tuple[float, float]]] = MappingProxyType(
    {
        "service_error": (30.0, 60.0),
        "generation_timeout": (30.0, 60.0),
        "service_unavailable": (30.0, 60.0),
        "generation_failed_no_content": (1.0, 5.0),
        "resource_exhausted": (60.0, 300.0),
        "quota_exceeded": (60.0, 300.0),
    }
)

#: How far a time may be ahead of this clock and still count as now, in seconds.
_CLOCK_SKEW_S: Final = 300.0


@dataclass(frozen=True)
class Policy:
    """What is done about failures.

    Attributes:
        on_unknown: What is done about a purchase whose outcome is unknown.
        patience_s: How long after its submission a task is waited for.
        replay_for_s: How long a repeat with the same Idempotency-Key is trusted to buy nothing;
            EvoLink's client trusts it for 23 hours.
        link_life_s: How long a result link is promised to live.
        gone_after_s: How old a task must be before it can count as gone. A younger one is not found
            *yet*.
        gone_reads: How many reads in a row must not find it.
        gone_pause_s: The pause between these reads.
        lost_for_s: How long after its purchase a task that was given up as lost is read again.
        revive: Read every task again that was given up as lost.
        account_keys: Fingerprints of this account's API keys: a purchase with another key is
            neither repeated nor given up. Empty if not known.
        backoff_s: The first pause after a failure; it doubles up to ``backoff_max_s``.
        wait_scale: Multiplies every pause between tries.
        retry_codes: Error codes of failed and refused requests that a person wants bought again.
        silence_tries: Purchases in a row without a usable answer after which the run slows down.
        outage_patience_s: How long the API, the journal or the storage root may be away before the
            run ends.
        grace_s: How long a stop waits for the answer to a POST under way, so that its task id is
            not lost.
        wait: Whether the run waits for the tasks that it has submitted. If not, it leaves them to a
            later run, and reads only those of earlier runs that have probably ended.
        task_error_waits: Task errors that are bought again, with the seconds to wait, from and to.
    """

    on_unknown: OnUnknown = "replay"
    patience_s: float = 1800.0
    replay_for_s: float = 23 * 3600.0
    link_life_s: float = 24 * 3600.0
    submit_tries: int = 8
    replay_tries: int = 12
    task_tries: int = 3
    poll_tries: int = 20
    relink_tries: int = 4
    fetch_tries: int = 12
    gone_after_s: float = 24 * 3600.0
    lost_for_s: float = 7 * 24 * 3600.0
    conflict_tries: int = 20
    account_keys: frozenset[str] = frozenset()
    gone_reads: int = 3
    backoff_s: float = 0.5
    backoff_max_s: float = 60.0
    wait_scale: float = 1.0
    retry_codes: frozenset[str] = frozenset()
    revive: bool = False
    gone_pause_s: float = 15.0
    silence_tries: int = 5
    outage_patience_s: float = 300.0
    grace_s: float = 10.0
    wait: bool = True
    task_error_waits: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: REPEATABLE_TASK_ERRORS
    )


@dataclass
class RetryState:
    """What a run has seen of one request and the journal need not keep.

    Attributes:
        polls: Reads of its task that succeeded.
        task_failures: Tasks of this run that failed.
        submit_failures: POSTs in a row without progress.
        poll_failures: Reads in a row that failed.
        not_found: Reads in a row that did not find the task.
        fetch_failures: Failed downloads, over all links.
        stale_link: A fresh link is needed before the next fetch.
        link_dead: The last fetch found the link dead.
        retried: It was bought again because of ``Policy.retry_codes``.
        replay_decided: A person has decided to repeat its POST.
        worth_polling: Its task, of an earlier run, has probably ended.
        waited: The pause before a failed task's request is bought again is over.
        revived: Its task was given up as lost before.
        file: A file in the storage root that may be its image.
        elsewhere: Other storage roots that hold its image.
        leave_reason: A reason, found in this run, to leave the request.
    """

    polls: int = 0
    task_failures: int = 0
    submit_failures: int = 0
    poll_failures: int = 0
    not_found: int = 0
    fetch_failures: int = 0
    stale_link: bool = False
    link_dead: bool = False
    retried: bool = False
    replay_decided: bool = False
    worth_polling: bool = False
    waited: bool = False
    revived: bool = False
    file: str | None = None
    elsewhere: tuple[str, ...] = ()
    leave_reason: str | None = None


@dataclass(frozen=True)
class Submit:
    """POST it under a new Idempotency-Key."""


@dataclass(frozen=True)
class Replay:
    """POST it again under the Idempotency-Key and with the body of the first try."""


@dataclass(frozen=True)
class MarkUnknown:
    """Record that its outcome is unknown: an intent without an answer, or an invalid task id."""

    code: str
    message: str


@dataclass(frozen=True)
class Adopt:
    """Verify the file under its name, and record it as its image."""

    name: str


@dataclass(frozen=True)
class Poll:
    """Read its task."""


@dataclass(frozen=True)
class Fetch:
    """Download its image."""


@dataclass(frozen=True)
class Expire:
    """Record that it is paid and lost."""

    code: str
    message: str


@dataclass(frozen=True)
class Requeue:
    """Put it back to planned: its task failed, cost nothing, and may succeed."""


@dataclass(frozen=True)
class Leave:
    """Nothing more to do in this run. ``reason`` is empty if the request is finished."""

    reason: str = ""


Action: TypeAlias = Submit | Replay | MarkUnknown | Adopt | Poll | Fetch | Expire | Requeue | Leave

DONE: Final = Leave()

#: Why a run that does not wait leaves what it has bought.
LEFT_AT_SERVER: Final = "at the server: a later run collects it"


def next_action(
    record: Record, retry: RetryState, now: datetime, policy: Policy, *, buying: bool
) -> Action:
    """Return what to do next for a request, in any state.

    ``buying`` is false once the account or a cap has stopped this run's purchases.
    """
    if retry.leave_reason is not None:
        return Leave(retry.leave_reason)
    if retry.file is not None and record.state is not State.STORED:
        return Adopt(retry.file)
    match record.state:
        case State.PLANNED | State.DEFERRED:
            return _to_buy(retry, policy, buying=buying)
        case State.SUBMITTING:
            return MarkUnknown("no_answer_written", "a run ended between its POST and the answer")
        case State.UNKNOWN:
            return _unknown(record, retry, now, policy, buying=buying)
        case State.SUBMITTED:
            return _submitted(record, retry, now, policy)
        case State.COMPLETED:
            return _completed(record, retry, now, policy)
        case _:
            return _ended(record, retry, now, policy, buying=buying)


def _ended(
    record: Record, retry: RetryState, now: datetime, policy: Policy, *, buying: bool
) -> Action:
    if record.state in (State.FAILED, State.REFUSED):
        return Requeue() if buying and _worth_another_try(record, retry, policy) else DONE
    if record.state is State.EXPIRED and _may_be_back(record, retry, now, policy):
        return Poll()
    return DONE


def _may_be_back(record: Record, retry: RetryState, now: datetime, policy: Policy) -> bool:
    """Whether to read a task once that was given up as lost: a read costs nothing."""
    if record.task_id is None or retry.polls or retry.poll_failures:
        return False
    if record.error_code == LINK_DEAD and not policy.revive:
        return False  # the task is known, and its links are not coming back
    age_s = _age_s(record.sent_at, now)
    return policy.revive or age_s is None or age_s <= policy.lost_for_s


def _of_another_account(record: Record, policy: Policy) -> bool:
    return bool(policy.account_keys) and record.api_key not in {None, *policy.account_keys}


def _worth_another_try(record: Record, retry: RetryState, policy: Policy) -> bool:
    code = record.error_code or ""
    if code in policy.retry_codes and not retry.retried:
        return True
    if record.state is State.REFUSED and code == CONFLICT:
        return record.submissions < policy.conflict_tries
    repeatable = record.state is State.FAILED and code in policy.task_error_waits
    # Runs that do not wait see one failure each.
    tries = retry.task_failures if policy.wait else record.submissions
    return repeatable and tries < policy.task_tries


def _to_buy(retry: RetryState, policy: Policy, *, buying: bool) -> Action:
    if not buying:
        return Leave("not bought: this run has stopped buying")
    if retry.submit_failures >= policy.submit_tries:
        return Leave(f"not accepted in {retry.submit_failures} tries; nothing was bought")
    return Submit()


def _unknown(
    record: Record, retry: RetryState, now: datetime, policy: Policy, *, buying: bool
) -> Action:
    if _of_another_account(record, policy):
        return Leave(
            f"outcome unknown, sent with another API key (fingerprint {record.api_key}): only a "
            "run with that key repeats it; `krea-dagster accept key` says that both keys are of "
            "one account"
        )
    if retry.replay_decided and buying and retry.submit_failures < policy.replay_tries:
        return Replay()
    if policy.on_unknown == "hold":
        return Leave("outcome unknown, policy hold: a person decides")
    age_s = _age_s(record.sent_at, now)
    if age_s is None:
        return Leave(
            "outcome unknown, first try at a time that is ahead of this clock: a person decides"
        )
    if age_s > policy.replay_for_s:
        hours = f"{policy.replay_for_s / 3600:g}"
        return Leave(f"outcome unknown, first try over {hours} hours ago: a person decides")
    if not buying:
        return Leave("outcome unknown, and this run has stopped buying")
    if retry.submit_failures >= policy.replay_tries:
        return Leave(f"outcome still unknown after {retry.submit_failures} tries")
    return Replay()


def _submitted(record: Record, retry: RetryState, now: datetime, policy: Policy) -> Action:
    if not is_task_id(record.task_id or ""):
        return MarkUnknown("no_task_id", f"{record.task_id!r} cannot be a task's id")
    age_s = _age_s(record.submitted_at or now, now)
    if retry.not_found and _of_another_account(record, policy):
        return Leave(
            f"not found with this API key: it was bought with another one (fingerprint "
            f"{record.api_key}), and a run with that one finds it"
        )
    if retry.not_found >= policy.gone_reads:
        if age_s is not None and age_s >= policy.gone_after_s:
            return Expire("task_not_found", "the server does not know the task any more")
        return Leave("the server does not know its task yet: the next run reads it again")
    if retry.poll_failures >= policy.poll_tries:
        return Leave(f"detached: no usable answer to {retry.poll_failures} reads of its task")
    if not policy.wait and (retry.polls > 0 or not retry.worth_polling):
        return Leave(LEFT_AT_SERVER)
    # Read at least once, so that a run which comes after the deadline still collects it.
    if retry.polls > 0 and age_s is None:
        return Leave("detached: not finished, and submitted at a time that is ahead of this clock")
    if retry.polls > 0 and age_s is not None and age_s > policy.patience_s:
        return Leave(f"detached: not finished {age_s:.0f} s after its submission")
    return Poll()


def _completed(record: Record, retry: RetryState, now: datetime, policy: Policy) -> Action:
    age_s = _age_s(record.completed_at or now, now)
    if record.submission == 0:
        return Expire(
            "file_missing",
            "its file was found in the storage root and is gone, and its purchase is not known",
        )
    code = record.error_code or ""
    rejected = code in REJECTED and not retry.polls
    if rejected and code not in policy.retry_codes:
        return Leave(f"not stored: {record.error_message}")
    old = (
        age_s is not None and age_s > policy.link_life_s and not _of_another_account(record, policy)
    )
    if retry.link_dead and retry.not_found >= policy.gone_reads and old:
        return Expire("task_not_found", "its link is dead and its task is not known any more")
    if retry.fetch_failures >= (2 if retry.revived else policy.fetch_tries):
        if retry.link_dead and old:
            return Expire(LINK_DEAD, "its links are dead, and a fresh one was dead too")
        return Leave(f"not stored after {retry.fetch_failures} tries; its link is kept")
    if retry.poll_failures >= policy.relink_tries:
        return Leave(f"not stored: no fresh link in {retry.poll_failures} reads of its task")
    # By the same link a rejected file would come again as it is.
    if record.result_url is None or retry.stale_link or rejected:
        return Poll()
    return Fetch()


def backoff_s(
    failures: int, fraction: float, policy: Policy, *, at_least_s: float | None = None
) -> float:
    """Return the seconds to pause after failures in a row: doubling, jittered, bounded.

    ``fraction`` is a random number from 0 to 1. ``at_least_s`` is a pause that the server asked for
    (Retry-After) or documents, and is always kept.
    """
    doubled = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** min(60, max(0, failures - 1)))
    pause_s = doubled * (0.5 + fraction / 2) * policy.wait_scale
    return max(pause_s, at_least_s or 0.0)


def task_error_wait_s(code: str, fraction: float, policy: Policy) -> float:
    """Return the seconds before a failed task's request may be bought again."""
    low_s, high_s = policy.task_error_waits.get(code, (0.0, 0.0))
    return (low_s + fraction * (high_s - low_s)) * policy.wait_scale


def _age_s(since: datetime | None, now: datetime) -> float | None:
    """Return the seconds since a time, None if it is not known or ahead of this clock."""
    if since is None:
        return None
    age_s = (now - since) / timedelta(seconds=1)
    return None if age_s < -_CLOCK_SKEW_S else max(0.0, age_s)

"""Error and history to the next step: submit, ask, fetch, wait, or leave. Pure.

Three worlds of retry, never mixed: a *submit* is repeated under a new Idempotency-Key only
where certainly nothing was created, and under the same key where that is not certain; an *ask*
and a *fetch* are repeated freely, because they cost nothing. Deadlines count from the
submission, not from the run, and end in ``Leave``: the request keeps its state, and the next
run takes it up again.
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

#: The code of a first POST whose Idempotency-Key another purchase has: it created nothing, and the
#: next one has another key.
CONFLICT: Final = "idempotency_conflict"

#: The code of an image whose task is known, and whose links are dead.
LINK_DEAD: Final = "link_dead"

#: By how much a time may lie ahead of this clock and be taken for now.
_CLOCKS_S: Final = 300.0

#: Codes of images that were fetched whole and are not what was asked for. They are kept, and would
#: come again as they are.
REJECTED: Final = frozenset({"wrong_size", "wrong_format", "flat_image", "animated"})

#: Task errors that may go away on their own, with the seconds to wait, from and to. EvoLink
#: documents 30–60 s for service_error and 1–5 min for resource_exhausted; the others are like
#: one or the other. Every other code is final: repeating it as it is would fail again.
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


@dataclass(frozen=True)
class Policy:
    """What is done about failures. Seconds throughout.

    ``patience_s``: how long after its submission a task is waited for before the run detaches from
    it. ``replay_for_s``: how long a repeat with the same Idempotency-Key is trusted to buy nothing;
    EvoLink's client trusts it for 23 hours. ``link_life_s``: how long a result link is promised to
    live. ``wait_scale`` multiplies every pause between tries. ``ask_again`` are error codes of
    failed and refused requests that a person wants to be asked for again. ``revive`` asks once more
    about every task that was given up as lost; else only about those of the last ``lost_for_s``.
    ``gone_after_s``, ``gone_reads`` and ``gone_pause_s``: how old a task must be, and how many
    reads that far apart must not find it, before it counts as gone; a younger one is not found
    *yet*. ``account_keys`` are the fingerprints of this account's API keys: what was bought with
    another key is neither repeated nor given up. Empty: not known. ``silence_tries``: purchases in
    a row without a usable answer after which the run slows down. ``outage_patience_s``: how long
    the API, the journal's database or the storage root may be away before the run ends.
    ``grace_s``: how long a stop waits for the answer to a POST that has left, so that its task id
    is not lost. ``wait``: whether the run waits for the tasks that it has submitted; else it leaves
    them to a later run, and asks only about those of earlier ones that have probably ended.
    """

    on_unknown: OnUnknown = "replay"
    patience_s: float = 1800.0
    replay_for_s: float = 23 * 3600.0
    link_life_s: float = 24 * 3600.0
    submit_tries: int = 8
    replay_tries: int = 12
    task_tries: int = 3
    ask_tries: int = 20
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
    ask_again: frozenset[str] = frozenset()
    revive: bool = False
    gone_pause_s: float = 15.0
    silence_tries: int = 5
    outage_patience_s: float = 300.0
    grace_s: float = 10.0
    wait: bool = True
    task_error_waits: Mapping[str, tuple[float, float]] = field(
        default_factory=lambda: REPEATABLE_TASK_ERRORS
    )


@dataclass(frozen=True)
class Trail:
    """What this run has seen of one request and the journal need not keep.

    ``task_failures`` counts this run's tasks that failed. ``submit_failures``,
    ``ask_failures`` and ``not_found`` count consecutive tries without progress.
    ``fetch_failures`` counts over all links. ``stale_link`` asks for a fresh link
    before the next fetch; ``link_dead`` says that the last fetch found the link dead.
    ``asked_again`` and ``replay_decided`` say that a person's wish was followed in this run.
    ``worth_asking`` says that its task, of an earlier run, has probably ended.
    ``waited``: the pause before a failed task's request is bought again is over. ``revived``: its
    task was given up as lost before. ``file`` is the name of a file in the storage root that may be
    its image, ``elsewhere`` are other roots that hold it.
    ``final`` is a reason, found in this run, to leave the request alone.
    """

    asks: int = 0
    task_failures: int = 0
    submit_failures: int = 0
    ask_failures: int = 0
    not_found: int = 0
    fetch_failures: int = 0
    stale_link: bool = False
    link_dead: bool = False
    asked_again: bool = False
    replay_decided: bool = False
    worth_asking: bool = False
    waited: bool = False
    revived: bool = False
    file: str | None = None
    elsewhere: tuple[str, ...] = ()
    final: str | None = None


@dataclass(frozen=True)
class Submit:
    """POST it under a new Idempotency-Key."""


@dataclass(frozen=True)
class Replay:
    """POST it again under the Idempotency-Key and with the body of the first try."""


@dataclass(frozen=True)
class MarkUnknown:
    """Record that its outcome is unknown: an intent without an answer, or an id of no task."""

    code: str
    message: str


@dataclass(frozen=True)
class Adopt:
    """Verify the file that lies under its name, and take it for its image."""

    name: str


@dataclass(frozen=True)
class Ask:
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
class PlanAgain:
    """Its task failed, cost nothing, and may succeed: put it back to planned."""


@dataclass(frozen=True)
class Leave:
    """Nothing more to do in this run. ``reason`` is empty where the request is finished."""

    reason: str = ""


Action: TypeAlias = Submit | Replay | MarkUnknown | Adopt | Ask | Fetch | Expire | PlanAgain | Leave

DONE: Final = Leave()

#: Why a run that does not wait leaves what it has bought.
LEFT_AT_SERVER: Final = "at the server: a later run collects it"


def next_action(
    record: Record, trail: Trail, now: datetime, policy: Policy, *, buying: bool
) -> Action:
    """What to do next for a request.

    ``buying`` is false once the account or a cap has stopped this run's purchases. Never
    raises; every state has an answer.
    """
    if trail.final is not None:
        return Leave(trail.final)
    if trail.file is not None and record.state is not State.STORED:
        return Adopt(trail.file)
    match record.state:
        case State.PLANNED | State.DEFERRED:
            return _to_buy(trail, policy, buying=buying)
        case State.SUBMITTING:
            return MarkUnknown("no_answer_written", "a run ended between its POST and the answer")
        case State.UNKNOWN:
            return _unknown(record, trail, now, policy, buying=buying)
        case State.SUBMITTED:
            return _submitted(record, trail, now, policy)
        case State.COMPLETED:
            return _completed(record, trail, now, policy)
        case _:
            return _ended(record, trail, now, policy, buying=buying)


def _ended(record: Record, trail: Trail, now: datetime, policy: Policy, *, buying: bool) -> Action:
    if record.state in (State.FAILED, State.REFUSED):
        return PlanAgain() if buying and _worth_another_try(record, trail, policy) else DONE
    if record.state is State.EXPIRED and _may_be_back(record, trail, now, policy):
        return Ask()
    return DONE


def _may_be_back(record: Record, trail: Trail, now: datetime, policy: Policy) -> bool:
    """Whether to ask once about a task that was given up as lost: asking costs nothing."""
    if record.task_id is None or trail.asks or trail.ask_failures:
        return False
    if record.error_code == LINK_DEAD and not policy.revive:
        return False  # the task is known, and its links are not coming back
    age_s = _age_s(record.sent_at, now)
    return policy.revive or age_s is None or age_s <= policy.lost_for_s


def _of_another_account(record: Record, policy: Policy) -> bool:
    return bool(policy.account_keys) and record.api_key not in {None, *policy.account_keys}


def _worth_another_try(record: Record, trail: Trail, policy: Policy) -> bool:
    code = record.error_code or ""
    if code in policy.ask_again and not trail.asked_again:
        return True
    if record.state is State.REFUSED and code == CONFLICT:
        return record.submissions < policy.conflict_tries
    repeatable = record.state is State.FAILED and code in policy.task_error_waits
    # Runs that do not wait see one failure each.
    tries = trail.task_failures if policy.wait else record.submissions
    return repeatable and tries < policy.task_tries


def _to_buy(trail: Trail, policy: Policy, *, buying: bool) -> Action:
    if not buying:
        return Leave("not bought: this run has stopped buying")
    if trail.submit_failures >= policy.submit_tries:
        return Leave(f"not taken in {trail.submit_failures} tries; nothing was bought")
    return Submit()


def _unknown(
    record: Record, trail: Trail, now: datetime, policy: Policy, *, buying: bool
) -> Action:
    if _of_another_account(record, policy):
        return Leave(
            f"outcome unknown, sent with another API key (fingerprint {record.api_key}): it is "
            "repeated with that one alone; `krea-dagster accept key` says that both are of one "
            "account"
        )
    if trail.replay_decided and buying and trail.submit_failures < policy.replay_tries:
        return Replay()
    if policy.on_unknown == "hold":
        return Leave("outcome unknown, policy hold: a person decides")
    age_s = _age_s(record.sent_at, now)
    if age_s is None:
        return Leave(
            "outcome unknown, first try at a time that this clock has not reached: a person decides"
        )
    if age_s > policy.replay_for_s:
        hours = f"{policy.replay_for_s / 3600:g}"
        return Leave(f"outcome unknown, first try over {hours} hours ago: a person decides")
    if not buying:
        return Leave("outcome unknown, and this run has stopped buying")
    if trail.submit_failures >= policy.replay_tries:
        return Leave(f"outcome still unknown after {trail.submit_failures} tries")
    return Replay()


def _submitted(record: Record, trail: Trail, now: datetime, policy: Policy) -> Action:
    if not is_task_id(record.task_id or ""):
        return MarkUnknown("no_task_id", f"{record.task_id!r} cannot be a task's id")
    age_s = _age_s(record.submitted_at or now, now)
    if trail.not_found and _of_another_account(record, policy):
        return Leave(
            f"not found with this API key: it was bought with another one (fingerprint "
            f"{record.api_key}), and a run with that one finds it"
        )
    if trail.not_found >= policy.gone_reads:
        if age_s is not None and age_s >= policy.gone_after_s:
            return Expire("task_not_found", "the server does not know the task any more")
        return Leave("the server does not know its task yet: the next run asks again")
    if trail.ask_failures >= policy.ask_tries:
        return Leave(f"detached: no usable answer to {trail.ask_failures} reads of its task")
    if not policy.wait and (trail.asks > 0 or not trail.worth_asking):
        return Leave(LEFT_AT_SERVER)
    # Asked at least once, so that a run which comes after the deadline still collects it.
    if trail.asks > 0 and age_s is None:
        return Leave(
            "detached: not finished, and submitted at a time that this clock has not reached"
        )
    if trail.asks > 0 and age_s is not None and age_s > policy.patience_s:
        return Leave(f"detached: not finished {age_s:.0f} s after its submission")
    return Ask()


def _completed(record: Record, trail: Trail, now: datetime, policy: Policy) -> Action:
    age_s = _age_s(record.completed_at or now, now)
    if record.submission == 0:
        return Expire(
            "file_missing",
            "its file was found in the storage root and is gone, and its purchase is not known",
        )
    code = record.error_code or ""
    rejected = code in REJECTED and not trail.asks
    if rejected and code not in policy.ask_again:
        return Leave(f"not stored: {record.error_message}")
    old = (
        age_s is not None and age_s > policy.link_life_s and not _of_another_account(record, policy)
    )
    if trail.link_dead and trail.not_found >= policy.gone_reads and old:
        return Expire("task_not_found", "its link is dead and its task is not known any more")
    if trail.fetch_failures >= (2 if trail.revived else policy.fetch_tries):
        if trail.link_dead and old:
            return Expire(LINK_DEAD, "its links are dead, and a fresh one was dead too")
        return Leave(f"not stored after {trail.fetch_failures} tries; its link is kept")
    if trail.ask_failures >= policy.relink_tries:
        return Leave(f"not stored: no fresh link in {trail.ask_failures} reads of its task")
    # By the same link a rejected file would come again as it is.
    if record.result_url is None or trail.stale_link or rejected:
        return Ask()
    return Fetch()


def backoff_s(
    tries: int, fraction: float, policy: Policy, *, at_least_s: float | None = None
) -> float:
    """Seconds to pause after ``tries`` failures in a row: doubling, jittered, bounded.

    ``fraction`` is a random number from 0 to 1. ``at_least_s`` is what the server asked for
    (Retry-After) or its documentation says, and is always honoured.
    """
    doubled = min(policy.backoff_max_s, policy.backoff_s * 2.0 ** min(60, max(0, tries - 1)))
    pause_s = doubled * (0.5 + fraction / 2) * policy.wait_scale
    return max(pause_s, at_least_s or 0.0)


def task_error_wait_s(code: str, fraction: float, policy: Policy) -> float:
    """Seconds before a failed task's request may be bought again, by the task's error code."""
    low_s, high_s = policy.task_error_waits.get(code, (0.0, 0.0))
    return (low_s + fraction * (high_s - low_s)) * policy.wait_scale


def _age_s(since: datetime | None, now: datetime) -> float | None:
    """Seconds since a time. None where that is not known: it lies ahead of this clock."""
    if since is None:
        return None
    age_s = (now - since) / timedelta(seconds=1)
    return None if age_s < -_CLOCKS_S else max(0.0, age_s)

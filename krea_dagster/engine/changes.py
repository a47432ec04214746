"""What an event writes: the columns that it sets in each of the journal's tables. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any, Final

from krea_dagster.engine.record import idempotency_key
from krea_dagster.engine.states import Event, State, advance
from krea_dagster.errors import IllegalTransition, JournalError, TakenOver


@dataclass(frozen=True)
class Change:
    """One event of one request, with the columns that it sets.

    ``values`` may hold exactly the columns that ``_COLUMNS`` names for the event; ``data`` is
    kept with the event as it is, for whoever asks later.
    """

    request_key: str
    event: Event
    at: datetime
    values: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] | None = None


_ERROR: Final = frozenset({"error_code", "error_message"})
_IMAGE: Final = frozenset(
    {"image_path", "image_sha256", "image_bytes", "image_format", "width", "height"}
)

#: The columns of ``requests`` and of ``submissions`` that each event may set.
_COLUMNS: Final[Mapping[Event, tuple[frozenset[str], frozenset[str]]]] = {
    Event.PLANNED: (frozenset(), frozenset()),
    Event.SUBMITTING: (frozenset(), frozenset({"partition_key"})),
    Event.REPLAYING: (frozenset(), frozenset()),
    Event.ACCEPTED: (
        frozenset(),
        frozenset({"task_id", "reserved_units", "billing_rule", "user_group"}),
    ),
    Event.TURNED_AWAY: (_ERROR, frozenset()),
    Event.REFUSED: (_ERROR, frozenset({"charged_units"})),
    Event.DEFERRED: (_ERROR, frozenset()),
    Event.OUTCOME_UNKNOWN: (_ERROR, frozenset()),
    Event.RELEASED: (frozenset(), frozenset()),
    Event.COMPLETED: (frozenset({"result_url"}), frozenset({"charged_units"})),
    Event.FAILED: (_ERROR, frozenset({"charged_units"})),
    Event.STORED: (_IMAGE, frozenset()),
    Event.NOT_STORED: (_ERROR, frozenset()),
    Event.FILE_MISSING: (frozenset(), frozenset()),
    Event.EXPIRED: (_ERROR, frozenset()),
}

#: What an event sets to nothing or to its own time, beside the columns that it is given.
_CLEARS: Final[Mapping[Event, tuple[str, ...]]] = {
    Event.PLANNED: ("idempotency_key", "result_url", "completed_at", *sorted(_ERROR)),
    Event.ACCEPTED: tuple(sorted(_ERROR)),
    Event.COMPLETED: tuple(sorted(_ERROR)),
    Event.STORED: tuple(sorted(_ERROR)),
    Event.FILE_MISSING: (*sorted(_IMAGE), "stored_at"),
}


@dataclass(frozen=True)
class Present:
    """What a change is checked against: the request, and its present submission.

    ``committed_units`` is what that submission counts under the caps, ``expected_units`` what
    it was expected to cost, ``bought_by`` its run and ``sent_at`` the time of its intent.
    """

    state: State
    seq: int
    claimed_by: str | None
    idempotency_key: str | None
    last_submission: int
    quality: str = ""
    committed_units: int = 0
    expected_units: int = 0
    bought_by: str = ""
    sent_at: datetime | None = None


@dataclass(frozen=True)
class Step:
    """One legal change, and what it leaves behind."""

    change: Change
    before: Present
    after: Present

    @property
    def opens_submission(self) -> bool:
        """Whether this is the intent of a purchase under a new Idempotency-Key."""
        return self.change.event is Event.SUBMITTING and self.before.idempotency_key is None


def check(change: Change, present: Present | None, owner: str) -> Step:
    """The step that a change makes from the present state.

    Raises IllegalTransition where the state machine does not know it, TakenOver where another
    owner holds the request, and JournalError where the request is not known at all.
    """
    if present is None:
        raise JournalError(f"request {change.request_key} is not in the journal")
    if present.claimed_by != owner:
        raise TakenOver(f"request {change.request_key} was taken over by another run")
    allowed = _COLUMNS[change.event]
    if unknown := set(change.values) - allowed[0] - allowed[1]:
        raise IllegalTransition(f"{change.event.value} does not set {', '.join(sorted(unknown))}")
    key, last = present.idempotency_key, present.last_submission
    if change.event is Event.SUBMITTING and key is None:
        last += 1
        key = idempotency_key(change.request_key, last)
    elif change.event is Event.PLANNED:
        key = None
    after = replace(
        present,
        state=advance(present.state, change.event),
        seq=present.seq + 1,
        idempotency_key=key,
        last_submission=last,
    )
    return Step(change, present, after)


def event_row(step: Step, run_id: str) -> dict[str, Any]:
    """The row of ``events``."""
    return {
        "request_key": step.change.request_key,
        "seq": step.after.seq,
        "at": step.change.at,
        "run_id": run_id,
        "from_state": step.before.state.value,
        "event": step.change.event.value,
        "to_state": step.after.state.value,
        "idempotency_key": step.after.idempotency_key or step.before.idempotency_key,
        "data": None if step.change.data is None else dict(step.change.data),
    }


def request_values(step: Step) -> dict[str, Any]:
    """The columns of ``requests`` that a step sets."""
    change = step.change
    values: dict[str, Any] = dict.fromkeys(_CLEARS.get(change.event, ()))
    values.update(
        {
            name: _storable(item)
            for name, item in change.values.items()
            if name in _COLUMNS[change.event][0]
        }
    )
    values.update(state=step.after.state.value, seq=step.after.seq, updated_at=change.at)
    if step.opens_submission:
        values["idempotency_key"] = step.after.idempotency_key
    if change.event is Event.COMPLETED and step.before.state is not State.COMPLETED:
        values["completed_at"] = change.at
    if change.event is Event.STORED:
        values["stored_at"] = change.at
    return values


def submission_row(step: Step, run_id: str) -> dict[str, Any]:
    """The row of ``submissions`` that a step opens."""
    return {
        "idempotency_key": step.after.idempotency_key,
        "request_key": step.change.request_key,
        "number": step.after.last_submission,
        "run_id": run_id,
        "partition_key": step.change.values.get("partition_key", ""),
        "sent_at": step.change.at,
        "posts": 1,
        "expected_units": step.after.expected_units,
        "committed_units": step.after.committed_units,
    }


def submission_values(step: Step, run_id: str) -> dict[str, Any]:
    """The columns of ``submissions`` that a step sets; ``posts`` is added to what is there."""
    change = step.change
    allowed = _COLUMNS[change.event][1]
    values: dict[str, Any] = {}
    match change.event:
        case Event.SUBMITTING:
            # Taken up again after it was certainly not created: the hours start anew.
            values = {
                "posts": 1,
                "sent_at": change.at,
                "run_id": run_id,
                "expected_units": step.after.expected_units,
            }
        case Event.REPLAYING:
            values = {"posts": 1}
        case Event.ACCEPTED:
            values = {"submitted_at": change.at}
        case Event.COMPLETED if "charged_units" not in change.values:
            pass  # a fresh link; the money was settled before
        case Event.COMPLETED | Event.FAILED | Event.REFUSED:
            values = {"settled_at": change.at}
    values.update(
        {name: _storable(item) for name, item in change.values.items() if name in allowed}
    )
    if step.after.committed_units != step.before.committed_units:
        values["committed_units"] = step.after.committed_units
    return values


def _storable(value: Any) -> Any:
    """Text as every database takes it: without lone surrogates and NUL."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode("utf-8").replace("\x00", "\ufffd")
    return value

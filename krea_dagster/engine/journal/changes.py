"""The columns that each event sets in the journal's tables. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from krea_dagster.engine.budget import committed_after
from krea_dagster.engine.record import Record, StoredImage, idempotency_key
from krea_dagster.engine.states import Event, State, advance
from krea_dagster.errors import IllegalTransition, JournalError, TakenOver
from krea_dagster.models import evolve


@dataclass(frozen=True)
class Change:
    """One event of one request, with the columns that it sets.

    ``values`` may hold only the columns that ``_COLUMNS`` names for the event. ``data`` is kept
    with the event as it is.
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

#: The columns of ``submissions`` that say which row a purchase was made for, and what it said.
_BOUGHT_FOR: Final = ("prompt_id", "sample", "attribution_id")

#: The columns of ``requests`` and of ``submissions`` that each event may set.
_COLUMNS: Final[Mapping[Event, tuple[frozenset[str], frozenset[str]]]] = {
    Event.PLANNED: (frozenset(), frozenset()),
    Event.SUBMITTING: (
        frozenset(),
        frozenset({"table_id", "partition_key", "scopes", "callback_url", "api_key", *_BOUGHT_FOR}),
    ),
    Event.REPLAYING: (frozenset(), frozenset()),
    Event.ACCEPTED: (
        frozenset(),
        frozenset({"task_id", "reserved_units", "billing_rule", "user_group", "replayed"}),
    ),
    Event.TURNED_AWAY: (_ERROR, frozenset()),
    Event.REFUSED: (_ERROR, frozenset({"charged_units"})),
    Event.DEFERRED: (_ERROR, frozenset()),
    Event.OUTCOME_UNKNOWN: (_ERROR, frozenset()),
    Event.RELEASED: (frozenset(), frozenset({"charged_units"})),
    Event.COMPLETED: (frozenset({"result_url"}), frozenset({"charged_units"})),
    Event.FAILED: (_ERROR, frozenset({"charged_units"})),
    Event.STORED: (_IMAGE, frozenset()),
    Event.FOUND: (_IMAGE, frozenset({"charged_units"})),
    Event.NOT_STORED: (_ERROR, frozenset()),
    Event.FILE_MISSING: (frozenset(), frozenset()),
    Event.EXPIRED: (_ERROR, frozenset()),
}

#: The columns that an event sets to null, in addition to those that it is given.
_CLEARS: Final[Mapping[Event, tuple[str, ...]]] = {
    Event.PLANNED: ("idempotency_key", "result_url", "completed_at", *sorted(_ERROR)),
    # Certainly not created. The key is not used again: the next submission has another.
    Event.RELEASED: ("idempotency_key", *sorted(_ERROR)),
    Event.ACCEPTED: tuple(sorted(_ERROR)),
    Event.COMPLETED: tuple(sorted(_ERROR)),
    Event.STORED: tuple(sorted(_ERROR)),
    Event.FOUND: tuple(sorted(_ERROR)),
}

#: Whether the request's file is in the run's storage root after an event, where the event tells.
_FILES: Final[Mapping[Event, bool]] = {
    Event.STORED: True,
    Event.FOUND: True,
    Event.FILE_MISSING: False,
}

#: States without a purchase: not bought yet, or found in the storage root.
_WITHOUT_PURCHASE: Final = frozenset(
    {State.PLANNED, State.DEFERRED, State.STORED, State.COMPLETED, State.EXPIRED}
)

#: Events after which a request has no present submission.
_ENDS_SUBMISSION: Final = frozenset({Event.PLANNED, Event.RELEASED})

#: The fields of a record's present submission while there is none.
_NO_SUBMISSION: Final[Mapping[str, Any]] = {
    "submission": 0,
    "idempotency_key": None,
    "sent_at": None,
    "submitted_at": None,
    "task_id": None,
    "reserved_units": None,
    "charged_units": None,
    "committed_units": 0,
    "expected_units": 0,
    "billing_rule": None,
    "user_group": None,
    "run_id": None,
    "bought_for": None,
    "scopes": (),
    "callback_url": None,
    "api_key": None,
    "replayed": False,
    "bought_for_table": "",
}

#: Columns that are not set as they are given: the scopes are written as text, and the others stay
#: as the submission was opened with them.
_NOT_AS_GIVEN: Final = frozenset({"scopes", "callback_url", "table_id"})

#: Columns of ``requests`` and ``submissions`` that are not fields of a record of the same name.
_NOT_IN_RECORD: Final = _IMAGE.union(
    ("updated_at", "settled_at", "posts", "partition_key", "scopes"), _BOUGHT_FOR
)


@dataclass(frozen=True)
class AppliedChange:
    """A legal change, the record that results, and the columns that it sets.

    ``opens`` is the row of a new submission, if this is the intent of a purchase under a new
    Idempotency-Key. Otherwise ``submission`` are columns of the present one; its ``posts`` is added
    to the stored number. ``file``: whether the file is in the run's storage root, where the event
    tells.
    """

    change: Change
    before: Record
    after: Record
    request: Mapping[str, Any]
    submission: Mapping[str, Any]
    opens: Mapping[str, Any] | None
    file: bool | None = None


def check_change(change: Change, before: Record | None, owner: str) -> Record:
    """Return the record, if the change may be applied to it.

    Raises TakenOver if another owner claims the request, IllegalTransition if the state machine
    does not allow the event, and JournalError if the journal does not have the request.
    """
    if before is None:
        raise JournalError(f"request {change.request_key} is not in the journal")
    if before.claimed_by != owner:
        raise TakenOver(f"request {change.request_key} was taken over by another run")
    for_request, for_submission = _COLUMNS[change.event]
    for name in change.values:
        if name not in for_request and name not in for_submission:
            unknown = set(change.values) - for_request - for_submission
            raise IllegalTransition(
                f"{change.event.value} does not set {', '.join(sorted(unknown))}"
            )
    after = advance(before.state, change.event)
    bought = before.idempotency_key is not None or change.event is Event.SUBMITTING
    if not bought and after not in _WITHOUT_PURCHASE:
        raise IllegalTransition(
            f"request {change.request_key} has no purchase, so {change.event.value} cannot apply"
        )
    return before


def apply_change(
    change: Change, before: Record, run_id: str, *, committed_units: int, expected_units: int
) -> AppliedChange:
    """Apply a change that was checked. ``committed_units`` is what its submission now commits."""
    request = _request_values(change, before)
    opens: dict[str, Any] | None = None
    submission: dict[str, Any] = {}
    fields: dict[str, Any] = {}
    if change.event is Event.SUBMITTING and before.idempotency_key is None:
        opens = _new_submission(change, before, run_id, committed_units, expected_units)
        request["idempotency_key"] = opens["idempotency_key"]
        fields = {
            **_NO_SUBMISSION,
            **{name: opens[name] for name in opens.keys() & _NO_SUBMISSION.keys()},
            "submission": opens["number"],
            "submissions": opens["number"],
            "bought_for_table": opens["table_id"],
        }
    elif before.idempotency_key is not None:
        submission = _submission_values(change, before, run_id, expected_units)
        if committed_units != before.committed_units:
            submission["committed_units"] = committed_units
        if change.event in _ENDS_SUBMISSION:
            fields = dict(_NO_SUBMISSION)
        else:
            fields = {k: v for k, v in submission.items() if k not in _NOT_IN_RECORD}
    if change.event is Event.SUBMITTING:
        fields["bought_for"] = change.values.get("partition_key", "")
        fields["scopes"] = tuple(change.values.get("scopes", ()))
    state = advance(before.state, change.event)
    request |= {"state": state.value, "seq": before.seq + 1, "updated_at": change.at}
    fields.update((k, v) for k, v in request.items() if k not in _NOT_IN_RECORD)
    fields["state"] = state
    if "image_path" in request:
        fields["image"] = stored_image(request)
    file = _FILES.get(change.event)
    return AppliedChange(change, before, evolve(before, **fields), request, submission, opens, file)


def record_after(change: Change, before: Record, owner: str, run_id: str) -> Record:
    """Return the record after a change of a paid request that is yet to be written.

    Raises as ``check_change`` does.
    """
    check_change(change, before, owner)
    committed = committed_after(change.event, before.state, before.committed_units, change.values)
    step = apply_change(
        change,
        before,
        run_id,
        committed_units=committed,
        expected_units=before.expected_units,
    )
    return step.after


def _new_submission(
    change: Change, before: Record, run_id: str, committed_units: int, expected_units: int
) -> dict[str, Any]:
    number = before.submissions + 1
    return {
        "idempotency_key": idempotency_key(change.request_key, number),
        "request_key": change.request_key,
        "number": number,
        "run_id": run_id,
        "table_id": change.values.get("table_id", ""),
        "partition_key": change.values.get("partition_key", ""),
        "api_key": change.values.get("api_key"),
        "sent_at": change.at,
        "posts": 1,
        "expected_units": expected_units,
        "committed_units": committed_units,
        "scopes": _scopes_text(change),
        "callback_url": change.values.get("callback_url"),
        "replayed": False,
        **{name: change.values.get(name) for name in _BOUGHT_FOR},
    }


def event_row(step: AppliedChange, run_id: str) -> dict[str, Any]:
    """Return the row of ``events``."""
    return {
        "request_key": step.change.request_key,
        "seq": step.after.seq,
        "at": step.change.at,
        "run_id": run_id,
        "from_state": step.before.state.value,
        "event": step.change.event.value,
        "to_state": step.after.state.value,
        "idempotency_key": step.after.idempotency_key or step.before.idempotency_key,
        "data": _kept(step.change),
    }


def _kept(change: Change) -> Mapping[str, Any] | None:
    """Return the data kept with an event: for a failure its code, which the next try clears."""
    if change.data is None and change.event in (Event.FAILED, Event.REFUSED):
        return {"error_code": change.values.get("error_code")}
    return change.data


def _request_values(change: Change, before: Record) -> dict[str, Any]:
    """Return the columns of ``requests`` that an event sets, without state and number."""
    values: dict[str, Any] = dict.fromkeys(_CLEARS.get(change.event, ()))
    allowed = _COLUMNS[change.event][0]
    for name, item in change.values.items():
        if name in allowed:
            values[name] = _storable(item)
    if change.event is Event.COMPLETED and before.state in (State.SUBMITTED, State.FAILED):
        values["completed_at"] = change.at
    elif change.event in (Event.STORED, Event.FOUND):
        values["stored_at"] = change.at
    return values


def _submission_values(
    change: Change, before: Record, run_id: str, expected_units: int
) -> dict[str, Any]:
    """Return the columns of the present submission that an event sets."""
    values: dict[str, Any] = {}
    match change.event:
        case Event.SUBMITTING:
            # Sent again after it was certainly not created: the replay window starts again.
            values = {
                "posts": 1,
                "sent_at": change.at,
                "run_id": run_id,
                "expected_units": expected_units,
                "scopes": _scopes_text(change),
                "api_key": change.values.get("api_key"),
            }
        case Event.REPLAYING:
            values = {"posts": 1}
        case Event.ACCEPTED:
            values = {"submitted_at": change.at}
        case Event.OUTCOME_UNKNOWN if before.state is State.SUBMITTED:
            values = {"task_id": None}  # it did not belong to a task
        case Event.COMPLETED | Event.FAILED | Event.REFUSED | Event.RELEASED | Event.FOUND if (
            change.values.get("charged_units") is not None
        ):
            values = {"settled_at": change.at}
    allowed = _COLUMNS[change.event][1]
    for name, item in change.values.items():
        if name in allowed and name not in _NOT_AS_GIVEN:
            values[name] = _storable(item)
    return values


def _scopes_text(change: Change) -> str | None:
    scopes = change.values.get("scopes")
    return json.dumps(list(scopes)) if scopes else None


def stored_image(columns: Mapping[str, Any]) -> StoredImage | None:
    """Return the image that columns of ``requests`` describe, None where there is none."""
    if columns["image_path"] is None:
        return None
    return StoredImage(
        path=columns["image_path"],
        sha256=columns["image_sha256"],
        bytes=columns["image_bytes"],
        format=columns["image_format"],
        width=columns["width"],
        height=columns["height"],
    )


def _storable(value: Any) -> Any:
    """Return a value that every database accepts: text without lone surrogates and NUL."""
    if isinstance(value, str) and not value.isascii():
        value = value.encode("utf-8", "replace").decode("utf-8")
    if isinstance(value, str) and "\x00" in value:
        value = value.replace("\x00", "\ufffd")
    return value

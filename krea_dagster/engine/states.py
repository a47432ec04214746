"""The life of a request, as one literal table. Pure: the table is the design.

.. code-block:: text

    planned ─▶ submitting ─▶ submitted ─▶ completed ─▶ stored
      │            │             ├─▶ failed        (the task failed: not charged)
      │            │             └─▶ expired       (paid, and nothing could be read again: lost)
      │            ├─▶ refused    (a certain refusal: not charged)
      │            └─▶ unknown    (no usable answer: may have been charged)
      └─▶ deferred (a cap or a stop kept it back)

``submitting`` is on disk before the POST leaves. A run that finds it there without having written
it has found a crash between intent and answer, and must treat it as ``unknown``.

``expired`` is not final. If a run finds that the server knows the task after all, or that the file
exists, it goes on from there; the same is true for a failed task that turns out to be completed.

A file that is found under a request's own name and verifies makes the request ``stored`` from
every state: it is not bought again, even if another journal paid for it.

While the outcome of a purchase is unknown, no refusal of a *repeat* makes it known: the first
POST may still have created the task. So ``unknown`` is left only by the task itself
(``accepted``) or by a person (``released``: it did not happen; ``expired``: it did, and is lost).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Final

from krea_dagster.errors import IllegalTransition


class State(str, Enum):
    """The state of a request, as in the manifest's ``status``."""

    PLANNED = "planned"
    SUBMITTING = "submitting"
    SUBMITTED = "submitted"
    COMPLETED = "completed"
    STORED = "stored"
    FAILED = "failed"
    EXPIRED = "expired"
    REFUSED = "refused"
    UNKNOWN = "unknown"
    DEFERRED = "deferred"


class Event(str, Enum):
    """What happened to a request: one row of the journal's events."""

    #: It was requested for the first time, or again after it had failed or been refused.
    PLANNED = "planned"
    #: The intent to POST it; written before the POST leaves.
    SUBMITTING = "submitting"
    #: The server took it: the task id, the credits and the complete answer are known.
    ACCEPTED = "accepted"
    #: Certainly not created this time, and worth another try (429, no connection).
    TURNED_AWAY = "turned_away"
    #: Certainly not created, and an identical request never will be.
    REFUSED = "refused"
    #: Held back by a cap or a stop of the account; certainly not created.
    DEFERRED = "deferred"
    #: The POST got no usable answer, or the process died before it came.
    OUTCOME_UNKNOWN = "outcome_unknown"
    #: The intent to repeat the POST with the same Idempotency-Key and body.
    REPLAYING = "replaying"
    #: A person decided that the unknown purchase did not happen.
    RELEASED = "released"
    #: The task is completed and a link is known, or a fresh link for one that is. The first time it
    #: is written together with what became of the download: until then a read tells the same.
    COMPLETED = "completed"
    #: The task failed or was cancelled.
    FAILED = "failed"
    #: The file is verified, named and on disk.
    STORED = "stored"
    #: The download failed or was not the requested image; a later try is possible.
    NOT_STORED = "not_stored"
    #: The stored file is gone; it is fetched again.
    FILE_MISSING = "file_missing"
    #: Paid, and neither the task nor the link can be read again.
    EXPIRED = "expired"
    #: Its verified file is in the storage root, although this journal did not enter it there.
    FOUND = "found"


#: (state, event) → state. All others are illegal. ``None`` is before the first event.
TRANSITIONS: Final[Mapping[tuple[State | None, Event], State]] = {
    (None, Event.PLANNED): State.PLANNED,
    (State.PLANNED, Event.SUBMITTING): State.SUBMITTING,
    (State.PLANNED, Event.DEFERRED): State.DEFERRED,
    (State.DEFERRED, Event.SUBMITTING): State.SUBMITTING,
    (State.DEFERRED, Event.DEFERRED): State.DEFERRED,
    (State.SUBMITTING, Event.ACCEPTED): State.SUBMITTED,
    (State.SUBMITTING, Event.TURNED_AWAY): State.PLANNED,
    (State.SUBMITTING, Event.REFUSED): State.REFUSED,
    (State.SUBMITTING, Event.DEFERRED): State.DEFERRED,
    (State.SUBMITTING, Event.OUTCOME_UNKNOWN): State.UNKNOWN,
    (State.UNKNOWN, Event.REPLAYING): State.UNKNOWN,
    (State.UNKNOWN, Event.OUTCOME_UNKNOWN): State.UNKNOWN,
    (State.UNKNOWN, Event.ACCEPTED): State.SUBMITTED,
    (State.UNKNOWN, Event.RELEASED): State.PLANNED,
    (State.UNKNOWN, Event.EXPIRED): State.EXPIRED,
    (State.SUBMITTED, Event.COMPLETED): State.COMPLETED,
    (State.SUBMITTED, Event.FAILED): State.FAILED,
    (State.SUBMITTED, Event.EXPIRED): State.EXPIRED,
    (State.COMPLETED, Event.COMPLETED): State.COMPLETED,
    (State.COMPLETED, Event.NOT_STORED): State.COMPLETED,
    (State.COMPLETED, Event.STORED): State.STORED,
    (State.COMPLETED, Event.EXPIRED): State.EXPIRED,
    (State.EXPIRED, Event.COMPLETED): State.COMPLETED,
    (State.EXPIRED, Event.FAILED): State.FAILED,
    (State.STORED, Event.FILE_MISSING): State.COMPLETED,
    (State.FAILED, Event.PLANNED): State.PLANNED,
    (State.REFUSED, Event.PLANNED): State.PLANNED,
    (State.FAILED, Event.COMPLETED): State.COMPLETED,
    (State.SUBMITTED, Event.OUTCOME_UNKNOWN): State.UNKNOWN,
    (State.EXPIRED, Event.ACCEPTED): State.SUBMITTED,
    **{(state, Event.FOUND): State.STORED for state in State},
}

#: States in which an image is paid for, or may be, and is not available yet.
AT_STAKE: Final = frozenset({State.SUBMITTING, State.SUBMITTED, State.COMPLETED, State.UNKNOWN})


def advance(state: State | None, event: Event) -> State:
    """Return the state after an event. Raises IllegalTransition if the table has no such row."""
    try:
        return TRANSITIONS[state, event]
    except KeyError:
        where = "a request that was never planned" if state is None else f"a {state.value} request"
        raise IllegalTransition(f"{where} cannot take the event {event.value!r}") from None


def replay(events: Iterable[Event], state: State | None = None) -> State | None:
    """Return the state that a request's events lead to, from the ``state`` before them."""
    for event in events:
        state = advance(state, event)
    return state

"""The edges: places in a worker's run where the drill can kill it. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from krea_dagster.engine.policy import OnUnknown
from krea_dagster.engine.states import Event

#: Faults of a create call that leave its outcome unknown.
_NO_USABLE_ANSWER: Final = (
    "drop_before_create",
    "drop_after_create",
    "reset_after_create",
    "500_after_create",
    "502_html_after_create",
    "html_200",
    "no_id",
)

#: Server faults of which one makes an event happen.
_FAULTS: Final[Mapping[Event, tuple[str, ...]]] = {
    Event.TURNED_AWAY: ("429_no_retry_after",),
    Event.REFUSED: ("content_refused",),
    Event.DEFERRED: ("insufficient_quota",),
    Event.OUTCOME_UNKNOWN: _NO_USABLE_ANSWER,
    Event.REPLAYING: _NO_USABLE_ANSWER,
    Event.FAILED: ("fail",),
    Event.NOT_STORED: ("truncated", "file_html_200", "black", "wrong_dimensions"),
    Event.EXPIRED: ("vanished",),
}


@dataclass(frozen=True)
class Edge:
    """One place where a worker can be killed.

    ``faults`` are emulator faults of which one brings a worker there; empty if every worker passes
    it. With ``first_only`` the worker is killed at its first passage, because there is only one or
    because each costs an image. ``file_missing`` needs a stored file to be deleted before,
    ``resolves`` an unknown outcome that a person decides. The edge can be reached under
    ``policies``. At an edge that is ``outside`` the worker cannot kill itself: the server says
    that the worker is there, and the drill kills it.
    """

    name: str
    faults: tuple[str, ...] = ()
    first_only: bool = False
    file_missing: bool = False
    resolves: bool = False
    policies: tuple[OnUnknown, ...] = ("replay", "hold")
    outside: bool = False


def before(event: Event) -> str:
    """Return the edge just before the journal commits an event of a known request."""
    return f"before {_words(event)}"


def after(event: Event) -> str:
    """Return the edge just after that commit, before the caller learns of it."""
    return f"after {_words(event)}"


def _words(event: Event) -> str:
    # A request's first event is written elsewhere: in one commit with all other new requests.
    return "planned again" if event is Event.PLANNED else event.value.replace("_", " ")


BEFORE_PLANNED: Final = "before planned"
AFTER_PLANNED: Final = "after planned"
BEFORE_CLAIM: Final = "before the claim"
AFTER_CLAIM: Final = "after the claim"
BEFORE_RELEASE: Final = "before the claims are given up"
AFTER_RELEASE: Final = "after the claims are given up"
BEFORE_POST: Final = "before the POST leaves"
UNANSWERED: Final = "task exists, answer not sent"
TASK_EXISTS: Final = "task exists, answer unread"
BEFORE_READ: Final = "before a read of tasks"
AFTER_READ: Final = "read answered, answer unread"
BEFORE_DOWNLOAD: Final = "before a download"
DURING_DOWNLOAD: Final = "in a download"
AFTER_DOWNLOAD: Final = "after a download"
BEFORE_RENAME: Final = "before the file gets its name"
AFTER_RENAME: Final = "file has its name, stored unwritten"

_ELSEWHERE: Final = (
    Edge(BEFORE_PLANNED, first_only=True),
    Edge(AFTER_PLANNED, first_only=True),
    Edge(BEFORE_CLAIM, first_only=True),
    Edge(AFTER_CLAIM, first_only=True),
    Edge(BEFORE_POST),
    Edge(UNANSWERED, faults=("delay_create",), first_only=True, outside=True),
    Edge(TASK_EXISTS),
    Edge(BEFORE_READ),
    Edge(AFTER_READ),
    Edge(BEFORE_DOWNLOAD),
    Edge(DURING_DOWNLOAD),
    Edge(AFTER_DOWNLOAD),
    Edge(BEFORE_RENAME),
    Edge(AFTER_RENAME),
    Edge(BEFORE_RELEASE, first_only=True),
    Edge(AFTER_RELEASE, first_only=True),
)


def _of(event: Event) -> tuple[Edge, Edge]:
    faults = ("fail",) if event is Event.PLANNED else _FAULTS.get(event, ())
    policies: tuple[OnUnknown, ...] = ("replay", "hold")
    if event is Event.REPLAYING:
        policies = ("replay",)
    if event is Event.RELEASED:
        policies = ("hold",)

    def edge(name: str) -> Edge:
        return Edge(
            name,
            faults,
            first_only=event is Event.EXPIRED,
            file_missing=event is Event.FILE_MISSING,
            resolves=event is Event.RELEASED,
            policies=policies,
        )

    return edge(before(event)), edge(after(event))


#: Every edge: around the commit of each event of the state machine, and around the steps between
#: two commits. The event FOUND has none: a worker finds a file only after another worker was
#: killed at AFTER_RENAME, so that edge covers it.
EDGES: Final = (
    *(edge for event in Event if event is not Event.FOUND for edge in _of(event)),
    *_ELSEWHERE,
)

#: Why some edges cannot be reached under a policy.
NOT_UNDER: Final[Mapping[OnUnknown, str]] = {
    "hold": "the policy hold repeats no purchase",
    "replay": "under the policy replay nothing waits for a person's decision",
}


def edges_under(policy: OnUnknown) -> tuple[Edge, ...]:
    """Return the edges that a worker can reach under a policy."""
    return tuple(edge for edge in EDGES if policy in edge.policies)

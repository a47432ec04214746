"""Compares the server's records with the journal and the files, and gives a verdict. Pure.

The emulator's records say what was charged, and for which request. The hashes of the files on disk
say what was delivered. The journal counts only for purchases that were not delivered.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import Enum
from typing import Any, Final

from krea_dagster.engine.budget import PUBLISHED_UNITS
from krea_dagster.engine.policy import REJECTED, OnUnknown
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.models import ImageRequest, credits_from_units

#: Task faults after which an image can never be had, although it was charged.
_FORGOTTEN: Final = frozenset({"vanished"})
#: States of a request whose purchase has no known outcome.
_OPEN: Final = frozenset({State.UNKNOWN, State.SUBMITTING})
_UNFINISHED: Final = frozenset({"pending", "processing"})

#: The fields of a request that the server sees: prompt, size, quality, seed.
Body = tuple[str, str, str, int]


@dataclass(frozen=True)
class ServerTask:
    """One task in the server's records. Money in units.

    ``file_sha256`` is the hash of its undamaged image, None until that was fetched.
    """

    task_id: str
    body: Body
    status: str
    charged_units: int
    reserved_units: int
    file_sha256: str | None
    faults: frozenset[str]

    @property
    def counts(self) -> bool:
        """Whether it was charged, or may still be."""
        return self.charged_units > 0 or self.unfinished

    @property
    def unfinished(self) -> bool:
        """Whether it has not ended."""
        return self.status in _UNFINISHED

    @property
    def forgotten(self) -> bool:
        """Whether the server charged it and denies knowing it."""
        return bool(self.faults & _FORGOTTEN)


@dataclass(frozen=True)
class UnknownPurchase:
    """A purchase whose outcome the journal does not know.

    ``credits_units`` is the most that it may have cost. ``charged`` comes from the server's
    records, which a buyer cannot see.
    """

    request_key: str
    prompt: str
    credits_units: int
    since: datetime | None
    charged: bool


class RequestOutcome(str, Enum):
    """The outcome of one request. Each request has exactly one."""

    #: A file exists whose hash is that of an image which the server charged.
    DELIVERED = "delivered"
    #: Charged, not on disk, and not at stake in the journal: no run would ever fetch it.
    LOST = "lost"
    #: The journal says that it does not know how the purchase ended.
    UNKNOWN = "unknown"
    #: Charged and available; the journal knows it, but the last run ended without it.
    UNDELIVERED = "undelivered"
    #: Charged, and a whole file came that is not the image. It is kept, and fetched once.
    REJECTED = "rejected"
    #: Charged by a server that denies knowing the task; the journal has it as expired.
    FORGOTTEN = "forgotten"
    #: Its task never ends.
    ENDLESS = "never_ending"
    #: Its tasks failed, and were not charged.
    FAILED = "failed"
    REFUSED = "refused"
    #: The server has no task of it, and did not refuse it.
    NEVER_BOUGHT = "never_bought"


@dataclass(frozen=True)
class Reconciliation:
    """The outcomes of a drill's requests. Money in units; lists hold request keys.

    ``submitted`` counts POSTs, ``created`` tasks, ``billed`` charged tasks. Requests
    ``bought_twice`` have more than one task that was charged or may still be. ``unrecorded`` are
    the ids of charged tasks that the journal does not know, and holds no unknown outcome for.
    ``disowned`` are requests whose right file is stored although the journal says that it is not.
    ``journal_units`` is what the journal has as charged. ``unexplained_units`` is what the server
    charged beyond that, the unknown outcomes, and what it has forgotten.
    """

    requests: int
    submitted: int
    created: int
    billed: int
    billed_units: int
    outcomes: Mapping[RequestOutcome, Sequence[str]]
    bought_twice: Sequence[str]
    unrecorded: Sequence[str]
    disowned: Sequence[str]
    unknown: Sequence[UnknownPurchase]
    forgotten_units: int
    journal_units: int
    unexplained_units: int

    def of(self, outcome: RequestOutcome) -> Sequence[str]:
        """Return the requests with this outcome."""
        return self.outcomes.get(outcome, ())

    @property
    def unknown_units(self) -> int:
        """The most that the unknown outcomes may cost."""
        return sum(one.credits_units for one in self.unknown)

    def violations(self, policy: OnUnknown, *, unknown_is_right: bool = False) -> list[str]:
        """Return what must not happen but did, in words; empty if the drill passed.

        An unknown outcome is right under hold, and where no clock says how old it is.
        """
        unknown = 0 if unknown_is_right or policy == "hold" else len(self.unknown)
        found = [
            (len(self.bought_twice), "bought twice"),
            (len(self.of(RequestOutcome.LOST)), "lost"),
            (len(self.unrecorded), "charged and not in the journal"),
            (
                len(self.of(RequestOutcome.UNDELIVERED)),
                "charged, could be had, and not delivered",
            ),
            (len(self.of(RequestOutcome.NEVER_BOUGHT)), "never bought"),
            (len(self.disowned), "stored, and the journal says that it is not"),
            (unknown, "unknown"),
            (credits_from_units(self.unexplained_units), "credits unexplained"),
        ]
        return [f"{count:g} {words}" for count, words in found if count]


def server_tasks(stats: Mapping[str, Any]) -> list[ServerTask]:
    """Return the tasks in the emulator's records."""
    return [
        ServerTask(
            task_id=task["task_id"],
            body=(task["prompt"], task["size"], task["quality"], task["seed"]),
            status=task["status"],
            charged_units=task["charged_units"],
            reserved_units=task["reserved_units"],
            file_sha256=task["file_sha256"],
            faults=frozenset(task["faults"]),
        )
        for task in stats["tasks"]
    ]


def reconcile(
    requests: Sequence[ImageRequest],
    submitted: int,
    tasks: Sequence[ServerTask],
    records: Mapping[str, Record],
    files: Mapping[str, str],
    *,
    adopts: bool = False,
) -> Reconciliation:
    """Compare. ``files`` are the hashes of the files on disk, by request key.

    With ``adopts`` the journal may hold an image as stored without a purchase, because it found
    the file. That file explains its cost.
    """
    by_body: dict[Body, list[ServerTask]] = {}
    for task in tasks:
        by_body.setdefault(task.body, []).append(task)
    prices = _prices(records.values())
    outcomes: dict[RequestOutcome, list[str]] = {}
    unknown = []
    unrecorded = {task.task_id for task in tasks if task.charged_units > 0}
    disowned = []
    adopted_units = 0
    journal_units = sum(record.charged_units or 0 for record in records.values())
    forgotten_units = unknown_units = 0
    for request in requests:
        key = request.request_key
        own, record = by_body.get(body_of(request), []), records.get(key)
        outcome = _outcome(own, record, files.get(key))
        outcomes.setdefault(outcome, []).append(key)
        charged_units = sum(task.charged_units for task in own)
        if record is not None and record.state in _OPEN:
            price = prices.get(request.quality) or PUBLISHED_UNITS[request.quality]
            charged = any(task.counts for task in own)
            unknown.append(UnknownPurchase(key, request.prompt, price, record.sent_at, charged))
            unrecorded -= {task.task_id for task in own}
            unknown_units += charged_units
        elif record is not None:
            unrecorded -= {str(record.task_id)}
        delivered = outcome is RequestOutcome.DELIVERED
        if delivered and (record is None or record.state is not State.STORED):
            disowned.append(key)
        elif adopts and delivered and record is not None and record.task_id is None:
            unrecorded -= {task.task_id for task in own}
            adopted_units += charged_units - (record.charged_units or 0)
        if outcome is RequestOutcome.FORGOTTEN:
            forgotten_units += charged_units
    billed_units = sum(task.charged_units for task in tasks)
    return Reconciliation(
        requests=len(requests),
        submitted=submitted,
        created=len(tasks),
        billed=sum(task.charged_units > 0 for task in tasks),
        billed_units=billed_units,
        outcomes=outcomes,
        bought_twice=[
            request.request_key
            for request in requests
            if sum(task.counts for task in by_body.get(body_of(request), [])) > 1
        ],
        unrecorded=sorted(unrecorded),
        disowned=disowned,
        unknown=unknown,
        forgotten_units=forgotten_units,
        journal_units=journal_units,
        unexplained_units=billed_units
        - journal_units
        - forgotten_units
        - unknown_units
        - adopted_units,
    )


def _outcome(
    own: Sequence[ServerTask], record: Record | None, file_sha256: str | None
) -> RequestOutcome:
    """Return a request's outcome, given its tasks at the server, its record and its file."""
    state = None if record is None else record.state
    charged = [task for task in own if task.charged_units > 0]
    if file_sha256 is not None and any(task.file_sha256 == file_sha256 for task in charged):
        return RequestOutcome.DELIVERED
    if charged and state is State.EXPIRED and all(task.forgotten for task in charged):
        return RequestOutcome.FORGOTTEN
    if charged and state not in AT_STAKE:
        return RequestOutcome.LOST
    if state in _OPEN:
        return RequestOutcome.UNKNOWN
    if charged and record is not None and record.error_code in REJECTED:
        return RequestOutcome.REJECTED
    if charged:
        return RequestOutcome.UNDELIVERED
    if any(task.unfinished for task in own):
        return RequestOutcome.ENDLESS
    if state is State.REFUSED:
        return RequestOutcome.REFUSED
    return RequestOutcome.FAILED if own else RequestOutcome.NEVER_BOUGHT


def body_of(request: ImageRequest) -> Body:
    """Return the fields of a request that the server sees."""
    return request.prompt, request.size, request.quality, request.seed


def _prices(records: Iterable[Record]) -> dict[str, int]:
    """Return the highest price that was seen for each quality."""
    prices: dict[str, int] = {}
    for record in records:
        quality = record.request.quality
        prices[quality] = max(prices.get(quality, 0), record.reserved_units or 0)
    return prices

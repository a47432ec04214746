"""The server's books against the journal and the files: figures, and a verdict. Pure.

What was charged, and for what, is read from the emulator's books; what is at hand, from the
hashes of the files on disk. The journal is asked only what it says of a purchase that is not
at hand.
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

#: Task faults after which a picture can never be had, although it was charged.
_FORGOTTEN: Final = frozenset({"vanished"})
#: States of a request whose purchase has no known outcome.
_OPEN: Final = frozenset({State.UNKNOWN, State.SUBMITTING})
_UNFINISHED: Final = frozenset({"pending", "processing"})

#: What a task was asked for: the fields that the server sees of it.
Body = tuple[str, str, str, int]


@dataclass(frozen=True)
class ServerTask:
    """One task as the server's books have it. Money in units.

    ``file_sha256`` is the hash of its undamaged picture, None until that was fetched.
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
class Unknown:
    """A purchase whose outcome the journal does not know.

    ``credits_units`` is the most that it may have cost. ``charged`` is what the server's books
    say, which a buyer could not see.
    """

    request_key: str
    prompt: str
    credits_units: int
    since: datetime | None
    charged: bool


class Fate(str, Enum):
    """What became of one request. Each has exactly one."""

    #: A file is at hand whose hash is that of a picture which the server charged.
    DELIVERED = "delivered"
    #: Charged, not at hand, and not at stake in the journal: nobody would ever look for it.
    LOST = "lost"
    #: The journal does not know how its purchase ended, and says so.
    UNKNOWN = "unknown"
    #: Charged, and could be had; the journal knows it and the run has ended all the same.
    UNDELIVERED = "undelivered"
    #: Charged, and a whole file that is not the image came: it is kept, and fetched once.
    REJECTED = "rejected"
    #: Charged by a server that denies knowing the task; the journal has it as expired.
    FORGOTTEN = "forgotten"
    #: Its task never ends.
    ENDLESS = "never_ending"
    #: Its tasks failed, and were not charged.
    FAILED = "failed"
    REFUSED = "refused"
    #: The server has no task of it, and it was not refused.
    NEVER_BOUGHT = "never_bought"


@dataclass(frozen=True)
class Reckoning:
    """What became of the drill's requests. Money in units; lists hold request keys.

    ``submitted`` counts POSTs, ``billed`` charged tasks. ``bought_twice`` have more than one
    task that was charged or may still be. ``unrecorded`` are the ids of charged tasks that the
    journal does not know, and holds no unknown outcome for. ``journal_units`` is what the
    journal has down as charged; ``unexplained_units`` what the server charged beyond that, the
    unknown outcomes, and what it has forgotten. ``created`` counts tasks, ``disowned`` are requests
    whose right file is stored while the journal says that it is not.
    """

    requests: int
    submitted: int
    created: int
    billed: int
    billed_units: int
    fates: Mapping[Fate, Sequence[str]]
    bought_twice: Sequence[str]
    unrecorded: Sequence[str]
    disowned: Sequence[str]
    unknown: Sequence[Unknown]
    forgotten_units: int
    journal_units: int
    unexplained_units: int

    def of(self, fate: Fate) -> Sequence[str]:
        """The requests with this fate."""
        return self.fates.get(fate, ())

    @property
    def unknown_units(self) -> int:
        """What the unknown outcomes cost at most."""
        return sum(one.credits_units for one in self.unknown)

    def faults(self, policy: OnUnknown, *, unknown_is_right: bool = False) -> list[str]:
        """What must not be, in words; empty where the drill is passed.

        An unknown outcome is right under hold, and where no clock says how old it is.
        """
        unknown = 0 if unknown_is_right or policy == "hold" else len(self.unknown)
        found = [
            (len(self.bought_twice), "bought twice"),
            (len(self.of(Fate.LOST)), "lost"),
            (len(self.unrecorded), "charged and not in the journal"),
            (len(self.of(Fate.UNDELIVERED)), "charged, could be had, and not delivered"),
            (len(self.of(Fate.NEVER_BOUGHT)), "never bought"),
            (len(self.disowned), "stored, and the journal says that it is not"),
            (unknown, "unknown"),
            (credits_from_units(self.unexplained_units), "credits unexplained"),
        ]
        return [f"{count:g} {words}" for count, words in found if count]


def server_tasks(books: Mapping[str, Any]) -> list[ServerTask]:
    """The tasks of the emulator's books."""
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
        for task in books["tasks"]
    ]


def reckon(
    requests: Sequence[ImageRequest],
    submitted: int,
    tasks: Sequence[ServerTask],
    records: Mapping[str, Record],
    files: Mapping[str, str],
    *,
    adopts: bool = False,
) -> Reckoning:
    """Compare. ``files`` are the hashes of the files on disk, by request key.

    With ``adopts`` the journal may hold an image as stored without a purchase: it has found the
    file. What that one cost is explained by the file.
    """
    by_body: dict[Body, list[ServerTask]] = {}
    for task in tasks:
        by_body.setdefault(task.body, []).append(task)
    prices = _prices(records.values())
    fates: dict[Fate, list[str]] = {}
    unknown = []
    unrecorded = {task.task_id for task in tasks if task.charged_units > 0}
    disowned = []
    adopted_units = 0
    journal_units = sum(record.charged_units or 0 for record in records.values())
    forgotten_units = unknown_units = 0
    for request in requests:
        key = request.request_key
        own, record = by_body.get(body_of(request), []), records.get(key)
        fate = _fate(own, record, files.get(key))
        fates.setdefault(fate, []).append(key)
        if record is not None and record.state in _OPEN:
            price = prices.get(request.quality) or PUBLISHED_UNITS[request.quality]
            charged = any(task.counts for task in own)
            unknown.append(Unknown(key, request.prompt, price, record.sent_at, charged))
            unrecorded -= {task.task_id for task in own}
            unknown_units += sum(task.charged_units for task in own)
        elif record is not None:
            unrecorded -= {str(record.task_id)}
        if fate is Fate.DELIVERED and (record is None or record.state is not State.STORED):
            disowned.append(key)
        elif adopts and fate is Fate.DELIVERED and record is not None and record.task_id is None:
            unrecorded -= {task.task_id for task in own}
            adopted_units += sum(task.charged_units for task in own) - (record.charged_units or 0)
        if fate is Fate.FORGOTTEN:
            forgotten_units += sum(task.charged_units for task in own)
    billed_units = sum(task.charged_units for task in tasks)
    return Reckoning(
        requests=len(requests),
        submitted=submitted,
        created=len(tasks),
        billed=sum(task.charged_units > 0 for task in tasks),
        billed_units=billed_units,
        fates=fates,
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


def _fate(own: Sequence[ServerTask], record: Record | None, file_sha256: str | None) -> Fate:
    """What became of a request, given its tasks at the server, its record, and its file."""
    state = None if record is None else record.state
    charged = [task for task in own if task.charged_units > 0]
    if file_sha256 is not None and any(task.file_sha256 == file_sha256 for task in charged):
        return Fate.DELIVERED
    if charged and state is State.EXPIRED and all(task.forgotten for task in charged):
        return Fate.FORGOTTEN
    if charged and state not in AT_STAKE:
        return Fate.LOST
    if state in _OPEN:
        return Fate.UNKNOWN
    if charged and record is not None and record.error_code in REJECTED:
        return Fate.REJECTED
    if charged:
        return Fate.UNDELIVERED
    if any(task.unfinished for task in own):
        return Fate.ENDLESS
    if state is State.REFUSED:
        return Fate.REFUSED
    return Fate.FAILED if own else Fate.NEVER_BOUGHT


def body_of(request: ImageRequest) -> Body:
    """What the server sees of a request."""
    return request.prompt, request.size, request.quality, request.seed


def _prices(records: Iterable[Record]) -> dict[str, int]:
    """The highest price that was seen for each quality."""
    prices: dict[str, int] = {}
    for record in records:
        quality = record.request.quality
        prices[quality] = max(prices.get(quality, 0), record.reserved_units or 0)
    return prices

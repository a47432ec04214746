"""Removing what the journal no longer needs: the early events of stored images, and callbacks.

Requests and submissions are never removed: they are what is not bought again, and the money. Of a
stored request's events, the last one is kept, and those that the accounts are made from.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final, NamedTuple

from sqlalchemy import Connection, delete, exists, func, select, update

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.schema import callbacks, events, requests
from krea_dagster.engine.journal.sql import lock_requests
from krea_dagster.engine.states import Event, State

#: The events that are kept. Spend reads why a purchase failed, and the proof that an image was
#: found instead of bought. A purchase that was sent twice is not bought again if its task fails.
KEPT_EVENTS: Final = frozenset({Event.FAILED, Event.REFUSED, Event.FOUND, Event.REPLAYING})

#: Requests per transaction: a run that buys waits for each of them.
_PER_WRITE: Final = 500


@dataclass(frozen=True)
class Pruned:
    """How many rows were removed, and how many stored requests lost events."""

    requests: int = 0
    events: int = 0
    callbacks: int = 0


def prune(database: Database, before: datetime) -> Pruned:
    """Remove events and callbacks of requests that have not changed since ``before``.

    Only stored requests that no run holds lose events. It may be interrupted, and run while others
    buy. Raises JournalError.
    """
    after = ""
    requests_pruned = events_removed = 0
    while True:
        part = database.write(
            "remove events from", partial(_prune_next, before=before, after=after)
        )
        requests_pruned += part.requests
        events_removed += part.events
        if not part.last:
            break
        after = part.last
    callbacks_removed = database.write(
        "remove callbacks from", partial(_remove_callbacks, before=before)
    )
    return Pruned(requests_pruned, events_removed, callbacks_removed)


class _Part(NamedTuple):
    """The last request that a transaction looked at, empty at the end, and what it removed."""

    last: str
    requests: int
    events: int


def _prune_next(connection: Connection, before: datetime, after: str) -> _Part:
    """Prune the next requests after this key."""
    prunable = (
        requests.c.state == State.STORED.value,
        requests.c.updated_at < before,
        requests.c.claimed_by.is_(None),
        requests.c.kept_from_seq < requests.c.seq,
    )
    following = (
        select(requests.c.request_key)
        .where(requests.c.request_key > after, *prunable)
        .order_by(requests.c.request_key)
        .limit(_PER_WRITE)
        .subquery()
    )
    last = connection.execute(select(func.max(following.c.request_key))).scalar()
    if last is None:
        return _Part("", 0, 0)
    # A run may have changed one of them since: the conditions are checked again under the lock.
    chosen = (requests.c.request_key > after, requests.c.request_key <= last, *prunable)
    lock_requests(connection, *chosen)
    changed = connection.execute(
        update(requests).where(*chosen).values(kept_from_seq=requests.c.seq)
    )
    kept_from_seq = (
        select(requests.c.kept_from_seq)
        .where(requests.c.request_key == events.c.request_key)
        .scalar_subquery()
    )
    removed = connection.execute(
        delete(events).where(
            events.c.request_key > after,
            events.c.request_key <= last,
            events.c.seq < kept_from_seq,
            events.c.event.not_in([event.value for event in KEPT_EVENTS]),
        )
    )
    return _Part(last, changed.rowcount, removed.rowcount)


def _remove_callbacks(connection: Connection, before: datetime) -> int:
    unchanged = exists().where(
        requests.c.request_key == callbacks.c.request_key,
        requests.c.state == State.STORED.value,
        requests.c.updated_at < before,
    )
    old = callbacks.c.last_at < before
    return connection.execute(delete(callbacks).where(old, unchanged)).rowcount

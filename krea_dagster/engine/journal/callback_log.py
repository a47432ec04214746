"""The journal's part of callbacks: which requests were called about, how often, and when.

A row here is a hint, and no more: it is written by whoever knows an address, so nothing in it is
a fact about a request or its money. It changes no other table, and may be emptied at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final

from sqlalchemy import Connection, Select, case, func, select

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.journal.schema import callbacks, requests

#: Two receivers may commit in another order than their clocks say, so a reader looks back so far.
OVERLAP: Final = timedelta(seconds=10)


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


@dataclass(frozen=True)
class ReceivedCallback:
    """The calls about one request. ``task_id`` is the last claim of a task: never a fact."""

    request_key: str
    task_id: str | None
    first_at: datetime
    last_at: datetime
    count: int


@dataclass(frozen=True)
class CalledSince:
    """What was called about since a mark, the oldest first, and the mark to go on from."""

    calls: tuple[ReceivedCallback, ...]
    mark: datetime | None


class CallbackLog:
    """The calls in a journal's database, for receivers and for those who read.

    Its methods block. Raises JournalError wherever the database cannot be read or written.
    """

    def __init__(self, database: Database, *, now: Callable[[], datetime] = _utc_now) -> None:
        self._database = database
        self._now = now
        statement = self._database.insertion(callbacks)
        new = statement.excluded
        self._upsert = statement.on_conflict_do_update(
            index_elements=["request_key"],
            set_={
                "task_id": func.coalesce(new.task_id, callbacks.c.task_id),
                # The clock of another receiver may be ahead of this one's.
                "last_at": case(
                    (new.last_at > callbacks.c.last_at, new.last_at), else_=callbacks.c.last_at
                ),
                # Another task: another purchase of the request, whose first call this is.
                "first_at": case(
                    (new.task_id != callbacks.c.task_id, new.first_at),
                    else_=callbacks.c.first_at,
                ),
                "count": callbacks.c["count"] + new["count"],
            },
        )

    @classmethod
    def open(
        cls, url: str, *, lock_timeout_s: float = 5.0, now: Callable[[], datetime] = _utc_now
    ) -> CallbackLog:
        """The calls in the journal behind a SQLAlchemy URL; to be closed by whoever opened it.

        ``lock_timeout_s`` is shorter than EvoLink waits for an answer. Raises ConfigError where
        the URL cannot be used.
        """
        return cls(Database(url, lock_timeout_s=lock_timeout_s), now=now)

    def __repr__(self) -> str:
        return f"CallbackLog({self._database.where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._database.close()

    def check(self) -> None:
        """See whether the journal can be read. Raises JournalError."""
        with self._database.read("read") as connection:
            connection.execute(select(1))

    def add(self, claims: Sequence[tuple[str, str | None]]) -> set[str]:
        """Remember calls in one durable commit; returns the keys whose request is known.

        ``claims`` are pairs of a request key and the task id that the call named, None where it
        named none. Those about a request that the journal does not know are left out.
        """
        sums: dict[str, dict[str, Any]] = {}
        for request_key, task_id in claims:
            row = sums.setdefault(
                request_key, {"request_key": request_key, "task_id": None, "count": 0}
            )
            row["count"] += 1
            row["task_id"] = task_id or row["task_id"]

        def write(connection: Connection) -> set[str]:
            known: set[str] = set()
            # Sorted, so that two receivers never wait for each other's rows.
            for chunk in chunks(sorted(sums)):
                found = connection.execute(
                    select(requests.c.request_key).where(requests.c.request_key.in_(chunk))
                )
                known.update(found.scalars())
            at = self._now()  # once the write lock is held, so that it is not older than a reader
            rows = [{**sums[key], "first_at": at, "last_at": at} for key in sorted(known)]
            if rows:
                connection.execute(self._upsert, rows)
            return known

        return self._database.write("remember callbacks in", write)

    def received(self, request_keys: Iterable[str]) -> dict[str, ReceivedCallback]:
        """Those of these requests that were called about, by request key.

        To be asked again and again by whoever waits for them: one that has a ``count`` that was
        not seen before is worth asking about.
        """
        found: dict[str, ReceivedCallback] = {}
        with self._database.read("read the callbacks of") as connection:
            for chunk in chunks(sorted(set(request_keys))):
                rows = connection.execute(_CALLS.where(callbacks.c.request_key.in_(chunk)))
                found.update((row.request_key, ReceivedCallback(*row)) for row in rows)
        return found

    def calls_since(self, mark: datetime | None) -> CalledSince:
        """What was called about since ``mark`` (None: ever), the last call of each.

        Looks back a little beyond the mark, so that nothing is missed; what was given out before
        may therefore come again, and is known by its ``count``.
        """
        query = _CALLS.order_by(callbacks.c.last_at, callbacks.c.request_key)
        if mark is not None:
            query = query.where(callbacks.c.last_at >= mark - OVERLAP)
        with self._database.read("read the callbacks of") as connection:
            calls = tuple(ReceivedCallback(*row) for row in connection.execute(query))
        return CalledSince(calls, max((one.last_at for one in calls), default=mark))


_CALLS: Final[Select[Any]] = select(
    callbacks.c.request_key,
    callbacks.c.task_id,
    callbacks.c.first_at,
    callbacks.c.last_at,
    callbacks.c["count"],
)

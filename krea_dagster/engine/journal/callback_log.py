"""Received callbacks: for which requests, how often, and when.

A row is only a hint: anyone who knows a callback address can write it, so nothing in it is a fact
about a request or its money. It changes no other table, and may be deleted at any time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Any, Final

from sqlalchemy import Connection, Select, case, func, select

from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal.database import Database, DatabaseLog
from krea_dagster.engine.journal.rows import rows_with
from krea_dagster.engine.journal.schema import callbacks, requests
from krea_dagster.engine.journal.sql import insertion


@dataclass(frozen=True)
class ReceivedCallback:
    """The callbacks for one request. ``task_id`` is the task that the last one claimed."""

    request_key: str
    task_id: str | None
    first_at: datetime
    last_at: datetime
    count: int


class CallbackLog(DatabaseLog):
    """The callbacks in a journal's database."""

    def __init__(
        self, database: Database, *, now: Callable[[], datetime] = SystemClock().now
    ) -> None:
        super().__init__(database)
        self._now = now

    @classmethod
    def open(
        cls,
        url: str,
        *,
        lock_timeout_s: float = 5.0,
        now: Callable[[], datetime] = SystemClock().now,
    ) -> CallbackLog:
        """Open the callbacks in the journal behind a SQLAlchemy URL. The caller closes them.

        ``lock_timeout_s`` is less than EvoLink's time-out. Raises ConfigError for an unusable URL.
        """
        return cls(Database(url, lock_timeout_s=lock_timeout_s), now=now)

    def check(self) -> None:
        """Check that the journal can be read. Raises JournalError."""
        self._database.ping()

    def add(self, claims: Sequence[tuple[str, str | None]]) -> set[str]:
        """Add callbacks in one durable commit, and return the keys of known requests.

        ``claims`` are pairs of a request key and the task id that the callback named, or None.
        Callbacks for unknown requests are left out.
        """
        sums: dict[str, dict[str, Any]] = {}
        for request_key, task_id in claims:
            row = sums.setdefault(
                request_key, {"request_key": request_key, "task_id": None, "count": 0}
            )
            row["count"] += 1
            row["task_id"] = task_id or row["task_id"]

        def write(connection: Connection) -> set[str]:
            key = requests.c.request_key
            found = rows_with(connection, select(key), key, sorted(sums))
            known = {row.request_key for row in found}
            at = (
                self._now()
            )  # with the write lock held, so that readers do not see older times later
            # Sorted, so that two receivers never wait for each other's rows.
            rows = [{**sums[key], "first_at": at, "last_at": at} for key in sorted(known)]
            if rows:
                connection.execute(_upsert(connection), rows)
            return known

        return self._database.write("write callbacks to", write)

    def received(self, request_keys: Iterable[str]) -> dict[str, ReceivedCallback]:
        """Return the callbacks for these requests, by request key.

        A waiting run polls this: a new ``count`` means that the task is worth reading.
        """
        keys = sorted(set(request_keys))
        with self._database.read() as connection:
            rows = rows_with(connection, _CALLBACKS, callbacks.c.request_key, keys)
            return {row.request_key: ReceivedCallback(*row) for row in rows}


_CALLBACKS: Final[Select[Any]] = select(
    *(callbacks.c[one.name] for one in fields(ReceivedCallback))
)


def _upsert(connection: Connection) -> Any:
    statement = insertion(connection, callbacks)
    new = statement.excluded
    return statement.on_conflict_do_update(
        index_elements=["request_key"],
        set_={
            "task_id": func.coalesce(new.task_id, callbacks.c.task_id),
            # The clock of another receiver may be ahead.
            "last_at": case(
                (new.last_at > callbacks.c.last_at, new.last_at), else_=callbacks.c.last_at
            ),
            # Another task means another purchase of the request: this is its first callback.
            "first_at": case(
                (new.task_id != callbacks.c.task_id, new.first_at), else_=callbacks.c.first_at
            ),
            "count": callbacks.c["count"] + new["count"],
        },
    )

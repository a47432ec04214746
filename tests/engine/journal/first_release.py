"""A journal as the first release made it and filled it: by its own revision, in plain SQL.

Never changed with the code: users have such files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

from sqlalchemy import (
    ColumnClause,
    Connection,
    Engine,
    column,
    create_engine,
    event,
    insert,
    select,
    table,
)
from sqlalchemy.pool import NullPool

from krea_dagster.engine.journal import migrations
from krea_dagster.engine.journal.migrations import REVISIONS, Revisions

#: 2026-01-01 in microseconds since 1970.
AT: Final = 1_767_225_600_000_000

_KEYS: Final = {letter: letter * 64 for letter in "abcdefghij"}

#: Requests in the states that the others do not have.
_OTHER_STATES: Final = {
    "e": "submitting",
    "f": "completed",
    "g": "failed",
    "h": "refused",
    "i": "expired",
    "j": "deferred",
}


def _request(letter: str, state: str, **further: Any) -> dict[str, Any]:
    return {
        "request_key": _KEYS[letter],
        "model": "krea-2-turbo",
        "prompt": f"Füchse, 狐, {letter}",
        "size": "1:1",
        "quality": "1K",
        "seed": 7,
        "nsfw_check": False,
        "attempt": 0,
        "partition_key": "bucket-000",
        "state": state,
        "seq": 3,
        "updated_at": AT,
        "claimed_by": None,
        "idempotency_key": f"krea-{_KEYS[letter]}-1",
        "result_url": None,
        "image_path": None,
        "image_sha256": None,
        "image_bytes": None,
        "image_format": None,
        "width": None,
        "height": None,
        **further,
    }


def _submission(letter: str, **further: Any) -> dict[str, Any]:
    return {
        "idempotency_key": f"krea-{_KEYS[letter]}-1",
        "request_key": _KEYS[letter],
        "number": 1,
        "run_id": "run-1",
        "partition_key": "bucket-000",
        "sent_at": AT,
        "posts": 1,
        "expected_units": 4500,
        "committed_units": 4500,
        "task_id": None,
        "reserved_units": None,
        "charged_units": None,
        **further,
    }


def _event(letter: str, seq: int, before: str, name: str, after: str) -> dict[str, Any]:
    return {
        "request_key": _KEYS[letter],
        "seq": seq,
        "at": AT + seq,
        "run_id": "run-1",
        "from_state": before,
        "event": name,
        "to_state": after,
    }


#: In an order that foreign keys allow.
ROWS: Final[dict[str, list[dict[str, Any]]]] = {
    "owners": [
        {
            "owner": "f" * 32,
            "run_id": "run-1",
            "host": "elsewhere",
            "pid": 1,
            "pid_started": 1,
            "heartbeat_at": AT,
        }
    ],
    "requests": [
        _request(
            "a",
            "stored",
            image_path="images/aa/a.png",
            image_sha256="0" * 64,
            image_bytes=10,
            image_format="PNG",
            width=1024,
            height=1024,
        ),
        _request("b", "submitted", claimed_by="f" * 32),
        _request("c", "unknown"),
        _request("d", "planned", idempotency_key=None),
        *(_request(letter, state) for letter, state in _OTHER_STATES.items()),
    ],
    "submissions": [
        _submission("a", task_id="task-a", reserved_units=4500, charged_units=4500),
        _submission("b", task_id="task-b", reserved_units=4500),
        _submission("c", posts=2),
        *(_submission(letter, posts=1) for letter in _OTHER_STATES),
    ],
    "events": [
        _event("a", 0, "", "planned", "planned"),
        _event("a", 1, "planned", "submitting", "submitting"),
        _event("a", 2, "submitting", "accepted", "submitted"),
        _event("a", 3, "submitted", "completed", "completed"),
        _event("a", 4, "completed", "stored", "stored"),
        _event("d", 0, "", "planned", "planned"),
    ],
    "commitments": [{"scope": "day:2026-01-01", "committed_units": 13500, "spent_units": 4500}],
    "prices": [{"quality": "1K", "highest_units": 4500, "latest_units": 4500, "seen_at": AT}],
    "stops": [{"launch": "run-1", "at": AT, "error_code": "402", "error_message": "no credits"}],
    "attempts": [{"prompt_id": "p", "sample": 0, "attempt": 2, "at": AT, "raised_by": "a person"}],
    "account_readings": [
        {"id": 1, "at": AT, "run_id": "run-1", "used_units": 9000, "remaining_units": 1}
    ],
}


@contextlib.contextmanager
def engine_of(journal_url: str) -> Iterator[Engine]:
    """Yield an engine whose transactions include changes of tables; without foreign keys."""
    engine = create_engine(journal_url, poolclass=NullPool)
    if engine.dialect.name == "sqlite":

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, _record: Any) -> None:
            connection.isolation_level = None

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql("BEGIN IMMEDIATE")

    yield engine
    engine.dispose()


def make(journal_url: str, revision: str = "0001") -> None:
    """Create and fill the tables of a release, by its revision."""
    with engine_of(journal_url) as engine, engine.begin() as connection:
        migrations.run(connection, Revisions(revision, REVISIONS.folders))
        for name, rows in ROWS.items():
            connection.execute(insert(table(name, *(column(c) for c in rows[0]))), rows)


def content(journal_url: str, names: dict[str, list[dict[str, Any]]] = ROWS) -> dict[str, Any]:
    """Return the content of these tables and columns, in the same form.

    Without the owners, which are temporary and have other columns later.
    """
    found: dict[str, Any] = {}
    with engine_of(journal_url) as engine, engine.connect() as connection:
        for name, rows in names.items():
            if name == "owners":
                continue
            columns: list[ColumnClause[Any]] = [column(name) for name in rows[0]]
            query = select(*columns).select_from(table(name)).order_by(*columns[:2])
            found[name] = [dict(row) for row in connection.execute(query).mappings()]
    return found

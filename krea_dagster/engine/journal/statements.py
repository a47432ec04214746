"""The statements that write a batch of changes.

Made once: SQLAlchemy keeps their text, and a row costs some 6 µs more than by the driver alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Engine,
    Table,
    Update,
    bindparam,
    case,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite

from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.rows import JOINED, record_from_row
from krea_dagster.engine.journal.schema import (
    POSTGRES_NOW_US,
    commitments,
    events,
    files,
    prices,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.record import Record

#: How long the account's stop holds for the other shards of a launch: long enough that all of
#: them see it, short enough that a launch which is taken up again after topping up may buy.
STOP_HOLDS_S: Final = 300.0

#: The parameter that is added to a submission's ``posts``.
ADDED_POSTS: Final = "added_posts"

#: Sets the given columns of the request that stands at ``old_seq`` and is held by ``old_owner``.
REQUEST_UPDATE: Final = update(requests).where(
    requests.c.request_key == bindparam("old_key"),
    requests.c.seq == bindparam("old_seq"),
    requests.c.claimed_by == bindparam("old_owner"),
)

#: Sets the given columns of the submission ``old_key``.
SUBMISSION_UPDATE: Final = update(submissions).where(
    submissions.c.idempotency_key == bindparam("old_key")
)
#: As well, and adds ``ADDED_POSTS`` to its posts.
POSTED_UPDATE: Final = SUBMISSION_UPDATE.values(posts=submissions.c.posts + bindparam(ADDED_POSTS))

NEW_SUBMISSION: Final = insert(submissions).inline()
NEW_EVENT: Final = insert(events).inline()

_COMMITMENT: Final = select(commitments.c.committed_units, commitments.c.spent_units).where(
    commitments.c.scope == bindparam("wanted")
)
_PRICES: Final = select(
    prices.c.quality, prices.c.highest_units, prices.c.doubted_units, prices.c.doubted_in_row
)


def is_sqlite(database: Connection | Engine) -> bool:
    """Whether the database is SQLite."""
    return database.dialect.name == "sqlite"


def insertion(database: Connection | Engine, table: Table) -> Any:
    """Return an INSERT that may say what is done about a conflict."""
    return (sqlite.insert if is_sqlite(database) else postgresql.insert)(table)


def execute_for_all(
    connection: Connection, statement: Update, rows: Sequence[dict[str, Any]]
) -> bool:
    """Execute an UPDATE of one row for each of these; returns whether each has found its row."""
    return connection.execute(statement, rows).rowcount == len(rows)


def locked_records(connection: Connection, keys: Sequence[str]) -> dict[str, Record]:
    """Return the requests with these keys, kept from being changed by others meanwhile."""
    wanted = JOINED.where(requests.c.request_key.in_(keys))
    # SQLite has no such lock: there the whole file is locked already.
    rows = connection.execute(wanted.with_for_update(of=requests, key_share=True))
    return {row.request_key: record_from_row(row) for row in rows}


def events_of_run(
    connection: Connection, changes: Sequence[Change], run_id: str
) -> set[tuple[str, str, datetime]]:
    """Return which events a run has written about the requests of these changes: what, and when."""
    keys = {change.request_key for change in changes}
    query = select(events.c.request_key, events.c.event, events.c.at)
    rows = connection.execute(
        query.where(events.c.request_key.in_(keys), events.c.run_id == run_id)
    )
    return {(row.request_key, row.event, row.at) for row in rows}


def purchases_of_tasks(connection: Connection, task_ids: Sequence[str]) -> dict[str, str]:
    """Return the Idempotency-Keys of the submissions that have these tasks, by task id."""
    query = select(submissions.c.task_id, submissions.c.idempotency_key)
    rows = connection.execute(query.where(submissions.c.task_id.in_(task_ids)))
    return {row.task_id: row.idempotency_key for row in rows}


def active_stop(connection: Connection, launch: str, at: datetime) -> tuple[str, str] | None:
    """Return the code and the message of the stop that holds for a launch."""
    since: Any = stops.c.at >= at - timedelta(seconds=STOP_HOLDS_S)
    if not is_sqlite(connection):  # by its own clock, as it was written
        since = text(f"stops.at >= {POSTGRES_NOW_US} - {int(STOP_HOLDS_S * 1_000_000)}")
    query = select(stops.c.error_code, stops.c.error_message)
    row = connection.execute(query.where(stops.c.launch == launch, since)).first()
    return None if row is None else (row.error_code, row.error_message)


def commitment_of(connection: Connection, scope: str) -> tuple[int, int]:
    """Return what a scope has committed and spent, in units. Its row must be there."""
    row = connection.execute(_COMMITMENT, {"wanted": scope}).one()
    return row.committed_units, row.spent_units


def known_prices(connection: Connection) -> Sequence[Any]:
    """Return what is known of the prices: one row for each quality."""
    return connection.execute(_PRICES).all()


def add_to_commitments(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add to what scopes have committed and spent."""
    statement = insertion(connection, commitments)
    sums = {
        name: commitments.c[name] + statement.excluded[name]
        for name in ("committed_units", "spent_units")
    }
    upsert = statement.on_conflict_do_update(index_elements=["scope"], set_=sums)
    connection.execute(upsert, rows)


def upsert_prices(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Keep the latest price of qualities, the highest, and the last that was not believed."""
    statement = insertion(connection, prices)
    new = statement.excluded
    # Compared here, because two runs may have read the same highest price.
    greater = func.max if is_sqlite(connection) else func.greatest
    seen = {
        "highest_units": greater(prices.c.highest_units, new.highest_units),
        "latest_units": new.latest_units,
        "doubted_units": func.coalesce(new.doubted_units, prices.c.doubted_units),
        "doubted_in_row": case(
            (new.doubted_in_row > 0, prices.c.doubted_in_row + new.doubted_in_row), else_=0
        ),
        "seen_at": new.seen_at,
    }
    connection.execute(statement.on_conflict_do_update(index_elements=["quality"], set_=seen), rows)


def upsert_files(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Keep whether files lie in a storage root."""
    statement = insertion(connection, files)
    new = statement.excluded
    seen = {
        # Its own time, as long as it has only gone missing.
        "at": case((new.missing_since.is_(None), new.at), else_=files.c.at),
        "missing_since": new.missing_since,
    }
    upsert = statement.on_conflict_do_update(index_elements=["request_key", "root_id"], set_=seen)
    connection.execute(upsert, rows)

"""SQL statements that write requests and their changes.

Those of a batch of changes are built once for each database: building one costs more than its
execution. SQLAlchemy caches their text, so that a row costs some 6 µs more than with the driver
alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from sqlalchemy import (
    Connection,
    Engine,
    Select,
    Table,
    Update,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    or_,
    select,
    text,
    update,
)

from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.rows import RECORDS, record_from_row
from krea_dagster.engine.journal.schema import (
    POSTGRES_NOW_US,
    UtcTime,
    commitments,
    events,
    files,
    prices,
    requests,
    stops,
    submissions,
)
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event, State

#: How long a stop by the account holds for the other shards of a launch: long enough that all of
#: them see it, short enough that a launch that is started again after a top-up may buy.
STOP_HOLDS_S: Final = 300.0

#: Seconds after which a stop is removed. The clocks of the runs need not agree.
_STOP_KEPT_S: Final = 86_400.0

#: The name of the parameter that is added to a submission's ``posts``.
ADDED_POSTS: Final = "added_posts"

#: Sets the given columns of a request, if ``old_seq`` is its last event and ``old_owner`` holds it.
REQUEST_UPDATE: Final = update(requests).where(
    requests.c.request_key == bindparam("old_key"),
    requests.c.seq == bindparam("old_seq"),
    requests.c.claimed_by == bindparam("old_owner"),
)

#: Sets the given columns of the submission ``old_key``.
SUBMISSION_UPDATE: Final = update(submissions).where(
    submissions.c.idempotency_key == bindparam("old_key")
)
#: The same, and adds ``ADDED_POSTS`` to its posts.
POSTED_UPDATE: Final = SUBMISSION_UPDATE.values(posts=submissions.c.posts + bindparam(ADDED_POSTS))

NEW_SUBMISSION: Final = insert(submissions).inline()
NEW_EVENT: Final = insert(events).inline()

_COMMITMENT: Final = select(commitments.c.committed_units, commitments.c.spent_units).where(
    commitments.c.scope == bindparam("wanted")
)
_PRICES: Final = select(
    prices.c.quality, prices.c.highest_units, prices.c.doubted_units, prices.c.doubted_in_row
)


_PURCHASES: Final = select(submissions.c.task_id, submissions.c.idempotency_key).where(
    submissions.c.task_id.in_(bindparam("task_ids", expanding=True))
)


def is_sqlite(database: Connection | Engine) -> bool:
    """Return whether the database is SQLite."""
    return database.dialect.name == "sqlite"


def insertion(database: Connection | Engine, table: Table) -> Any:
    """Return an INSERT that may say what happens on a conflict."""
    return _insertion(table, sqlite=is_sqlite(database))


def _insertion(table: Table, *, sqlite: bool) -> Any:
    # Here, because a journal has one of them, and PostgreSQL's takes as long as ten other modules.
    if sqlite:
        from sqlalchemy.dialects.sqlite import insert as insert_on_sqlite

        return insert_on_sqlite(table)
    from sqlalchemy.dialects.postgresql import insert as insert_on_postgresql

    return insert_on_postgresql(table)


def lock_transaction(connection: Connection, number: int) -> None:
    """Wait for other transactions that took this lock. SQLite locks the whole file anyway."""
    if not is_sqlite(connection):
        connection.execute(select(func.pg_advisory_xact_lock(number)))


def lock_requests(connection: Connection, *conditions: Any) -> None:
    """Lock requests in the order of their keys, so that no two transactions deadlock.

    An UPDATE locks them in the order in which it finds them. SQLite locks the whole file.
    """
    if not is_sqlite(connection):
        connection.execute(
            select(requests.c.request_key)
            .where(*conditions)
            .order_by(requests.c.request_key)
            .with_for_update(key_share=True)
        )


def insert_planned(
    connection: Connection, rows: Sequence[dict[str, Any]], run_id: str, at: datetime
) -> int:
    """Insert the rows of planned requests that are new, with their events; return their number."""
    new = connection.execute(
        insertion(connection, requests).on_conflict_do_nothing().returning(requests.c.request_key),
        rows,
    )
    first = [
        {
            "request_key": key,
            "seq": 0,
            "at": at,
            "run_id": run_id,
            "from_state": "",
            "event": Event.PLANNED.value,
            "to_state": State.PLANNED.value,
            "idempotency_key": None,
            "data": None,
        }
        for key in new.scalars()
    ]
    if first:
        connection.execute(insert(events), first)
    return len(first)


def defer_requests(
    connection: Connection, keys: Sequence[str], owner: str, run_id: str, values: dict[str, Any]
) -> None:
    """Defer the requests among these that have another reason, and that no other run holds.

    ``values`` are the time and the reason: ``updated_at``, ``error_code`` and ``error_message``.
    """
    changed = (
        requests.c.request_key.in_(keys),
        or_(requests.c.claimed_by.is_(None), requests.c.claimed_by == owner),
        or_(
            requests.c.state == State.PLANNED.value,
            and_(
                requests.c.state == State.DEFERRED.value,
                func.coalesce(requests.c.error_code, "") != values["error_code"],
            ),
        ),
    )
    lock_requests(connection, *changed)
    event = {
        "request_key": requests.c.request_key,
        "seq": requests.c.seq + 1,
        "at": literal(values["updated_at"], UtcTime),
        "run_id": literal(run_id),
        "from_state": requests.c.state,
        "event": literal(Event.DEFERRED.value),
        "to_state": literal(State.DEFERRED.value),
    }
    rows = select(*event.values()).where(*changed)
    connection.execute(insert(events).from_select(list(event), rows))
    deferred = {"state": State.DEFERRED.value, "seq": requests.c.seq + 1, **values}
    connection.execute(update(requests).where(*changed).values(deferred))


def execute_for_all(
    connection: Connection, statement: Update, rows: Sequence[dict[str, Any]]
) -> bool:
    """Execute an UPDATE of one row for each of these; return whether each found its row."""
    return connection.execute(statement, rows).rowcount == len(rows)


def locked_records(connection: Connection, keys: Sequence[str]) -> dict[str, Record]:
    """Return the requests with these keys, locked against changes by others."""
    wanted = RECORDS.where(requests.c.request_key.in_(keys))
    # Without effect on SQLite, where the whole file is locked already.
    rows = connection.execute(wanted.with_for_update(of=requests, key_share=True))
    return {row.request_key: record_from_row(row) for row in rows}


def events_of_run(
    connection: Connection, changes: Sequence[Change], run_id: str
) -> set[tuple[str, str, datetime]]:
    """Return the events that a run has written for the requests of these changes."""
    keys = {change.request_key for change in changes}
    query = select(events.c.request_key, events.c.event, events.c.at)
    rows = connection.execute(
        query.where(events.c.request_key.in_(keys), events.c.run_id == run_id)
    )
    return {(row.request_key, row.event, row.at) for row in rows}


def purchases_of_tasks(connection: Connection, task_ids: Sequence[str]) -> dict[str, str]:
    """Return the Idempotency-Keys of the submissions that have these tasks, by task id."""
    rows = connection.execute(_PURCHASES, {"task_ids": task_ids})
    return {row.task_id: row.idempotency_key for row in rows}


def active_stop(connection: Connection, launch: str, at: datetime) -> tuple[str, str] | None:
    """Return the code and the message of the stop that is in force for a launch."""
    values: dict[str, Any] = {"wanted": launch}
    sqlite = is_sqlite(connection)
    if sqlite:
        values["since"] = at - timedelta(seconds=STOP_HOLDS_S)
    row = connection.execute(_active_stop(sqlite=sqlite), values).first()
    return None if row is None else (row.error_code, row.error_message)


@lru_cache
def _active_stop(*, sqlite: bool) -> Select[Any]:
    since: Any = stops.c.at >= bindparam("since")
    if not sqlite:  # by the server's clock, as it was written
        since = text(f"stops.at >= {POSTGRES_NOW_US} - {int(STOP_HOLDS_S * 1_000_000)}")
    query = select(stops.c.error_code, stops.c.error_message)
    return query.where(stops.c.launch == bindparam("wanted"), since)


def remove_old_stops(connection: Connection, at: datetime) -> None:
    """Remove the stops of launches that ended long ago."""
    before: Any = at - timedelta(seconds=_STOP_KEPT_S)
    if not is_sqlite(connection):  # by the server's clock, as it was written
        before = literal_column(f"{POSTGRES_NOW_US} - {int(_STOP_KEPT_S * 1_000_000)}", UtcTime)
    connection.execute(delete(stops).where(stops.c.at < before))


def commitment_of(connection: Connection, scope: str) -> tuple[int, int]:
    """Return what a scope has committed and spent, in units. Its row must exist."""
    row = connection.execute(_COMMITMENT, {"wanted": scope}).one()
    return row.committed_units, row.spent_units


def known_prices(connection: Connection) -> Sequence[Any]:
    """Return the known prices, one row for each quality."""
    return connection.execute(_PRICES).all()


def add_to_commitments(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Add to what scopes have committed and spent."""
    connection.execute(_commitment_upsert(sqlite=is_sqlite(connection)), rows)


@lru_cache
def _commitment_upsert(*, sqlite: bool) -> Any:
    statement = _insertion(commitments, sqlite=sqlite)
    sums = {
        name: commitments.c[name] + statement.excluded[name]
        for name in ("committed_units", "spent_units")
    }
    return statement.on_conflict_do_update(index_elements=["scope"], set_=sums)


def upsert_prices(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Keep the latest, the highest and the last implausible price of each quality."""
    connection.execute(_price_upsert(sqlite=is_sqlite(connection)), rows)


@lru_cache
def _price_upsert(*, sqlite: bool) -> Any:
    statement = _insertion(prices, sqlite=sqlite)
    new = statement.excluded
    # Compared in the database, because two runs may have read the same highest price.
    greater = func.max if sqlite else func.greatest
    seen = {
        "highest_units": greater(prices.c.highest_units, new.highest_units),
        "latest_units": new.latest_units,
        "doubted_units": func.coalesce(new.doubted_units, prices.c.doubted_units),
        "doubted_in_row": case(
            (new.doubted_in_row > 0, prices.c.doubted_in_row + new.doubted_in_row), else_=0
        ),
        "seen_at": new.seen_at,
    }
    return statement.on_conflict_do_update(index_elements=["quality"], set_=seen)


def upsert_files(connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
    """Note whether files are in a storage root."""
    connection.execute(_file_upsert(sqlite=is_sqlite(connection)), rows)


@lru_cache
def _file_upsert(*, sqlite: bool) -> Any:
    statement = _insertion(files, sqlite=sqlite)
    new = statement.excluded
    seen = {
        # The time of a file that is missing stays the time at which it was stored.
        "at": case((new.missing_since.is_(None), new.at), else_=files.c.at),
        "missing_since": new.missing_since,
    }
    return statement.on_conflict_do_update(index_elements=["request_key", "root_id"], set_=seen)

"""Bulk reads of the journal's purchases for the spend tables, as a stream of columns.

The driver's cursor returns thousands of rows at once; no object is made for a row. Times are
microseconds since 1970, UTC, and money is in units: integers, so that sums are exact.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any, Final

import pyarrow as pa
from sqlalchemy import (
    BigInteger,
    Connection,
    Select,
    Text,
    and_,
    case,
    cast,
    func,
    or_,
    select,
    type_coerce,
)

from krea_dagster.engine.journal.rows import rows_with
from krea_dagster.engine.journal.schema import (
    account_entries,
    attributions,
    buyers,
    commitments,
    events,
    microseconds,
    prompt_tables,
    requests,
    submissions,
    time_of,
    verdicts,
)
from krea_dagster.engine.states import Event, State

#: One row per purchase. The columns from ``state`` to ``error_code`` are the request's, and null
#: unless this is its latest purchase. For earlier ones ``said`` is the data, as JSON, of the event
#: that ended them.
PURCHASE_SCHEMA: Final = pa.schema(
    [
        ("sent_at", pa.int64()),
        ("submitted_at", pa.int64()),
        ("settled_at", pa.int64()),
        ("run_id", pa.string()),
        ("partition_key", pa.string()),
        ("prompt_table", pa.string()),
        ("table_id", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("attribution_id", pa.int64()),
        ("number", pa.int32()),
        ("request_key", pa.string()),
        ("idempotency_key", pa.string()),
        ("task_id", pa.string()),
        ("committed_units", pa.int64()),
        ("reserved_units", pa.int64()),
        ("charged_units", pa.int64()),
        ("billing_rule", pa.string()),
        ("user_group", pa.string()),
        ("model", pa.string()),
        ("quality", pa.string()),
        ("size", pa.string()),
        ("seed", pa.int32()),
        ("attempt", pa.int32()),
        ("state", pa.string()),
        ("completed_at", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("error_code", pa.string()),
        ("said", pa.string()),
    ]
)

#: Rows per batch.
_ROWS: Final = 20_000
DAY_US: Final = 86_400_000_000


@dataclass(frozen=True)
class PurchaseTotals:
    """The number of purchases of a month or a day, and their money in units.

    ``settled`` counts those whose charge is known. A table is complete if its totals are equal to
    the journal's.
    """

    purchases: int = 0
    settled: int = 0
    committed_units: int = 0
    reserved_units: int = 0
    charged_units: int = 0

    def __add__(self, other: PurchaseTotals) -> PurchaseTotals:
        """Return the sum."""
        return PurchaseTotals(
            self.purchases + other.purchases,
            self.settled + other.settled,
            self.committed_units + other.committed_units,
            self.reserved_units + other.reserved_units,
            self.charged_units + other.charged_units,
        )


def totals_by_month(connection: Connection) -> dict[str, PurchaseTotals]:
    """Return the totals of each UTC month, as ``YYYY-MM``, in which a purchase was sent."""
    money = (
        submissions.c.committed_units,
        submissions.c.reserved_units,
        submissions.c.charged_units,
    )
    day = _day(submissions.c.sent_at)
    found = connection.execute(
        select(
            day.label("day"),
            func.count(),
            func.count(submissions.c.charged_units),
            *(cast(func.coalesce(func.sum(column), 0), BigInteger) for column in money),
        ).group_by(day)
    )
    months: dict[str, PurchaseTotals] = {}
    for number, *figures in found:
        month = month_of(int(number) * DAY_US)
        months[month] = months.get(month, PurchaseTotals()) + PurchaseTotals(*map(int, figures))
    return months


def newest_event(connection: Connection) -> int:
    """Return the time of the newest event, 0 where there is none."""
    newest = connection.execute(select(func.max(type_coerce(requests.c.updated_at, BigInteger))))
    return int(newest.scalar() or 0)


def changed_since(connection: Connection, since_us: int) -> set[str]:
    """Return the months of purchases whose request had an event since a time."""
    changed_at = type_coerce(requests.c.updated_at, BigInteger)
    day = _day(submissions.c.sent_at)
    # Not a join: SQLite would scan all purchases first.
    touched = select(requests.c.request_key).where(changed_at >= since_us)
    days = connection.execute(
        select(day).where(submissions.c.request_key.in_(touched)).distinct()
    ).scalars()
    return {month_of(int(number) * DAY_US) for number in days}


def events_since(connection: Connection, since_us: int) -> str:
    """Return a text that differs once a request had a further event since a time."""
    changed_at = type_coerce(requests.c.updated_at, BigInteger)
    # With the time of the newest, which tells a restored journal that has gone another way.
    counts = select(func.count(), func.sum(requests.c.seq), func.max(changed_at))
    found = connection.execute(counts.where(changed_at >= since_us)).one()
    return "/".join(str(number or 0) for number in found)


def money_mark(connection: Connection) -> str:
    """Return a text that differs once a purchase or entry is new, or its money has changed.

    Each change of money moves the sums of its month, in the same transaction.
    """
    months = commitments.c.scope.between("month:", "month;")
    money = (func.sum(commitments.c.committed_units), func.sum(commitments.c.spent_units))
    found = connection.execute(select(func.count(), *money).where(months)).one()
    judged = connection.execute(select(func.max(verdicts.c.number))).scalar()
    entered = connection.execute(select(func.count(account_entries.c.entry_id))).scalar()
    return "/".join(str(number or 0) for number in (*found, judged, entered))


def purchases(
    connection: Connection, months: Collection[str] | None = None
) -> Iterator[pa.RecordBatch]:
    """Yield the purchases that were sent in these UTC months, or all, unordered."""
    query = _QUERY
    if months is not None:
        sent_at = type_coerce(submissions.c.sent_at, BigInteger)
        spans = [span_of(month) for month in sorted(months)]
        query = query.where(or_(*(and_(sent_at >= low, sent_at < high) for low, high in spans)))
    compiled = query.compile(dialect=connection.dialect, compile_kwargs={"literal_binds": True})
    with closing(_cursor(connection)) as cursor:
        cursor.execute(str(compiled))
        while rows := cursor.fetchmany(_ROWS):
            columns = [
                pa.array(column, field.type)
                for column, field in zip(zip(*rows, strict=True), PURCHASE_SCHEMA, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(columns, schema=PURCHASE_SCHEMA)


def _cursor(connection: Connection) -> Any:
    """Return a cursor of the driver that leaves its rows with the server until they are fetched."""
    driver = connection.connection
    if connection.dialect.name == "sqlite":
        return driver.cursor()
    return driver.cursor("krea_purchases")


def states_of(connection: Connection, keys: list[str]) -> dict[str, str]:
    """Return the states of the requests with these keys; unknown keys are left out."""
    query = select(requests.c.request_key, requests.c.state)
    rows = rows_with(connection, query, requests.c.request_key, keys)
    return {row.request_key: row.state for row in rows}


def load_attribution(connection: Connection) -> dict[str, pa.Table]:
    """Return what purchases are attributed with, as three tables.

    ``attributions`` and ``buyers`` are those of the journal. ``later`` has the highest attempt of
    each row's sample whose image is stored, if it is not the first.
    """
    raised = (
        select(
            submissions.c.table_id,
            submissions.c.prompt_id,
            submissions.c.sample,
            func.max(requests.c.attempt).label("attempt"),
        )
        .join(requests, submissions.c.request_key == requests.c.request_key)
        .where(
            requests.c.attempt > 0,
            requests.c.state == State.STORED.value,
            submissions.c.prompt_id.is_not(None),
        )
        .group_by(submissions.c.table_id, submissions.c.prompt_id, submissions.c.sample)
    )
    found = {}
    for name, query in (
        ("attributions", select(attributions)),
        ("buyers", select(buyers)),
        ("later", raised),
    ):
        rows = connection.execute(query).all()
        fields = [
            pa.field(column.name, _KINDS.get(column.name, pa.string()))
            for column in query.selected_columns
        ]
        values = zip(*rows, strict=True) if rows else [()] * len(fields)
        columns = [pa.array(column, one.type) for column, one in zip(values, fields, strict=True)]
        found[name] = pa.table(columns, schema=pa.schema(fields))
    return found


_KINDS: Final = {
    "attribution_id": pa.int64(),
    "sample": pa.int32(),
    "attempt": pa.int32(),
}


def month_of(at_us: int) -> str:
    """Return the UTC month of a time, as ``YYYY-MM``."""
    at = time_of(at_us)
    return f"{at.year:04}-{at.month:02}"


def span_of(month: str) -> tuple[int, int]:
    """Return the begin of a month and of the next one, in microseconds."""
    year, number = int(month[:4]), int(month[5:])
    begins = time_of(0).replace(year=year, month=number)
    ends = begins.replace(year=year + number // 12, month=number % 12 + 1)
    return microseconds(begins), microseconds(ends)


def _day(column: Any) -> Any:
    return type_coerce(column, BigInteger).op("/")(DAY_US)


def _query() -> Select[Any]:
    present = submissions.c.idempotency_key == requests.c.idempotency_key
    ended = (
        select(cast(events.c.data, Text))
        .where(
            events.c.request_key == submissions.c.request_key,
            events.c.idempotency_key == submissions.c.idempotency_key,
            events.c.event.in_([Event.FAILED.value, Event.REFUSED.value]),
        )
        .order_by(events.c.seq.desc())
        .limit(1)
        .scalar_subquery()
    )
    of_request = {"state", "completed_at", "width", "height", "error_code"}
    columns: list[Any] = []
    for name in PURCHASE_SCHEMA.names:
        if name == "prompt_table":
            columns.append(prompt_tables.c.name.label(name))
        elif name == "said":
            columns.append(case((present, None), else_=ended).label(name))
        elif name in of_request:
            columns.append(case((present, requests.c[name]), else_=None).label(name))
        else:
            table = submissions if name in submissions.c else requests
            columns.append(table.c[name])
    return select(*columns).select_from(
        submissions.join(requests, submissions.c.request_key == requests.c.request_key).outerjoin(
            prompt_tables, submissions.c.table_id == prompt_tables.c.table_id
        )
    )


_QUERY: Final = _query()

"""Rows of the journal's tables as the values that others read, and the queries that find them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import datetime
from itertools import islice
from typing import Any, Final, TypeVar

from sqlalchemy import ColumnElement, Connection, Select, case, false, func, select

from krea_dagster.engine.budget import scopes_of
from krea_dagster.engine.journal.changes import stored_image
from krea_dagster.engine.journal.schema import requests, submissions
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest

_T = TypeVar("_T")

#: Keys per statement: below the limit of parameters of every database.
_CHUNK: Final = 500


@dataclass(frozen=True)
class Charge:
    """One submission: a purchase, or what may have been one. Money in units, None if not known.

    ``state`` is the request's, where this submission is its present one, and else None: an
    earlier one ended without an image and, if the journal is right, without a charge.
    """

    idempotency_key: str
    request_key: str
    number: int
    run_id: str
    partition_key: str
    quality: str
    sent_at: datetime
    posts: int
    task_id: str | None
    submitted_at: datetime | None
    expected_units: int
    committed_units: int
    reserved_units: int | None
    charged_units: int | None
    settled_at: datetime | None
    state: State | None
    scopes: tuple[str, ...] = ()
    table_id: str = ""
    replayed: bool = False


@dataclass(frozen=True)
class AccountReading:
    """What ``GET /v1/credits`` said during a run, in units: the key's use, or the account's.

    ``api_key`` is the fingerprint of the key; None in rows of older versions.
    """

    at: datetime
    run_id: str
    used_units: int
    remaining_units: int
    api_key: str | None = None


_REQUEST_FIELDS: Final = tuple(one.name for one in fields(ImageRequest))
_IMAGE_COLUMNS: Final = (
    "image_path",
    "image_sha256",
    "image_bytes",
    "image_format",
    "width",
    "height",
)

#: Fields of a record that are columns of the same name, of the request and of its submission.
_OF_REQUEST: Final = (
    "state",
    "partition_key",
    "idempotency_key",
    "result_url",
    "completed_at",
    "stored_at",
    "error_code",
    "error_message",
    "claimed_by",
    "seq",
    "table_id",
)
_OF_SUBMISSION: Final = (
    "run_id",
    "sent_at",
    "submitted_at",
    "task_id",
    "reserved_units",
    "charged_units",
    "billing_rule",
    "user_group",
    "scopes",
    "callback_url",
    "api_key",
)


def _records_query() -> Select[Any]:
    earlier = submissions.alias("earlier")
    count = (
        select(func.coalesce(func.max(earlier.c.number), 0))
        .where(earlier.c.request_key == requests.c.request_key)
        .scalar_subquery()
    )
    sent = submissions.c
    return select(
        *(requests.c[name] for name in (*_REQUEST_FIELDS, *_IMAGE_COLUMNS, *_OF_REQUEST)),
        *(sent[name] for name in _OF_SUBMISSION),
        func.coalesce(sent.number, 0).label("submission"),
        count.label("submissions"),
        func.coalesce(sent.committed_units, 0).label("committed_units"),
        func.coalesce(sent.expected_units, 0).label("expected_units"),
        func.coalesce(sent.replayed, false()).label("replayed"),
        sent.partition_key.label("bought_for"),
        func.coalesce(sent.table_id, "").label("bought_for_table"),
    ).select_from(
        requests.outerjoin(submissions, requests.c.idempotency_key == sent.idempotency_key)
    )


#: Every request, with its present submission where it has one.
RECORDS: Final = _records_query()

#: Every submission.
CHARGES: Final = select(
    *(submissions.c[one.name] for one in fields(Charge) if one.name not in ("quality", "state")),
    requests.c.quality,
    case((submissions.c.idempotency_key == requests.c.idempotency_key, requests.c.state)).label(
        "state"
    ),
).join(requests, submissions.c.request_key == requests.c.request_key)


def record_from_row(row: Any) -> Record:
    """Return the record in a row of ``RECORDS``."""
    columns = row._asdict()
    request = ImageRequest(**{name: columns.pop(name) for name in _REQUEST_FIELDS})
    image = stored_image({name: columns.pop(name) for name in _IMAGE_COLUMNS})
    columns["state"] = State(columns["state"])
    columns["scopes"] = _scopes(columns["scopes"])
    return Record(request=request, image=image, **columns)


def charge_from_row(row: Any) -> Charge:
    """Return the charge in a row of ``CHARGES``."""
    columns = row._asdict()
    columns["state"] = None if columns["state"] is None else State(columns["state"])
    columns["scopes"] = _scopes(columns["scopes"])
    return Charge(**columns)


def scopes_of_charge(charge: Charge) -> tuple[str, ...]:
    """Return the scopes that a purchase counts for."""
    return scopes_of(
        charge.run_id,
        charge.sent_at,
        charge.partition_key,
        charge.scopes,
        table_id=charge.table_id,
    )


def _scopes(text: str | None) -> tuple[str, ...]:
    return tuple(json.loads(text)) if text else ()


def read_records(connection: Connection, keys: Iterable[str]) -> dict[str, Record]:
    """Return the requests with these keys; unknown keys are left out."""
    rows = rows_with(connection, RECORDS, requests.c.request_key, keys)
    return {row.request_key: record_from_row(row) for row in rows}


def rows_with(
    connection: Connection, query: Select[Any], column: ColumnElement[Any], values: Iterable[Any]
) -> Iterator[Any]:
    """Yield the rows of a query whose column has one of these values."""
    for chunk in chunks(values):
        yield from connection.execute(query.where(column.in_(chunk)))


def chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    """Yield the items in lists that a statement can take as parameters."""
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk

"""Rows of the journal's tables as the values that others read, and the queries that find them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import Any, Final, TypeVar

from sqlalchemy import Connection, Row, Select, func, select

from krea_dagster.engine.journal.schema import requests, submissions
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.states import State
from krea_dagster.models import ImageRequest

_T = TypeVar("_T")

#: Keys per statement: under every database's limit of parameters.
_CHUNK: Final = 500


@dataclass(frozen=True)
class Charge:
    """One submission: a purchase, or what may have been one. Money in units, None if not known.

    ``state`` is the request's, where this submission is its present one, and else None: an
    earlier one ended without an image and, as far as is known, without a charge.
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
    """What ``GET /v1/credits`` said during a run, in units: the key's use, or the account's."""

    at: datetime
    run_id: str
    used_units: int
    remaining_units: int


#: Columns of the present submission that a record shows.
_SUBMISSION: Final = (
    "number",
    "run_id",
    "sent_at",
    "submitted_at",
    "task_id",
    "reserved_units",
    "charged_units",
    "committed_units",
    "expected_units",
    "billing_rule",
    "user_group",
    "scopes",
    "callback_url",
    "api_key",
    "replayed",
)


def _joined() -> Select[Any]:
    """Requests, each beside its present submission where it has one, and how many it has had."""
    earlier = submissions.alias("earlier")
    count = (
        select(func.coalesce(func.max(earlier.c.number), 0))
        .where(earlier.c.request_key == requests.c.request_key)
        .scalar_subquery()
        .label("submissions")
    )
    bought_for = submissions.c.partition_key.label("bought_for")
    for_table = submissions.c.table_id.label("for_table")
    columns = (*(submissions.c[name] for name in _SUBMISSION), bought_for, for_table, count)
    return select(requests, *columns).select_from(
        requests.outerjoin(submissions, requests.c.idempotency_key == submissions.c.idempotency_key)
    )


#: Every request as a record needs it.
JOINED: Final = _joined()


def read_records(connection: Connection, keys: Iterable[str]) -> dict[str, Record]:
    """The requests with these keys; unknown keys are left out."""
    found: dict[str, Record] = {}
    for chunk in chunks(keys):
        query = JOINED.where(requests.c.request_key.in_(chunk))
        found.update((row.request_key, record_from_row(row)) for row in connection.execute(query))
    return found


def record_from_row(row: Any) -> Record:
    """The record in a row of ``JOINED``."""
    image = None
    if row.image_path is not None:
        image = StoredImage(
            path=row.image_path,
            sha256=row.image_sha256,
            bytes=row.image_bytes,
            format=row.image_format,
            width=row.width,
            height=row.height,
        )
    return Record(
        request=ImageRequest(
            request_key=row.request_key,
            prompt=row.prompt,
            size=row.size,
            quality=row.quality,
            seed=row.seed,
            nsfw_check=row.nsfw_check,
            attempt=row.attempt,
            model=row.model,
        ),
        state=State(row.state),
        partition_key=row.partition_key,
        submission=row.number or 0,
        idempotency_key=row.idempotency_key,
        sent_at=row.sent_at,
        submitted_at=row.submitted_at,
        task_id=row.task_id,
        reserved_units=row.reserved_units,
        charged_units=row.charged_units,
        committed_units=row.committed_units or 0,
        billing_rule=row.billing_rule,
        user_group=row.user_group,
        run_id=row.run_id,
        result_url=row.result_url,
        completed_at=row.completed_at,
        stored_at=row.stored_at,
        image=image,
        error_code=row.error_code,
        error_message=row.error_message,
        claimed_by=row.claimed_by,
        seq=row.seq,
        submissions=row.submissions,
        expected_units=row.expected_units or 0,
        bought_for=row.bought_for,
        scopes=_scopes(row.scopes),
        callback_url=row.callback_url,
        api_key=row.api_key,
        replayed=bool(row.replayed),
        table_id=row.table_id,
        bought_for_table=row.for_table or "",
    )


def _scopes(text: str | None) -> tuple[str, ...]:
    return tuple(json.loads(text)) if text else ()


#: Every submission as a charge needs it.
CHARGES: Final = select(
    submissions,
    requests.c.quality,
    requests.c.state,
    requests.c.idempotency_key.label("present_key"),
).join(requests, submissions.c.request_key == requests.c.request_key)


def charge_from_row(row: Row[Any]) -> Charge:
    """The charge in a row of ``CHARGES``."""
    present = row.idempotency_key == row.present_key
    return Charge(
        idempotency_key=row.idempotency_key,
        request_key=row.request_key,
        number=row.number,
        run_id=row.run_id,
        partition_key=row.partition_key,
        quality=row.quality,
        sent_at=row.sent_at,
        posts=row.posts,
        task_id=row.task_id,
        submitted_at=row.submitted_at,
        expected_units=row.expected_units,
        committed_units=row.committed_units,
        reserved_units=row.reserved_units,
        charged_units=row.charged_units,
        settled_at=row.settled_at,
        state=State(row.state) if present else None,
        scopes=_scopes(row.scopes),
        table_id=row.table_id,
        replayed=bool(row.replayed),
    )


def chunks(items: Iterable[_T]) -> Iterator[list[_T]]:
    """The items in lists that a statement can take as parameters."""
    iterator = iter(items)
    while chunk := list(islice(iterator, _CHUNK)):
        yield chunk

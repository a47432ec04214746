"""The whole journal at one moment, streamed: what the checks of the books read."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Row, Select, select

from krea_dagster.engine.budget import Commitment
from krea_dagster.engine.journal.rows import (
    CHARGES,
    JOINED,
    AccountReading,
    Charge,
    charge_from_row,
    record_from_row,
)
from krea_dagster.engine.journal.schema import (
    account_readings,
    commitments,
    events,
    requests,
    submissions,
)
from krea_dagster.engine.record import Record


@dataclass(frozen=True)
class RequestEvents:
    """A request's state, and the events that led to it: ``(seq, event)`` in their order, as text.

    ``seq`` is the number that the request gives its last event.
    """

    request_key: str
    state: str
    seq: int
    events: Sequence[tuple[int, str]]


class Snapshot:
    """The journal at one moment. Rows stream by, a thousand at a time, in the order of the keys.

    All raise JournalError where they cannot be read.
    """

    def __init__(
        self,
        connection: Connection,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        self._connection = connection.execution_options(yield_per=1000)
        self._explained = explained

    @property
    def connection(self) -> Connection:
        """The connection itself, for those who read many columns at once."""
        return self._connection

    def records(self) -> Iterator[Record]:
        """Every request."""
        for row in self._rows(JOINED.order_by(requests.c.request_key)):
            yield record_from_row(row)

    def charges(self) -> Iterator[Charge]:
        """Every submission; those of one request follow one another by their numbers."""
        order = (submissions.c.request_key, submissions.c.number)
        for row in self._rows(CHARGES.order_by(*order)):
            yield charge_from_row(row)

    def request_events(self) -> Iterator[RequestEvents]:
        """Every request's events."""
        query = (
            select(
                requests.c.request_key,
                requests.c.state,
                requests.c.seq.label("last"),
                events.c.seq,
                events.c.event,
            )
            .select_from(requests.outerjoin(events))
            .order_by(requests.c.request_key, events.c.seq)
        )
        for key, group in groupby(self._rows(query), key=lambda row: str(row.request_key)):
            found = list(group)
            happened = [(row.seq, row.event) for row in found if row.event is not None]
            yield RequestEvents(key, found[0].state, found[0].last, happened)

    def commitments(self) -> dict[str, Commitment]:
        """What each run and day has committed and spent, by scope."""
        return {
            row.scope: Commitment(row.committed_units, row.spent_units)
            for row in self._rows(select(commitments))
        }

    def account_readings(self) -> list[AccountReading]:
        """What the account said, in its order."""
        query = select(account_readings).order_by(account_readings.c.id)
        return [
            AccountReading(row.at, row.run_id, row.used_units, row.remaining_units)
            for row in self._rows(query)
        ]

    def _rows(self, query: Select[Any]) -> Iterator[Row[Any]]:
        with self._explained("read"):
            yield from self._connection.execute(query)

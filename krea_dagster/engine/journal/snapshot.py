"""Consistent streaming reads of the whole journal, for the checks of its accounts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, Select, select

from krea_dagster.engine.budget import Commitment
from krea_dagster.engine.journal.entry_log import AccountEntry, read_entries
from krea_dagster.engine.journal.rows import (
    CHARGES,
    RECORDS,
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
    """A request's state and its events, ``(seq, event, state before)`` in order, as text.

    ``seq`` is the number of its last event, and ``kept_from_seq`` that of the first one that must
    be there, according to the request. The state before the first event is empty.
    """

    request_key: str
    state: str
    seq: int
    kept_from_seq: int
    events: Sequence[tuple[int, str, str]]


class Snapshot:
    """The journal at one moment. Rows are streamed in the order of their keys.

    All methods raise JournalError.
    """

    def __init__(
        self,
        connection: Connection,
        explained: Callable[[str], AbstractContextManager[None]],
    ) -> None:
        #: For queries in bulk.
        self.connection = connection.execution_options(yield_per=1000)
        self._explained = explained

    def records(self) -> Iterator[Record]:
        """Yield every request."""
        for row in self._rows(RECORDS.order_by(requests.c.request_key)):
            yield record_from_row(row)

    def charges(self) -> Iterator[Charge]:
        """Yield every submission, by request key and number."""
        order = (submissions.c.request_key, submissions.c.number)
        for row in self._rows(CHARGES.order_by(*order)):
            yield charge_from_row(row)

    def request_events(self) -> Iterator[RequestEvents]:
        """Yield the events of every request."""
        query = (
            select(
                requests.c.request_key,
                requests.c.state,
                requests.c.seq.label("last"),
                requests.c.kept_from_seq,
                events.c.seq,
                events.c.event,
                events.c.from_state,
            )
            .select_from(requests.outerjoin(events))
            .order_by(requests.c.request_key, events.c.seq)
        )
        for key, group in groupby(self._rows(query), key=lambda row: str(row.request_key)):
            found = list(group)
            happened = [
                (row.seq, row.event, row.from_state) for row in found if row.event is not None
            ]
            first = found[0]
            yield RequestEvents(key, first.state, first.last, first.kept_from_seq, happened)

    def commitments(self) -> dict[str, Commitment]:
        """Return what each scope (``budget.scopes_of``) has committed and spent."""
        return {
            row.scope: Commitment(row.committed_units, row.spent_units)
            for row in self._rows(select(commitments))
        }

    def account_readings(self) -> list[AccountReading]:
        """Return the readings of the account, in order."""
        columns = [account_readings.c[one.name] for one in fields(AccountReading)]
        query = select(*columns).order_by(account_readings.c.id)
        return [AccountReading(*row) for row in self._rows(query)]

    def entries(self) -> list[AccountEntry]:
        """Return what a person entered of the account, by day."""
        with self._explained("read"):
            return read_entries(self.connection)

    def _rows(self, query: Select[Any]) -> Iterator[Any]:
        with self._explained("read"):
            yield from self.connection.execute(query)

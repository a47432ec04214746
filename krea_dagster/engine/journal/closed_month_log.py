"""The months that were closed. Append only: a month is closed once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import Connection, select

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import closed_months
from krea_dagster.engine.journal.statements import insertion


@dataclass(frozen=True)
class ClosedMonth:
    """A closed month (``YYYY-MM``, UTC), what its statement says, and the hashes of its files.

    ``name`` is that of the files under the storage root, without ``.parquet`` and ``.html``. The
    ``adjusted_…`` units are what it changes of earlier statements.
    """

    month: str
    closed_at: datetime
    name: str
    sha256: str
    page_sha256: str
    purchases: int
    charged_units: int
    refunded_units: int
    at_stake_units: int
    adjusted_charged_units: int
    adjusted_refunded_units: int

    @property
    def net_units(self) -> int:
        """All that the statement says: its month without refunds, and the adjustments."""
        adjusted = self.adjusted_charged_units - self.adjusted_refunded_units
        return self.charged_units - self.refunded_units + adjusted


class ClosedMonthLog(DatabaseLog):
    """The closed months in a journal's database."""

    def all(self) -> list[ClosedMonth]:
        """Return the closed months in their order. Raises JournalError."""
        columns = [closed_months.c[one.name] for one in fields(ClosedMonth)]
        query = select(*columns).order_by(closed_months.c.month)
        return [ClosedMonth(*row) for row in self._database.fetch(query)]

    def add(self, closed: ClosedMonth) -> bool:
        """Close a month; return whether it was open. Raises JournalError."""

        def write(connection: Connection) -> bool:
            statement = insertion(connection, closed_months).values(**vars(closed))
            added = statement.on_conflict_do_nothing().returning(closed_months.c.month)
            return connection.execute(added).scalar() is not None

        return self._database.write("close a month in", write)

"""The months that were closed. Append only: a month is closed once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from datetime import datetime
from typing import Final

from sqlalchemy import Connection, insert, select

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import closed_months
from krea_dagster.engine.journal.sql import lock_transaction

#: The advisory lock of PostgreSQL for writers of closed months: a number that no other lock has.
_CLOSING: Final = 4_705_170_321


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

    def add(self, closed: ClosedMonth, write_files: Callable[[], None] = lambda: None) -> bool:
        """Close a month; return whether it was open. Raises JournalError.

        ``write_files`` is called if it is open, with the lock held, so that another host that
        closes it at the same time cannot replace the files.
        """

        def write(connection: Connection) -> bool:
            lock_transaction(connection, _CLOSING)
            known = select(closed_months.c.month).where(closed_months.c.month == closed.month)
            if connection.execute(known).scalar() is not None:
                return False
            write_files()
            connection.execute(insert(closed_months).values(**vars(closed)))
            return True

        return self._database.write("close a month in", write)

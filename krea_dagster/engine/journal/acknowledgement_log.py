"""What a person has acknowledged of the warnings about the spend: append only."""

from __future__ import annotations

from datetime import datetime

from sqlalchemy import insert, select

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import spend_acknowledgements
from krea_dagster.models import Acknowledgement


class AcknowledgementLog(DatabaseLog):
    """The acknowledgements in a journal's database. The last one of a warning counts."""

    def add(
        self, warning_id: str, reason: str | None, *, by: str, text: str | None, at: datetime
    ) -> None:
        """Enter an acknowledgement, or without a reason that it is withdrawn.

        ``text`` is what the warning said at that time, if known. Raises JournalError.
        """
        row = insert(spend_acknowledgements).values(
            warning_id=warning_id, reason=reason, person=by, text=text, at=at
        )
        self._database.write("acknowledge a warning in", lambda connection: connection.execute(row))

    def current(self) -> dict[str, Acknowledgement]:
        """Return the acknowledgements that are not withdrawn, by warning. Raises JournalError."""
        query = select(spend_acknowledgements).order_by(spend_acknowledgements.c.number)
        last = {row.warning_id: row for row in self._database.fetch(query)}
        return {
            warning_id: Acknowledgement(row.reason, row.person, row.at)
            for warning_id, row in last.items()
            if row.reason is not None
        }

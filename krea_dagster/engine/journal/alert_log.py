"""Warnings about the spend that are to be posted: each once, while it lasts.

A warning is written here before it is posted, and marked afterwards. So one whose posting failed is
not lost, also if it ends meanwhile. Several hosts may post: each claims a warning before, and a
claim is valid while its owner is alive (``owners.py``).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import datetime

from sqlalchemy import Connection, delete, or_, select, update

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.journal.schema import spend_alerts
from krea_dagster.engine.journal.sql import insertion


class AlertLog(DatabaseLog):
    """The alerts in a journal's database, by the channel that posts them."""

    def update(
        self,
        channel: str,
        found: Mapping[str, str],
        acknowledged: Collection[str] = (),
        *,
        at: datetime,
    ) -> None:
        """Enter the warnings that were found ``at`` a time, by id, as JSON; forget ended ones.

        Those that are posted and no longer found have ended, and those that are ``acknowledged``.
        What another host has seen later is kept.
        """
        of_channel = spend_alerts.c.channel == channel
        rows = [
            {"channel": channel, "warning_id": warning_id, "warning": text, "seen_at": at}
            for warning_id, text in sorted(found.items())
        ]

        def write(connection: Connection) -> None:
            for row in rows:
                new = insertion(connection, spend_alerts).values(row)
                changed = {"warning": row["warning"], "seen_at": at}
                connection.execute(
                    new.on_conflict_do_update(
                        index_elements=["channel", "warning_id"],
                        set_=changed,
                        where=spend_alerts.c.seen_at < at,
                    )
                )
            older = delete(spend_alerts).where(of_channel, spend_alerts.c.seen_at < at)
            connection.execute(older.where(spend_alerts.c.posted_at.is_not(None)))
            for part in chunks(sorted(acknowledged)):
                connection.execute(older.where(spend_alerts.c.warning_id.in_(part)))

        self._database.write("note alerts in", write)

    def waiting(self, channel: str) -> list[str]:
        """Return the ids of the warnings that are not posted, the oldest first."""
        query = (
            select(spend_alerts.c.warning_id)
            .where(spend_alerts.c.channel == channel, spend_alerts.c.posted_at.is_(None))
            .order_by(spend_alerts.c.seen_at, spend_alerts.c.warning_id)
        )
        return [row.warning_id for row in self._database.fetch(query)]

    def claim(self, channel: str, warning_id: str, owner: str) -> str | None:
        """Claim a warning for an owner and return it as JSON; None if another one has it."""

        def write(connection: Connection) -> str | None:
            dead = self._database.locks.dead(connection) - {owner}
            claimed_by = spend_alerts.c.claimed_by
            free = or_(claimed_by.is_(None), claimed_by == owner, claimed_by.in_(dead))
            text: str | None = connection.execute(
                update(spend_alerts)
                .where(spend_alerts.c.channel == channel, spend_alerts.c.warning_id == warning_id)
                .where(spend_alerts.c.posted_at.is_(None), free)
                .values(claimed_by=owner)
                .returning(spend_alerts.c.warning)
            ).scalar()
            return text

        return self._database.write("claim an alert in", write)

    def end(self, channel: str, warning_id: str, *, posted_at: datetime | None) -> None:
        """End a claim: the warning is posted, or waits for another attempt (None)."""
        done = (
            update(spend_alerts)
            .where(spend_alerts.c.channel == channel, spend_alerts.c.warning_id == warning_id)
            .values(claimed_by=None, posted_at=posted_at)
        )
        self._database.write("note a posted alert in", lambda connection: connection.execute(done))

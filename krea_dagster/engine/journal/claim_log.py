"""The runs that work with a journal, and the requests that each of them has claimed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, or_, select, update

from krea_dagster.engine.journal.database import Database, DatabaseLog
from krea_dagster.engine.journal.owners import Owner
from krea_dagster.engine.journal.rows import chunks, rows_with
from krea_dagster.engine.journal.schema import owners, requests
from krea_dagster.engine.journal.sql import insertion, lock_requests


class ClaimLog(DatabaseLog):
    """The owners and claims in a journal's database. A claim is valid while its owner is alive."""

    def __init__(self, database: Database) -> None:
        super().__init__(database)
        self._locks = database.locks

    def register(self, owner: Owner) -> None:
        """Enter a run that will claim requests, and take its lock."""
        with self._database.translated_errors("lock"):
            self._locks.take(owner.owner)
        now = self._locks.now()

        def write(connection: Connection) -> None:
            row = insertion(connection, owners).values(
                owner=owner.owner,
                run_id=owner.run_id,
                host=owner.host,
                pid=owner.pid,
                since=now,
                heartbeat_at=now,
            )
            # It may have been entered before a connection broke.
            connection.execute(row.on_conflict_do_nothing())

        self._database.write("register a run in", write)

    def heartbeat(self, owner: str) -> None:
        """Write the time at which a run is alive."""
        with self._database.translated_errors("lock"):
            self._locks.take(owner)
        beat = update(owners).where(owners.c.owner == owner).values(heartbeat_at=self._locks.now())
        self._database.write("write a heartbeat to", lambda connection: connection.execute(beat))

    def claim(self, keys: Iterable[str], owner: str) -> set[str]:
        """Claim requests that are free, and return the keys that the owner holds now.

        A request is free if no owner holds it, or if its owner is dead (``owners.py``).
        """
        wanted = sorted(keys)

        def write(connection: Connection) -> tuple[set[str], set[str]]:
            mine: set[str] = set()
            dead = self._locks.dead(connection) - {owner}
            free = or_(
                requests.c.claimed_by.is_(None),
                requests.c.claimed_by == owner,
                requests.c.claimed_by.in_(dead),
            )
            for chunk in chunks(wanted):
                chosen = requests.c.request_key.in_(chunk), free
                lock_requests(connection, *chosen)
                found = connection.execute(
                    update(requests)
                    .where(*chosen)
                    .values(claimed_by=owner)
                    .returning(requests.c.request_key)
                )
                mine.update(found.scalars())
            return mine, _remove_idle(connection, dead)

        mine, removed = self._database.write("claim requests in", write)
        for gone in removed:
            self._locks.forget(gone)
        return mine

    def unclaim(self, keys: Iterable[str], owner: str) -> None:
        """Give up an owner's claims on these requests."""
        wanted = sorted(keys)

        def write(connection: Connection) -> None:
            for chunk in chunks(wanted):
                mine = requests.c.request_key.in_(chunk), requests.c.claimed_by == owner
                lock_requests(connection, *mine)
                connection.execute(update(requests).where(*mine).values(claimed_by=None))

        self._database.write("release claims in", write)

    def release(self, owner: str) -> None:
        """Give up all claims of an owner and its lock, and remove it.

        The lock is also given back if the journal cannot be written.
        """
        mine = requests.c.claimed_by == owner

        def write(connection: Connection) -> None:
            lock_requests(connection, mine)
            connection.execute(update(requests).where(mine).values(claimed_by=None))
            connection.execute(delete(owners).where(owners.c.owner == owner))

        try:
            self._database.write("release claims in", write)
            self._locks.forget(owner)
        finally:
            self._locks.give_back(owner)

    def holders(self, keys: Iterable[str]) -> dict[str, str]:
        """Return which runs hold these requests, as text for people, by request key."""
        query = select(requests.c.request_key, owners).join(
            owners, requests.c.claimed_by == owners.c.owner
        )
        with self._database.read() as connection:
            return {
                row.request_key: f"run {row.run_id} (process {row.pid} on {row.host}, since "
                f"{row.since:%Y-%m-%d %H:%M:%S} UTC)"
                for row in rows_with(connection, query, requests.c.request_key, sorted(keys))
            }

    def dead(self) -> set[str]:
        """Return the owners that are registered and no longer alive."""
        with self._database.read() as connection:
            return self._locks.dead(connection)

    def any_alive(self, connection: Connection, keys: Sequence[str]) -> bool:
        """Return whether a living owner holds one of these requests, in an open transaction."""
        query = select(requests.c.claimed_by).where(requests.c.claimed_by.is_not(None))
        rows = rows_with(connection, query, requests.c.request_key, keys)
        return bool({row.claimed_by for row in rows} - self._locks.dead(connection))


def _remove_idle(connection: Connection, dead: set[str]) -> set[str]:
    """Remove the dead owners without claims. The others stay, so that they are found dead."""
    if not dead:
        return set()
    held = select(requests.c.claimed_by).where(requests.c.claimed_by.is_not(None))
    removed = connection.execute(
        delete(owners)
        .where(owners.c.owner.in_(dead), owners.c.owner.not_in(held))
        .returning(owners.c.owner)
    )
    return set(removed.scalars())

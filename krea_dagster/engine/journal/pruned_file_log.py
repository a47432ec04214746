"""Files that a person had removed from a storage root, of images that stay in the journal.

A file is entered here before it is removed. So a process that is killed in between leaves a file
that the next one removes, and never an image that looks lost.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from functools import partial

import pyarrow as pa
from sqlalchemy import Connection, delete, func, insert, or_, select, update

from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.journal.schema import files, pruned_files, requests
from krea_dagster.engine.journal.sql import lock_requests
from krea_dagster.engine.states import State


class PrunedFileLog(DatabaseLog):
    """The pruned files in a journal's database."""

    def keys(self, *, without: str = "") -> pa.Array:
        """Return the request keys of all pruned files, ``without`` those of one kind.

        Raises JournalError.
        """
        query = select(pruned_files.c.request_key).where(pruned_files.c.why != without)
        rows = self._database.fetch(query)
        return pa.array([row.request_key for row in rows], pa.string())

    def of_root(self, root_id: str) -> Mapping[str, str]:
        """Return the names of the pruned files of a root, by request key. Raises JournalError."""
        query = (
            select(requests.c.request_key, requests.c.image_path)
            .join(pruned_files, pruned_files.c.request_key == requests.c.request_key)
            .where(pruned_files.c.root_id == root_id)
        )
        return {row.request_key: row.image_path for row in self._database.fetch(query)}

    def add(
        self,
        request_keys: Sequence[str],
        root_id: str,
        *,
        why: str,
        at: datetime,
        dead: Collection[str] = (),
    ) -> int:
        """Enter files that are about to be removed; return how many.

        Those are left out that a run holds which is not among the ``dead``, that are not stored, or
        that another root has too. Raises JournalError.
        """
        entered = 0
        for part in chunks(sorted(request_keys)):
            write = partial(_add, keys=part, root_id=root_id, why=why, at=at, dead=dead)
            entered += self._database.write("note pruned files in", write)
        return entered

    def take_back(self, request_keys: Sequence[str], root_id: str) -> None:
        """Remove the entries of files that are there again. Raises JournalError."""

        def write(connection: Connection) -> None:
            for part in chunks(sorted(request_keys)):
                connection.execute(delete(pruned_files).where(pruned_files.c.request_key.in_(part)))
                here = (files.c.request_key.in_(part), files.c.root_id == root_id)
                connection.execute(update(files).where(*here).values(missing_since=None))

        self._database.write("take back pruned files in", write)


def _add(
    connection: Connection,
    *,
    keys: Sequence[str],
    root_id: str,
    why: str,
    at: datetime,
    dead: Collection[str],
) -> int:
    held = requests.c.request_key.in_(keys)
    lock_requests(connection, held)
    roots_of = (
        select(func.count())
        .where(files.c.request_key == requests.c.request_key, files.c.missing_since.is_(None))
        .scalar_subquery()
    )
    here = (
        select(files.c.request_key)
        .where(
            files.c.request_key == requests.c.request_key,
            files.c.root_id == root_id,
            files.c.missing_since.is_(None),
        )
        .exists()
    )
    chosen = connection.execute(
        select(requests.c.request_key).where(
            held,
            here,
            requests.c.state == State.STORED.value,
            or_(requests.c.claimed_by.is_(None), requests.c.claimed_by.in_(dead)),
            roots_of == 1,
        )
    ).scalars()
    found = list(chosen)
    if found:
        rows = [{"request_key": key, "root_id": root_id, "at": at, "why": why} for key in found]
        connection.execute(insert(pruned_files), rows)
        missing = (files.c.request_key.in_(found), files.c.root_id == root_id)
        connection.execute(update(files).where(*missing).values(missing_since=at))
    return len(found)

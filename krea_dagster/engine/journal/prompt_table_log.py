"""The prompt tables whose runs share a journal."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Final
from uuid import uuid4

from sqlalchemy import Connection, insert, select, update

from krea_dagster import redact
from krea_dagster.engine.journal.database import DatabaseLog
from krea_dagster.engine.journal.schema import attempts, prompt_tables, raised_attempts
from krea_dagster.engine.journal.sql import lock_transaction
from krea_dagster.engine.storage.storage import Storage

#: The prefix of a table's name that a ``generate`` call makes for its prompts.
GENERATED: Final = "generate:"


def identity_of(name: str, source: str, storage: Storage, root_id: str) -> tuple[str, str]:
    """Return a table's name in the journal, and the root that it is relative to.

    ``name`` is chosen by a person (an asset key prefix) and unique. Without one, the table is
    identified by its ``source``. A local path is relative to the root, if that is a folder, so that
    a project that is moved as a whole keeps its tables.
    """
    if name:
        return name, ""
    if "://" in source:
        return redact.location(source), ""
    if storage.folder is None:
        return Path(source).absolute().as_posix(), root_id
    return Path(os.path.relpath(Path(source).absolute(), storage.folder)).as_posix(), root_id


class PromptTableLog(DatabaseLog):
    """The prompt tables in a journal's database.

    A table is identified by its name (``identity_of``): an asset key prefix, a URL, or a path
    relative to the storage root ``root_id``.
    """

    def find(
        self, name: str, root_id: str, *, is_gone: Callable[[str], bool] = lambda _: False
    ) -> str:
        """Return the id of a table, empty for an unknown one.

        If the only other table of a root ``is_gone``, its file was renamed, and it is the same
        table. Requests from before the journal had tables have the empty id too. Raises
        JournalError.
        """
        with self._database.read() as connection:
            found = _id_of(connection, name, root_id)
            return found or _renamed(connection, root_id, is_gone)

    def enter(
        self, name: str, root_id: str, *, is_gone: Callable[[str], bool] = lambda _: False
    ) -> str:
        """Return the id of a table, and enter it if it is new (see ``find``).

        The first table gets the attempts from before the journal had tables. Raises JournalError.
        """
        at = datetime.now(timezone.utc)

        def write(connection: Connection) -> str:
            lock_transaction(connection, _ENTERING)
            if found := _id_of(connection, name, root_id):
                return found
            if found := _renamed(connection, root_id, is_gone):
                connection.execute(
                    update(prompt_tables).where(prompt_tables.c.table_id == found).values(name=name)
                )
                return found
            table_id = uuid4().hex
            first = connection.execute(select(prompt_tables.c.table_id).limit(1)).first() is None
            connection.execute(
                insert(prompt_tables).values(
                    table_id=table_id, root_id=root_id, name=name, first_at=at
                )
            )
            if first:
                for table in (attempts, raised_attempts):
                    connection.execute(
                        update(table).where(table.c.table_id == "").values(table_id=table_id)
                    )
            return table_id

        with self._database.read() as connection:
            known = _id_of(connection, name, root_id)
        return known or self._database.write("enter a prompt table in", write)

    def generated(self) -> frozenset[str]:
        """Return the ids of the tables of ``generate`` calls. Raises JournalError."""
        return frozenset(key for key, name in self.names().items() if name.startswith(GENERATED))

    def names(self) -> dict[str, str]:
        """Return the names of the tables, by their ids. Raises JournalError."""
        rows = self._database.fetch(select(prompt_tables.c.table_id, prompt_tables.c.name))
        return {row.table_id: row.name for row in rows}


#: PostgreSQL's advisory lock for entering a table, so that it is entered once.
_ENTERING: Final = 4_705_170_318


def _id_of(connection: Connection, name: str, root_id: str) -> str:
    is_it = (prompt_tables.c.name == name, prompt_tables.c.root_id == root_id)
    return connection.execute(select(prompt_tables.c.table_id).where(*is_it)).scalar() or ""


def _renamed(connection: Connection, root_id: str, is_gone: Callable[[str], bool]) -> str:
    others = connection.execute(
        select(prompt_tables).where(prompt_tables.c.root_id == root_id).limit(2)
    ).all()
    return others[0].table_id if root_id and len(others) == 1 and is_gone(others[0].name) else ""

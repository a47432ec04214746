"""Brings a journal's tables to the schema of this version of the package, or says why it cannot.

``REVISIONS.head`` is the revision that ``schema.metadata`` and ``states.TRANSITIONS`` describe. A
change of either needs a new file under ``versions`` and the new head here; a test holds the two
against each other. A revision that was released is never changed. New transitions are rows that
the revision inserts, and a new state means that the CHECK of ``requests.state`` is made anew:
on SQLite by ``op.batch_alter_table``, which copies the table.

Alembic takes longer to import than a journal takes to open, so it is imported only where
something is to be upgraded.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from uuid import uuid4

from sqlalchemy import (
    Column,
    Connection,
    MetaData,
    PrimaryKeyConstraint,
    String,
    Table,
    func,
    insert,
    inspect,
    select,
)

from krea_dagster.engine.journal import schema
from krea_dagster.engine.states import TRANSITIONS
from krea_dagster.errors import JournalError

#: Alembic's table, under a name of its own: a PostgreSQL database may be shared with Dagster.
version_table: Final = Table(
    "journal_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="journal_version_pkc"),
)

#: The advisory lock under which PostgreSQL's tables are made; any number that nobody else uses.
_MIGRATING: Final = 4_705_170_317


@dataclass(frozen=True)
class Revisions:
    """The revisions of the journal's tables: the newest, and the folders that hold them all."""

    head: str
    folders: tuple[Path, ...]


REVISIONS: Final = Revisions(head="0007", folders=(Path(__file__).with_name("versions"),))


def revision(connection: Connection) -> str | None:
    """The schema revision that a database is at, or None where it has none."""
    if not inspect(connection).has_table(version_table.name):
        return None
    return connection.execute(select(version_table.c.version_num)).scalar()


def transition_rows() -> list[dict[str, Any]]:
    """The state machine as rows of ``transitions``."""
    return [
        {
            "from_state": "" if before is None else before.value,
            "event": happened.value,
            "to_state": after.value,
        }
        for (before, happened), after in TRANSITIONS.items()
    ]


def bring_to_head(connection: Connection, revisions: Revisions, where: str) -> None:
    """Make the tables, or upgrade them, within the transaction that is open.

    The transaction must hold SQLite's write lock, with foreign keys off, because SQLite changes
    a table by copying it. Raises JournalError where the revision is not known here, or where
    tables of these names are there without any revision.
    """
    if connection.dialect.name != "sqlite":
        # Two runs that open a database together: the second waits for the first.
        connection.execute(select(func.pg_advisory_xact_lock(_MIGRATING)))
    found = revision(connection)
    if found == revisions.head:
        return  # another process was first
    if found is None:
        _create(connection, revisions, where)
    else:
        _upgrade(connection, revisions, found, where)


def _create(connection: Connection, revisions: Revisions, where: str) -> None:
    there = set(inspect(connection).get_table_names())
    # A file of SQLite is the journal's alone, while a PostgreSQL database may be shared.
    if connection.dialect.name != "sqlite":
        there &= set(schema.metadata.tables)
    if there:
        raise JournalError(
            f"{where} is not a journal of krea-dagster, or one from before its first release: it "
            f"has tables ({', '.join(sorted(there)[:5])}) and no schema revision. Nothing was "
            "changed. Name another journal (KREA_JOURNAL_URL)."
        )
    schema.metadata.create_all(connection)
    version_table.create(connection)
    connection.execute(insert(schema.about).values(journal_id=uuid4().hex))
    connection.execute(insert(schema.transitions), transition_rows())
    connection.execute(insert(version_table).values(version_num=revisions.head))


def run(connection: Connection, revisions: Revisions) -> set[str]:
    """Run the revisions that the database lacks; returns the names of all that are known.

    Runs none where the database is at a revision that is not known.
    """
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415 - see above
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - see above

    config = Config(attributes={"connection": connection})
    folders = "\n".join(str(folder) for folder in revisions.folders)
    # Alembic reads % as the start of a name to fill in.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("version_locations", folders.replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    scripts = ScriptDirectory.from_config(config).walk_revisions()
    known = {script.revision for script in scripts}
    if revision(connection) in {None, *known}:
        command.upgrade(config, revisions.head)
    return known


def _upgrade(connection: Connection, revisions: Revisions, found: str, where: str) -> None:
    if found not in run(connection, revisions):
        raise JournalError(
            f"{where} has schema revision {found}, which this version of krea-dagster does not "
            f"know (its own is {revisions.head}). Nothing was changed. A newer version has written "
            "it: install that one (pip install --upgrade krea-dagster)."
        )
    if connection.dialect.name == "sqlite":
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise JournalError(
                f"the upgrade of {where} from schema revision {found} to {revisions.head} would "
                f"have left a row of {broken[0]} without its {broken[2]}. Nothing was changed. "
                "Use the version of krea-dagster that wrote it, and report this."
            )

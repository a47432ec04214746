"""Upgrades of a journal's tables to the schema of this version of the package.

``REVISIONS.head`` is the revision that ``schema.metadata`` and ``states.TRANSITIONS`` describe. A
change of either needs a new file under ``versions`` and the new head here; a test compares the two.
A released revision is never changed. New transitions are rows that the revision inserts. A new
state means a new CHECK of ``requests.state``: on SQLite by ``op.batch_alter_table``, which copies
the table.

Importing Alembic takes longer than opening a journal, so it is imported only for an upgrade.
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
    insert,
    inspect,
    select,
)

from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.sql import is_sqlite, lock_transaction
from krea_dagster.engine.states import TRANSITIONS
from krea_dagster.errors import JournalError

#: Alembic's table, under a separate name: a PostgreSQL database may be shared with Dagster.
version_table: Final = Table(
    "journal_version",
    MetaData(),
    Column("version_num", String(32), nullable=False),
    PrimaryKeyConstraint("version_num", name="journal_version_pkc"),
)

#: The advisory lock for creating PostgreSQL's tables: any number that is not used elsewhere.
_MIGRATING: Final = 4_705_170_317


@dataclass(frozen=True)
class Revisions:
    """The revisions of the journal's tables: the newest, and the folders of their files."""

    head: str
    folders: tuple[Path, ...]


REVISIONS: Final = Revisions(head="0016", folders=(Path(__file__).with_name("versions"),))


def revision(connection: Connection) -> str | None:
    """Return the schema revision of a database, or None where it has none."""
    if not inspect(connection).has_table(version_table.name):
        return None
    return connection.execute(select(version_table.c.version_num)).scalar()


def transition_rows() -> list[dict[str, Any]]:
    """Return the state machine as rows of ``transitions``."""
    return [
        {
            "from_state": "" if before is None else before.value,
            "event": happened.value,
            "to_state": after.value,
        }
        for (before, happened), after in TRANSITIONS.items()
    ]


def upgrade(connection: Connection, revisions: Revisions, where: str) -> None:
    """Create or upgrade the tables, in the open transaction.

    The transaction must hold SQLite's write lock, with foreign keys off, because SQLite changes a
    table by copying it. Raises JournalError for an unknown revision, or for tables of these names
    without a revision.
    """
    # Where two runs open a database at once, the second waits for the first.
    lock_transaction(connection, _MIGRATING)
    found = revision(connection)
    if found == revisions.head:
        return  # another process was first
    if found is None:
        _create(connection, revisions, where)
    else:
        _run_revisions(connection, revisions, found, where)


def _create(connection: Connection, revisions: Revisions, where: str) -> None:
    there = set(inspect(connection).get_table_names())
    # A SQLite file belongs to the journal alone; a PostgreSQL database may be shared.
    if not is_sqlite(connection):
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
    """Run the revisions that the database lacks, and return the names of all known ones.

    Runs none if the database is at an unknown revision.
    """
    from alembic import command  # noqa: PLC0415 - see above
    from alembic.config import Config  # noqa: PLC0415 - see above
    from alembic.script import ScriptDirectory  # noqa: PLC0415 - see above

    config = Config(attributes={"connection": connection})
    folders = "\n".join(str(folder) for folder in revisions.folders)
    # Alembic interpolates names after %.
    config.set_main_option("script_location", str(Path(__file__).parent).replace("%", "%%"))
    config.set_main_option("version_locations", folders.replace("%", "%%"))
    config.set_main_option("path_separator", "newline")
    scripts = ScriptDirectory.from_config(config).walk_revisions()
    known = {script.revision for script in scripts}
    if revision(connection) in {None, *known}:
        command.upgrade(config, revisions.head)
    return known


def _run_revisions(connection: Connection, revisions: Revisions, found: str, where: str) -> None:
    if found not in run(connection, revisions):
        raise JournalError(
            f"{where} has schema revision {found}, which this version of krea-dagster does not "
            f"know (its own is {revisions.head}). Nothing was changed. A newer version wrote it: "
            "upgrade (pip install --upgrade krea-dagster)."
        )
    if is_sqlite(connection):
        broken = connection.exec_driver_sql("PRAGMA foreign_key_check").first()
        if broken is not None:
            raise JournalError(
                f"the upgrade of {where} from schema revision {found} to {revisions.head} would "
                f"have left a row of {broken[0]} without its {broken[2]}. Nothing was changed. "
                "Use the version of krea-dagster that wrote it, and report this."
            )

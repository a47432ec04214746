"""The journal's tables are created, upgraded with their content, or refused."""

from __future__ import annotations

import subprocess
import sys
import time
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect, text

from krea_dagster.engine.journal import migrations, schema
from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.migrations import (
    REVISIONS,
    Revisions,
    transition_rows,
    version_table,
)
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import JournalError
from tests.engine.journal import first_release
from tests.engine.journal.first_release import ROWS, content, engine_of

#: What is there after the upgrade: the sums of its month and its partition are added up.
UPGRADED = {
    **{name: rows for name, rows in ROWS.items() if name != "owners"},
    "requests": [{**row, "claimed_by": None} for row in ROWS["requests"]],
    "commitments": [
        {"scope": "day:2026-01-01", "committed_units": 13500, "spent_units": 4500},
        {"scope": "month:2026-01", "committed_units": 40500, "spent_units": 4500},
        {"scope": "partition:bucket-000", "committed_units": 40500, "spent_units": 4500},
    ],
}

_FOLDER = Path(__file__).with_name("revisions")


def later(name: str) -> Revisions:
    """The revisions of a later version, which has one more."""
    return Revisions("next", (*REVISIONS.folders, _FOLDER / name))


def version(journal_url: str) -> Any:
    with engine_of(journal_url) as engine, engine.connect() as connection:
        return migrations.revision(connection)


def tables(journal_url: str) -> dict[str, Any]:
    """Return everything that the database knows about its tables."""
    with engine_of(journal_url) as engine, engine.connect() as connection:
        return {name: _table(connection, name) for name in schema.metadata.tables}


def _table(connection: Connection, name: str) -> dict[str, Any]:
    there = inspect(connection)
    return {
        "columns": {
            one["name"]: (str(one["type"]), one["nullable"], one["default"])
            for one in there.get_columns(name)
        },
        "primary key": there.get_pk_constraint(name),
        "foreign keys": sorted(map(str, there.get_foreign_keys(name))),
        "unique": sorted(map(str, there.get_unique_constraints(name))),
        "checks": sorted(map(str, there.get_check_constraints(name))),
        "indexes": sorted(map(str, there.get_indexes(name))),
    }


def other(journal_url: str, tmp_path: Path) -> str:
    """A second database, where one needs two; on PostgreSQL the same, emptied."""
    if journal_url.startswith("sqlite"):
        return f"sqlite:///{tmp_path / 'other.db'}"
    with engine_of(journal_url) as engine, engine.begin() as connection:
        schema.metadata.drop_all(connection)
        version_table.drop(connection)
    return journal_url


# -- the revisions and the code say the same --------------------------------------------------


def test_the_revisions_create_the_described_schema(journal_url: str, tmp_path: Path) -> None:
    """Fails if schema.metadata or TRANSITIONS was changed without a revision."""
    Journal(journal_url).close()
    made = tables(journal_url)
    url = other(journal_url, tmp_path)
    with engine_of(url) as engine, engine.begin() as connection:
        migrations.run(connection, REVISIONS)
        context = MigrationContext.configure(
            connection,
            opts={"compare_type": True, "compare_server_default": True, "version_table": "none"},
        )
        found = [
            one
            for one in compare_metadata(context, schema.metadata)
            if not (one[0] == "remove_table" and one[1].name == version_table.name)
        ]
        assert found == []
        rows = {tuple(row) for row in connection.execute(text("select * from transitions"))}
    assert rows == {tuple(row.values()) for row in transition_rows()}
    assert tables(url) == made


def test_revisions_are_linear_and_head_is_the_newest() -> None:
    config = Config()
    config.set_main_option("script_location", str(REVISIONS.folders[0].parent))
    script = ScriptDirectory.from_config(config)
    assert script.get_heads() == [REVISIONS.head]
    assert script.get_bases() == ["0001"]


def test_a_journal_at_the_head_opens_without_alembic(tmp_path: Path) -> None:
    """It takes longer to import than a journal takes to open."""
    code = (
        "import sys; from krea_dagster.engine.journal.journal import Journal; "
        f"url = 'sqlite:///{tmp_path / 'journal.db'}'; "
        "Journal(url).close(); Journal(url).close(); "
        "sys.exit('alembic' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# -- upgrades ---------------------------------------------------------------------------------


@pytest.mark.parametrize("revision", ["0001", "0002", "0003", "0004", "0005"])
def test_journals_of_all_releases_open_with_their_content(journal_url: str, revision: str) -> None:
    """Rows in every state; unknown values are entered as unknown."""
    first_release.make(journal_url, revision)
    with closing(Journal(journal_url)) as journal:
        assert version(journal_url) == REVISIONS.head
        assert content(journal_url) == (UPGRADED if revision < "0003" else kept_sums())
        assert journal.count_by_state() == dict.fromkeys(State, 1)
        (stored,) = journal.records(["a" * 64]).values()
        assert stored.request.prompt == "Füchse, 狐, a"
        assert stored.task_id == "task-a"
        assert stored.charged_units == 4500
        assert stored.sent_at == datetime(2026, 1, 1, tzinfo=timezone.utc)
        assert [c.task_id for c in journal.charges()][:3] == ["task-a", "task-b", None]
        assert {charge.table_id for charge in journal.charges()} == {""}
        journal.bind("an emulator")
        table_id = journal.tables.enter("prompts.parquet", "")
        assert journal.attempts(table_id).current() == {("p", 0): 2}
        assert journal.attempts(table_id).open_slots() == set()
        assert journal.attempts(journal.tables.enter("others.parquet", "")).current() == {}


def kept_sums() -> dict[str, Any]:
    """Return the sums after an upgrade of a journal that had them already."""
    return UPGRADED | {"commitments": ROWS["commitments"]}


def test_files_from_before_roots_belong_to_a_root_that_is_found_by_them(
    tmp_path: Path,
) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    first_release.make(url)
    here, elsewhere = Storage(str(tmp_path / "here")), Storage(str(tmp_path / "elsewhere"))
    here.write("images/aa/a.png", lambda file: file.write(b"0" * 10))
    with closing(Journal(url)) as journal:
        root_id = journal.roots.check(here)
        assert root_id
        assert journal.roots.begin(here, root_id) == root_id
        assert journal.roots.check(here) == root_id
        assert journal.roots.check(elsewhere) is None


def test_an_upgrade_keeps_every_row_and_every_constraint(journal_url: str) -> None:
    first_release.make(journal_url)
    Journal(journal_url).close()
    before = tables(journal_url)
    Database(journal_url, revisions=later("grown")).close()
    assert version(journal_url) == "next"
    assert content(journal_url) == UPGRADED
    after = tables(journal_url)
    assert "archived" in str(after["requests"].pop("checks"))
    assert after["requests"]["columns"].pop("archived_at") == ("BIGINT", True, None)
    del before["requests"]["checks"]
    assert after == before
    with engine_of(journal_url) as engine, engine.begin() as connection:
        connection.execute(text("update requests set state = 'archived' where state = 'stored'"))
        row = {"from_state": "stored", "event": "archived", "to_state": "archived"}
        found = connection.execute(text("select * from transitions")).mappings()
        assert row in [dict(one) for one in found]


@pytest.mark.parametrize("name", ["breaks", "orphans"])
def test_an_upgrade_that_fails_changes_nothing(journal_url: str, name: str) -> None:
    first_release.make(journal_url)
    Journal(journal_url).close()
    before = (tables(journal_url), content(journal_url))
    with pytest.raises(JournalError):
        Database(journal_url, revisions=later(name))
    assert version(journal_url) == REVISIONS.head
    assert (tables(journal_url), content(journal_url)) == before
    Journal(journal_url).close()


def test_a_journal_is_not_upgraded_while_an_earlier_version_is_running(journal_url: str) -> None:
    """It would rely on claims that the new version does not see."""
    first_release.make(journal_url)
    with engine_of(journal_url) as engine, engine.begin() as connection:
        now_us = int(time.time() * 1_000_000)
        connection.execute(text("UPDATE owners SET heartbeat_at = :now"), {"now": now_us})
    before = version(journal_url)
    with pytest.raises(JournalError, match="an earlier version of krea-dagster is at work"):
        Journal(journal_url)
    assert version(journal_url) == before


def test_concurrent_processes_upgrade_an_old_journal_once(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'journal.db'}"
    first_release.make(url)
    Journal(url).close()
    code = (
        "import sys; from tests.engine.journal.test_migrations import *; "
        f"print('ready', flush=True); sys.stdin.read(1); "
        f"Database({url!r}, revisions=later('grown')).close()"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code],
            cwd=Path(__file__).parents[2],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        process.communicate("!")
    assert [process.returncode for process in processes] == [0, 0]
    assert version(url) == "next"
    assert content(url) == UPGRADED


def test_a_run_ends_where_a_newer_version_upgrades_its_journal(journal_url: str) -> None:
    with closing(Journal(journal_url)) as journal:
        Database(journal_url, revisions=later("grown")).close()
        with pytest.raises(JournalError, match="revision next by another version"):
            journal.count_by_state()


# -- refusals ---------------------------------------------------------------------------------


def test_a_journal_of_a_newer_version_is_refused_and_not_changed(journal_url: str) -> None:
    first_release.make(journal_url)
    Database(journal_url, revisions=later("grown")).close()
    before = (tables(journal_url), content(journal_url))
    with pytest.raises(
        JournalError, match=r"revision next, which this version .* not know"
    ) as said:
        Journal(journal_url)
    assert "pip install --upgrade krea-dagster" in str(said.value)
    assert version(journal_url) == "next"
    assert (tables(journal_url), content(journal_url)) == before


def test_tables_without_a_revision_are_not_a_journal(
    journal_url: str,
) -> None:
    with engine_of(journal_url) as engine, engine.begin() as connection:
        connection.execute(text("create table events (what text)"))
    with pytest.raises(JournalError, match=r"not a journal .* \(events\)"):
        Journal(journal_url)
    with engine_of(journal_url) as engine, engine.connect() as connection:
        assert inspect(connection).get_table_names() == ["events"]


def test_another_programs_sqlite_file_is_not_a_journal(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'runs.db'}"
    with engine_of(url) as engine, engine.begin() as connection:
        connection.execute(text("create table runs (id integer)"))
        connection.execute(text("create table alembic_version (version_num text)"))
    with pytest.raises(JournalError, match="not a journal"):
        Journal(url)

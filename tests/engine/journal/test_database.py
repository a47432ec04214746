"""Pooled connections notice changes of their file and of their process."""

from __future__ import annotations

import multiprocessing
import os
import sqlite3
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import insert, select

from krea_dagster.engine.journal.database import Database
from krea_dagster.engine.journal.schema import stops
from krea_dagster.errors import ConfigError, JournalError
from tests.engine.harness import NOW


def write(database: Database, launch: str) -> None:
    row = {"launch": launch, "at": NOW, "error_code": "c", "error_message": "m"}
    database.write("write to", lambda connection: connection.execute(insert(stops), row))


def read(database: Database) -> list[str]:
    with database.read() as connection:
        return sorted(connection.execute(select(stops.c.launch)).scalars())


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.db"


def open_files(path: Path) -> int:
    """Count the open descriptors of a file in this process."""
    links = Path("/proc/self/fd").iterdir()
    return sum(1 for link in links if link.exists() and str(path) == os.path.realpath(link))


def test_one_connection_serves_one_write_after_another(path: Path) -> None:
    with closing(Database(f"sqlite:///{path}")) as database:
        write(database, "0")
        before = path.with_name("journal.db-wal").stat().st_ino
        for number in range(1, 20):
            write(database, str(number))
        # Closing the last connection merges the log into the file and removes it.
        assert path.with_name("journal.db-wal").stat().st_ino == before
        assert open_files(path) <= 2
        assert len(read(database)) == 20
    assert [file.name for file in path.parent.iterdir()] == ["journal.db"]
    assert open_files(path) == 0


def test_a_file_that_others_changed_is_opened_again(path: Path) -> None:
    """SQLite would use its cached pages."""
    with closing(Database(f"sqlite:///{path}")) as database:
        write(database, "first")
        with closing(sqlite3.connect(path)) as other:
            other.execute("pragma wal_checkpoint(truncate)")
        whole = path.read_bytes()
        path.write_bytes(b"\xff" * 100 + whole[100:])
        with pytest.raises(JournalError, match="not a database"):
            write(database, "second")
        path.write_bytes(whole)
        write(database, "third")
        assert read(database) == ["first", "third"]


def test_a_journal_can_be_read_during_constant_writes(path: Path) -> None:
    """Every checkpoint of a busy run changes the file, also while a connection is being made."""
    with closing(Database(f"sqlite:///{path}")) as database:
        write(database, "first")
        ended = threading.Event()

        def touch() -> None:
            at_ns = path.stat().st_mtime_ns
            while not ended.is_set():
                at_ns += 1000
                os.utime(path, ns=(at_ns, at_ns))

        with ThreadPoolExecutor(1) as pool:
            touching = pool.submit(touch)
            try:
                assert [read(database) for _ in range(200)] == [["first"]] * 200
                write(database, "second")
            finally:
                ended.set()
            touching.result()


def test_a_replaced_file_is_not_written_to(path: Path) -> None:
    with closing(Database(f"sqlite:///{path}")) as database:
        write(database, "mine")
        path.rename(path.with_name("aside"))
        for ending in ("-wal", "-shm"):
            path.with_name(f"journal.db{ending}").rename(path.with_name(f"aside{ending}"))
        with closing(Database(f"sqlite:///{path}")) as another:
            write(another, "another's")
            with pytest.raises(JournalError, match="was replaced by another"):
                write(database, "lost")
            assert read(another) == ["another's"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_uses_new_connections(path: Path) -> None:
    """SQLite's locks belong to the process: a shared connection would corrupt the file."""
    with closing(Database(f"sqlite:///{path}")) as database:
        write(database, "parent")

        def in_child() -> None:
            write(database, "child")
            assert read(database) == ["child", "parent"]
            database.close()

        child = multiprocessing.get_context("fork").Process(target=in_child)
        child.start()
        child.join(30)
        assert child.exitcode == 0
        write(database, "parent again")
        assert read(database) == ["child", "parent", "parent again"]
        database.check_integrity()


def test_an_unreferenced_database_closes_its_connections(path: Path) -> None:
    write(Database(f"sqlite:///{path}"), "x")
    assert open_files(path) == 0


# -- a URL that cannot be used ------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "",
        "journal.db",
        "s3cr3t",
        "sqlite://",
        "postgresql://s3user:s3cr3t@[::1/db",
        "postgresql://s3user:s3cr3t@[::1",
        "postgresql://[::1",
        "postgresql+psycopg://s3user:s3cr3t@host:port/db",
        "postgresql+psycopg://s3user:s3cr3t@host:0/db",
        "postgresql+psycopg://s3user:s3cr3t@host:65536/db",
        "postgresql+psycopg://s3user:s3cr3t@host:-1/db",
        "postgresql+psycopg://s3user:s3cr3t@host:99999999999999999999/db",
        "postgresql+psycopg://s3user:p@s3cr3t@127.0.0.1:1/db?connect_timeout=1",
        "postgresql+psycopg://s3user:p:s3cr3t@127.0.0.1:1/db?connect_timeout=1",
        "postgresql+psycopg://s3user:p/s3cr3t@127.0.0.1:1/db?connect_timeout=1",
        "postgresql+psycopg://s3user:p?s3cr3t@127.0.0.1:1/db?connect_timeout=1",
        "postgresql+psycopg://s3user:p#s3cr3t@127.0.0.1:1/db?connect_timeout=1",
        "postgresql+psycopg://127.0.0.1:1/db?password=s3cr3t&connect_timeout=1",
        "postgresql+psycopg://127.0.0.1:1/db?sslpassword=s3cr3t&connect_timeout=1",
        "postgresql+psycopg://127.0.0.1:1/db?options=s3cr3t&sslmode=s3cr3t",
        "postgresql+psycopg://127.0.0.1:1/db?connect_timeout=s3cr3t",
        "nosuch+driver://s3user:s3cr3t@host/db",
        "sqlite:////proc/journal.db?s3cr3t=1",
        "postgresql+psycopg://s3user:s3cr3t@%zz/db",
        "postgresql+psycopg://s3user:s3cr3t%00@127.0.0.1:1/db?connect_timeout=1",
    ],
)
def test_an_open_error_does_not_contain_the_password(url: str) -> None:
    with pytest.raises((ConfigError, JournalError)) as caught:
        Database(url)
    said = "".join(traceback.format_exception(caught.value))
    assert "s3cr3t" not in str(caught.value)
    assert "s3cr3t" not in said
    assert "journal" in str(caught.value)


def test_an_unencoded_password_error_explains_encoding() -> None:
    with pytest.raises(ConfigError, match="write @ as %40, : as %3A") as caught:
        Database("postgresql+psycopg://s3user:p@s3cr3t:w@h:5432/db")
    assert "postgresql+psycopg://h:5432/db" in str(caught.value)
    assert caught.value.__cause__ is None

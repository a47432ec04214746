"""Connections to the journal's database: opened, upgraded, guarded, and explained when they fail.

A journal that is lost or exchanged while a run works must not look like one that is empty: the
run would buy everything again. So a SQLite file is created whole and in one place only, every
connection after that needs it to exist, every transaction asks which journal it is in, and one
that has written looks whether the file is still the one under the journal's name.
"""

from __future__ import annotations

import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url, select
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.pool import NullPool

from krea_dagster.engine import migrations, schema
from krea_dagster.engine.migrations import REVISIONS, Revisions
from krea_dagster.engine.storage import sync_folder
from krea_dagster.errors import ConfigError, JournalError

#: What may be done, by words of SQLite's message.
_ADVICE: Final = (
    ("disk is full", "Free space on its disk."),
    ("readonly", "Make the file and its folder writable for this user."),
    ("locked", "Another process is writing to it for too long: let it end, or end it."),
    (
        "unable to open",
        "Look whether the path is right, and whether its folder can be read and written.",
    ),
    ("disk I/O error", "Look at its disk: space, quota, health."),
    ("not a database", "{damaged}"),
    ("malformed", "{damaged}"),
    ("no such table", "{damaged}"),
    ("no such column", "{damaged}"),
)
_DAMAGED: Final = (
    "Do not remove it, for it may be the only record of what was paid for: restore a backup, or "
    "recover it with the command .recover of sqlite3."
)
_GONE: Final = (
    "Put it back before anything else runs: a new journal would know nothing of what was paid for."
)


class Database:
    """The database behind a SQLAlchemy URL, at the schema of this version of the package.

    A new database is made, an older one upgraded, a newer one refused. Raises ConfigError where
    the URL cannot be used, and JournalError wherever the database fails. ``lock_timeout_s`` is
    how long SQLite waits for another process that writes. ``revisions`` is another than the
    package's own only in tests.
    """

    def __init__(
        self, url: str, *, lock_timeout_s: float = 60.0, revisions: Revisions = REVISIONS
    ) -> None:
        parsed = _parsed(url)
        self.where = parsed.render_as_string(hide_password=True)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self._file = _file_of(parsed) if self.sqlite else None
        self._url = parsed
        if self._file is not None:
            self._url = _file_url(parsed, self._file, str(parsed.query.get("mode", "rw")))
        self._lock_timeout_s = lock_timeout_s
        self._history = revisions
        self._identity: tuple[str, str] | None = None
        try:
            self._reading = self._engine(begin="BEGIN")
            self._writing = self._engine(begin="BEGIN IMMEDIATE")
        except (ImportError, SQLAlchemyError) as error:
            raise ConfigError(f"the journal {self.where} cannot be used: {error}") from error
        try:
            with self.explained("open"):
                self._open()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Close the connections."""
        self._reading.dispose()
        self._writing.dispose()

    @contextmanager
    def read(self, doing: str) -> Iterator[Connection]:
        """Yield a connection for one reading transaction. ``doing`` is a verb for its errors."""
        with self.explained(doing), self._reading.begin() as connection:
            self._check_identity(connection)
            yield connection

    @contextmanager
    def write(self, doing: str) -> Iterator[Connection]:
        """Yield a connection for one transaction that is durable once the block has ended."""
        with self.explained(doing):
            with self._writing.begin() as connection:
                self._check_identity(connection)
                opened = connection.info.get("file")
                yield connection
            if self._file is not None and _file_id(self._file) != opened:
                raise JournalError(
                    f"the journal {self.where} was removed or replaced while it was written to. "
                    f"Nothing more is bought. {_GONE}"
                )

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Yield a connection whose reads all see one moment. No error of the caller is changed."""
        with self.explained("open"):
            connection = self._reading.connect()
        with connection:
            if not self.sqlite:
                # There each statement would see a moment of its own.
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with self.explained("read"):
                self._check_identity(connection)
            yield connection

    def look_through(self) -> None:
        """Read a SQLite file from end to end. Raises JournalError where it is damaged.

        SQLite by itself notices damage only where it reads. About 6 microseconds an image.
        """
        if self.sqlite:
            with self.read("read") as connection:
                found = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
            if found != "ok":
                raise JournalError(
                    f"the journal {self.where} is damaged ({found}). Nothing more is bought. "
                    f"{_DAMAGED}"
                )

    # -- opening ------------------------------------------------------------------------------

    def _open(self) -> None:
        if self._file is not None and not self._file.exists():
            self._make_file(self._file)
        elif self._file is not None and self._file.is_file() and self._file.stat().st_size == 0:
            raise JournalError(
                f"the journal {self.where} is empty, which a journal never is. Restore a backup; "
                "only if nothing was ever bought with it, remove the file."
            )
        with self._reading.begin() as connection:
            found = migrations.revision(connection)
        if found != self._history.head:
            self._bring_to_head(self._url)
        with self._reading.begin() as connection:
            self._identity = _identity(connection)

    def _make_file(self, file: Path) -> None:
        """Make a new file, whole before it has its name: an empty one is never a new journal."""
        file.parent.mkdir(parents=True, exist_ok=True)
        log = file.with_name(f"{file.name}-wal")
        if log.exists() and log.stat().st_size:
            raise JournalError(
                f"the journal {self.where} is not there any more, but its write-ahead log "
                f"{log.name} is. {_GONE}"
            )
        new = file.with_name(f"{file.name}.{uuid4().hex}.new")
        try:
            self._bring_to_head(_file_url(self._url, new, "rwc"))
            with suppress(FileExistsError):  # another process was first
                _give_name(new, file)
            sync_folder(file.parent)
        finally:
            for ending in ("", "-wal", "-shm"):
                new.with_name(new.name + ending).unlink(missing_ok=True)

    def _bring_to_head(self, url: URL) -> None:
        engine = self._engine(url, begin="BEGIN IMMEDIATE", foreign_keys=False)
        try:
            with engine.begin() as connection:
                migrations.bring_to_head(connection, self._history, self.where)
        finally:
            engine.dispose()

    # -- guards -------------------------------------------------------------------------------

    def _check_identity(self, connection: Connection) -> None:
        found = _identity(connection)
        if self._identity is None or found == self._identity:
            return
        if found[0] == self._identity[0]:
            raise JournalError(
                f"the journal {self.where} was brought to schema revision {found[1]} by another "
                "version of krea-dagster while this run worked. Nothing more is bought. Run again "
                "with that version."
            )
        raise JournalError(
            f"the journal {self.where} was replaced by another one while this run worked. "
            f"Nothing more is bought. {_GONE}"
        )

    @contextmanager
    def explained(self, doing: str) -> Iterator[None]:
        """Raise the database's errors as JournalErrors that say what may be done."""
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"could not {doing} the journal {self.where}: {error}. Nothing more is bought."
            ) from error
        except DBAPIError as error:
            # The statement, its parameters and the further lines of some drivers hold prompts.
            said = (str(error.orig).splitlines() or [type(error.orig).__name__])[0]
            raise JournalError(
                f"could not {doing} the journal {self.where}: {said}. Nothing more is bought "
                f"until this is mended. {self._advice(said)}"
            ) from error.orig

    def _advice(self, said: str) -> str:
        if self._file is not None and not self._file.exists():
            return f"The file is not there any more. {_GONE}"
        if self.sqlite:
            for words, advice in _ADVICE:
                if words in said:
                    return advice.format(damaged=_DAMAGED)
        return "What was paid for is written in it, and the next run takes it up."

    # -- connections --------------------------------------------------------------------------

    def _engine(self, url: URL | None = None, *, begin: str, foreign_keys: bool = True) -> Engine:
        if self._file is None:
            return create_engine(self._url, pool_size=2, pool_pre_ping=True)
        file = self._file
        # One connection per use: SQLite's are cheap, and none is held across a fork.
        engine = create_engine(
            url or self._url,
            poolclass=NullPool,
            connect_args={"timeout": self._lock_timeout_s},
        )

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            record.info["file"] = _file_id(file)
            # Transactions are begun by hand, because the driver would begin them too late to
            # read and write under one lock.
            connection.isolation_level = None
            cursor = connection.cursor()
            self._turn_log_on(cursor)
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine

    def _turn_log_on(self, cursor: Any) -> None:
        """Switch to the write-ahead log. SQLite itself does not wait for the lock it needs once."""
        deadline_s = time.monotonic() + self._lock_timeout_s
        while True:
            try:
                cursor.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.02)
            else:
                return


def has_database(url: str) -> bool:
    """Whether a journal's database is there, or what is left of it; makes nothing.

    Of a server's database it is taken for granted. Raises ConfigError for an unusable URL.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        return True
    file = _file_of(parsed)
    return file.exists() or file.with_name(f"{file.name}-wal").exists()


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
    except SQLAlchemyError as error:
        raise ConfigError(
            "the journal's URL cannot be read; expected something like "
            "sqlite:////data/journal.db or postgresql+psycopg://user@host/database"
        ) from error
    if parsed.get_backend_name() == "sqlite":
        name = parsed.database or ""
        if name in ("", ":memory:") or "memory" in parsed.query.get("mode", ""):
            raise ConfigError(
                "the journal's URL names no file; expected something like "
                "sqlite:////data/journal.db: a journal must outlive its process"
            )
    return parsed


def _file_of(url: URL) -> Path:
    """The file of a SQLite URL, which may also be written as file:PATH with uri=true."""
    name = str(url.database)
    if name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return Path(name).absolute()


def _file_url(url: URL, file: Path, mode: str) -> URL:
    """The URL that opens a file in a mode: rw needs the file to be there."""
    return url.set(database=file.as_uri()).update_query_dict({"mode": mode, "uri": "true"})


def _identity(connection: Connection) -> tuple[str, str]:
    """Which journal this is, and at which revision of its tables."""
    version = select(migrations.version_table.c.version_num).scalar_subquery()
    row = connection.execute(select(schema.about.c.journal_id, version.label("version"))).first()
    return ("", "") if row is None else (row.journal_id, str(row.version))


def _file_id(file: Path) -> tuple[int, int] | None:
    """What tells a file from another of the same name, or None where there is none."""
    try:
        found = file.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _give_name(new: Path, file: Path) -> None:
    """Name a file, if the name is free. Raises FileExistsError."""
    try:
        os.link(new, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without a second name for a file
        if file.exists():
            raise FileExistsError(str(file)) from None
        new.rename(file)

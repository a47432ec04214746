"""Connections to the journal's database: opening, upgrades, guards, and readable errors.

A journal that is lost or replaced during a run must not look like an empty one: the run would buy
everything again. So a SQLite file is created complete and in one place only, every later connection
requires that it exists, every transaction checks the identity of the journal, and a transaction
that has written checks that the journal's name still refers to the same file.

Connections are pooled, because closing the last one merges SQLite's write-ahead log into the file,
which costs ten times as much as a commit. A pooled connection would not notice that its file was
replaced. So the file is checked before each use: if it is another file, or if another process has
written to it, the connection is closed, and a new one checks the journal again.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar
from urllib.parse import unquote, urlsplit
from uuid import uuid4

from sqlalchemy import (
    URL,
    Connection,
    Engine,
    Select,
    create_engine,
    event,
    make_url,
    select,
)
from sqlalchemy.exc import DBAPIError, DisconnectionError, OperationalError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.pool import QueuePool

from krea_dagster import redact
from krea_dagster.engine.journal import migrations, schema
from krea_dagster.engine.journal.migrations import REVISIONS, Revisions
from krea_dagster.engine.journal.owners import AdvisoryLocks, FileLocks
from krea_dagster.engine.storage.storage import Storage, sync_folder
from krea_dagster.errors import ConfigError, JournalError, JournalUnavailable

#: Advice by words in SQLite's error message.
_ADVICE: Final = (
    ("disk is full", "Free space on its disk."),
    ("readonly", "Make the file and its folder writable for this user."),
    ("locked", "Another process has been writing to it for too long: wait for it, or end it."),
    (
        "unable to open",
        "Check the path, and that its folder can be read and written.",
    ),
    ("disk I/O error", "Check the disk: space, quota, health."),
    ("not a database", "{damaged}"),
    ("malformed", "{damaged}"),
    ("no such table", "{damaged}"),
    ("no such column", "{damaged}"),
)
_DAMAGED: Final = (
    "Do not remove it: it may be the only record of what was paid for. Restore a backup, or "
    "recover it with the .recover command of sqlite3."
)
_GONE: Final = (
    "Put it back before anything else runs: a new journal would know nothing of what was paid for."
)

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: SQLSTATEs of a transaction that PostgreSQL rolled back because of another one (a deadlock, a
#: serialization failure), and the pauses before retries, in seconds.
_CONCURRENT: Final = frozenset({"40001", "40P01"})
_PAUSES_S: Final = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)

#: Prefixes of SQLSTATEs that mean that PostgreSQL is unavailable: connection exceptions, shutting
#: down, starting up, too many connections.
_UNAVAILABLE_STATES: Final = ("08", "57P", "53300")

#: Time-outs after which libpq drivers treat a silent connection as broken.
_LIBPQ: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


#: Most connections of an open journal to PostgreSQL: half of them read, and half of them write, of
#: which each run holds one for its lock. A run usually has three.
MOST_CONNECTIONS: Final = 8


class Database:
    """The database behind a SQLAlchemy URL, at the schema of this version of the package.

    A missing database is created, an older one upgraded, a newer one refused. Raises ConfigError if
    the URL cannot be used, and JournalError if the database fails. ``lock_timeout_s`` is how long
    SQLite waits for another process that writes. Only tests pass other ``revisions``.
    """

    def __init__(
        self, url: str, *, lock_timeout_s: float = 60.0, revisions: Revisions = REVISIONS
    ) -> None:
        parsed = _parsed(url)
        self._url_with_secrets = url  # must not appear in any message
        self.where = redact.location(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self._file = _file_of(parsed) if self.sqlite else None
        self._url = parsed
        if self._file is not None:
            self._url = _file_url(parsed, self._file, str(parsed.query.get("mode", "rw")))
        self._lock_timeout_s = lock_timeout_s
        self._revisions = revisions
        self._identity: tuple[str, str] | None = None
        try:
            self._reading = self._engine(begin="BEGIN")
            self._writing = self._engine(begin="BEGIN IMMEDIATE")
        except (ImportError, ValueError, TypeError, SQLAlchemyError) as error:
            said = redact.text(str(error), url)
            raise ConfigError(f"the journal {self.where} cannot be used: {said}") from None
        #: The locks of the runs that are at work.
        self.locks: FileLocks | AdvisoryLocks = (
            AdvisoryLocks(self._writing)
            if self._file is None
            else FileLocks(self._file.with_name(f"{self._file.name}-runs"))
        )
        self._finalizer = weakref.finalize(
            self, _dispose, os.getpid(), self.locks, self._reading, self._writing
        )
        try:
            with self.translated_errors("open"):
                self._open()
        except BaseException:
            self.close()
            raise

    @property
    def journal_id(self) -> str:
        """Return the random name that identifies this journal."""
        return "" if self._identity is None else self._identity[0]

    def close(self) -> None:
        """Close the connections."""
        self._finalizer()

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """Yield a connection for one reading transaction."""
        with self.translated_errors("read"), self._reading.begin() as connection:
            self._check_identity(connection)
            yield connection

    def fetch(self, query: Select[Any]) -> Sequence[Any]:
        """Return the rows of a query."""
        with self.read() as connection:
            return connection.execute(query).all()

    def write(self, doing: str, work: Callable[[Connection], _T]) -> _T:
        """Do ``work`` in one transaction, which is durable when this returns.

        A transaction that PostgreSQL rolled back because of another one is repeated. ``doing`` is a
        verb for error messages.
        """
        with self.translated_errors(doing):
            for pause_s in _PAUSES_S:
                try:
                    return self._write_once(work)
                except DBAPIError as error:
                    if getattr(error.orig, "sqlstate", None) not in _CONCURRENT:
                        raise
                    time.sleep(pause_s)
            return self._write_once(work)

    def _write_once(self, work: Callable[[Connection], _T]) -> _T:
        with self._writing.connect() as connection:
            with connection.begin():
                self._check_identity(connection)
                done = work(connection)
            if self._file is not None:
                self._check_file(self._file, connection.info)
            return done

    def _check_file(self, file: Path, info: dict[Any, Any]) -> None:
        """Check that the journal's name still refers to the file that was written to."""
        found, opened = _FileStamp.of(file), info.get("stamp")
        if found is None or opened is None or not found.is_same_file(opened):
            raise JournalError(
                f"the journal {self.where} was removed or replaced during a write. "
                f"Nothing more is bought. {_GONE}"
            )
        info["stamp"] = found  # a commit may have merged the log into the file

    @contextmanager
    def snapshot(self) -> Iterator[Connection]:
        """Yield a connection whose reads see one moment. Errors of the caller are not changed."""
        with self.translated_errors("open"):
            connection = self._reading.connect()
        with connection:
            if not self.sqlite:
                # By default, each statement there sees a later moment.
                connection = connection.execution_options(isolation_level="REPEATABLE READ")
            with self.translated_errors("read"):
                self._check_identity(connection)
            yield connection

    def ping(self) -> None:
        """Check that the database answers. Raises JournalUnavailable, or another JournalError."""
        with self.read():
            pass

    def check_integrity(self) -> None:
        """Check a SQLite file completely. Raises JournalError if it is damaged.

        SQLite notices damage only in pages that it reads. Takes about 6 microseconds an image.
        """
        if self.sqlite:
            with self.read() as connection:
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
                f"the journal {self.where} is an empty file, so its content was lost. Restore a "
                "backup; remove the file only if nothing was ever bought with it."
            )
        with self._reading.begin() as connection:
            found = migrations.revision(connection)
        if found != self._revisions.head:
            self._upgrade(self._url)
        with self._reading.begin() as connection:
            self._identity = _as_identity(connection.execute(_IDENTITY).first())

    def _make_file(self, file: Path) -> None:
        """Create the file under another name and rename it, so that it is never empty."""
        file.parent.mkdir(parents=True, exist_ok=True)
        log = file.with_name(f"{file.name}-wal")
        if log.exists() and log.stat().st_size:
            raise JournalError(
                f"the journal {self.where} is missing, but its write-ahead log {log.name} is "
                f"there. {_GONE}"
            )
        new = file.with_name(f"{file.name}.{uuid4().hex}.new")
        try:
            self._upgrade(_file_url(self._url, new, "rwc"))
            with suppress(FileExistsError):  # another process was first
                _give_name(new, file)
                # A warning, because a wrong path creates one, too.
                _log.warning("Created a new journal: %s. It has no earlier purchases.", file)
            sync_folder(file.parent)
        finally:
            for ending in ("", "-wal", "-shm"):
                new.with_name(new.name + ending).unlink(missing_ok=True)

    def _upgrade(self, url: URL) -> None:
        engine = self._engine(url, begin="BEGIN IMMEDIATE", foreign_keys=False)
        try:
            with engine.begin() as connection:
                migrations.upgrade(connection, self._revisions, self.where)
        finally:
            engine.dispose()

    # -- guards -------------------------------------------------------------------------------

    def _check_identity(self, connection: Connection) -> None:
        self._check_found(connection.execute(_IDENTITY).first())

    def _check_found(self, row: Sequence[Any] | None) -> None:
        found = _as_identity(row)
        if self._identity is None or found == self._identity:
            return
        if found[0] == self._identity[0]:
            raise JournalError(
                f"the journal {self.where} was upgraded to schema revision {found[1]} by another "
                "version of krea-dagster during this run. Nothing more is bought. Run again with "
                "that version."
            )
        raise JournalError(
            f"the journal {self.where} was replaced by another one during this run. Nothing more "
            f"is bought. {_GONE}"
        )

    @contextmanager
    def translated_errors(self, doing: str) -> Iterator[None]:
        """Raise the database's errors as JournalErrors with advice."""
        try:
            yield
        except OSError as error:
            raise JournalError(
                f"could not {doing} the journal {self.where}: {error}. Nothing more is bought."
            ) from error
        except SQLAlchemyError as error:
            cause = (error.orig or error) if isinstance(error, DBAPIError) else error
            said = self._translated(doing, cause, is_unavailable=self._is_unavailable(error))
            raise said from redact.safe_cause(cause, self._url_with_secrets)

    def _is_unavailable(self, error: SQLAlchemyError) -> bool:
        """Return whether the database cannot be reached now, and the statement is not to blame."""
        if isinstance(error, PoolTimeout):
            return True
        if not isinstance(error, DBAPIError):
            return False
        if self.sqlite:
            return "locked" in str(error.orig)
        state = getattr(error.orig, "sqlstate", None)
        if state is None:  # an error of the driver: there was no connection, or it broke
            return error.connection_invalidated or isinstance(error, OperationalError)
        return str(state).startswith(_UNAVAILABLE_STATES)

    def _translated(
        self, doing: str, error: BaseException, *, is_unavailable: bool
    ) -> JournalError:
        # The statement, its parameters and the further lines of some drivers contain prompts.
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = redact.text(said, self._url_with_secrets)
        if is_unavailable:
            return JournalUnavailable(
                f"could not {doing} the journal {self.where}: {said}. Nothing more is bought "
                f"until it answers. {self._advice(said)}"
            )
        return JournalError(
            f"could not {doing} the journal {self.where}: {said}. Nothing more is bought "
            f"until this is fixed. {self._advice(said)}"
        )

    def _advice(self, said: str) -> str:
        if self._file is not None and not self._file.exists():
            return f"The file is missing. {_GONE}"
        if self.sqlite:
            for words, advice in _ADVICE:
                if words in said:
                    return advice.format(damaged=_DAMAGED)
        return "What was paid for is recorded in it, and the next run continues it."

    # -- connections --------------------------------------------------------------------------

    def _engine(self, url: URL | None = None, *, begin: str, foreign_keys: bool = True) -> Engine:
        if self._file is None:
            libpq = self._url.get_driver_name() in ("psycopg", "psycopg2")
            given = set(self._url.query)
            settings = {k: v for k, v in _LIBPQ.items() if libpq and k not in given}
            return create_engine(
                self._url,
                pool_size=2,
                max_overflow=MOST_CONNECTIONS // 2 - 2,  # there are two engines
                pool_pre_ping=True,
                connect_args=settings,
            )
        # The engine must not reference this object, or neither would be collected.
        file, lock_timeout_s = self._file, self._lock_timeout_s
        engine = create_engine(
            url or self._url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=-1,
            connect_args={"timeout": self._lock_timeout_s, "check_same_thread": False},
        )

        @event.listens_for(engine, "checkout")
        def _check(connection: Any, record: Any, proxy: Any) -> None:
            if record.info.pop("new", False):
                # Just opened. A write since then is harmless, and after two refusals the pool
                # would give up.
                return
            if record.info["pid"] != os.getpid():
                # It belongs to the parent process. Closing it here would drop the parent's locks.
                _of_the_parent.append(connection)
                record.dbapi_connection = proxy.dbapi_connection = None
                raise DisconnectionError
            if _FileStamp.of(file) != record.info["stamp"]:
                raise DisconnectionError

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            record.info.update(pid=os.getpid(), stamp=_FileStamp.of(file), new=True)
            # Transactions are begun explicitly, because the driver would begin them too late to
            # read and write under one lock.
            connection.isolation_level = None
            cursor = connection.cursor()
            _turn_log_on(cursor, lock_timeout_s)
            cursor.execute("PRAGMA synchronous = FULL")
            cursor.execute(f"PRAGMA foreign_keys = {'ON' if foreign_keys else 'OFF'}")
            cursor.close()

        @event.listens_for(engine, "begin")
        def _begin(connection: Connection) -> None:
            connection.exec_driver_sql(begin)

        return engine


class DatabaseLog:
    """A part of a journal's database. Its methods block, and raise JournalError if it fails."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._database.where!r})"

    def close(self) -> None:
        """Close the connections."""
        self._database.close()


def _turn_log_on(cursor: Any, lock_timeout_s: float) -> None:
    """Switch to the write-ahead log. SQLite does not wait for the lock that this needs once."""
    deadline_s = time.monotonic() + lock_timeout_s
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.02)
        else:
            return


def database_in(storage: Storage) -> str:
    """Return the URL of the default journal, in a storage root.

    Raises ConfigError for a root that is not a folder: SQLite needs a file.
    """
    if storage.folder is None:
        raise ConfigError(
            f"the storage root {storage.locate('')} is not a folder, so the journal needs another "
            "place: set journal_url (KREA_JOURNAL_URL), for example to PostgreSQL"
        )
    return f"sqlite:///{storage.folder / 'journal.db'}"


def has_database(url: str) -> bool:
    """Return whether a journal's database, or a rest of it, exists. Creates nothing.

    A server's database is assumed to exist. Raises ConfigError for an unusable URL.
    """
    parsed = _parsed(url)
    if parsed.get_backend_name() != "sqlite":
        return True
    file = _file_of(parsed)
    return file.exists() or file.with_name(f"{file.name}-wal").exists()


def _parsed(url: str) -> URL:
    try:
        parsed = make_url(url)
        usable = "@" not in (parsed.host or "") and 0 < (parsed.port or 1) < 65536
    except (SQLAlchemyError, ValueError):
        usable = False
    if not usable:
        shown = f": {redact.location(url)}" if "://" in url else ""
        # Without SQLAlchemy's text: it takes an unencoded password for the port, and shows it.
        raise ConfigError(
            f"the journal's URL cannot be read{shown} (KREA_JOURNAL_URL); "
            "expected something like sqlite:////data/journal.db or "
            "postgresql+psycopg://host:5432/database. In a user or a password write @ as %40, : as "
            "%3A, / as %2F, ? as %3F, # as %23, % as %25, [ as %5B and ] as %5D"
        ) from None
    if parsed.get_backend_name() == "sqlite":
        name = parsed.database or ""
        if name in ("", ":memory:") or "memory" in parsed.query.get("mode", ""):
            raise ConfigError(
                "the journal's URL does not name a file; expected something like "
                "sqlite:////data/journal.db: a journal must outlive its process"
            )
    return parsed


def _file_of(url: URL) -> Path:
    """Return the file of a SQLite URL, which may also be file:PATH with uri=true."""
    name = str(url.database)
    if name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return Path(name).absolute()


def _file_url(url: URL, file: Path, mode: str) -> URL:
    """Return the URL that opens a file in a mode: rw requires that the file exists."""
    return url.set(database=file.as_uri()).update_query_dict({"mode": mode, "uri": "true"})


#: The journal's id, and the revision of its tables.
_IDENTITY: Final = select(
    schema.about.c.journal_id,
    select(migrations.version_table.c.version_num).scalar_subquery().label("version"),
)


def _as_identity(row: Sequence[Any] | None) -> tuple[str, str]:
    return ("", "") if row is None else (str(row[0]), str(row[1]))


@dataclass(frozen=True)
class _FileStamp:
    """What shows that a file was replaced or written to."""

    device: int
    number: int
    size: int
    written_ns: int

    @classmethod
    def of(cls, file: Path) -> _FileStamp | None:
        """Return the present stamp of a file, None where there is none."""
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_same_file(self, other: _FileStamp) -> bool:
        """Return whether both are of the same file."""
        return (self.device, self.number) == (other.device, other.number)


#: SQLite connections of the parent process after a fork: never used, never closed.
_of_the_parent: Final[list[Any]] = []


def _dispose(pid: int, locks: FileLocks | AdvisoryLocks, *engines: Engine) -> None:
    if os.getpid() == pid:
        locks.close()
    for engine in engines:
        # A process must not close connections that it inherited.
        engine.dispose(close=os.getpid() == pid)


def _give_name(new: Path, file: Path) -> None:
    """Rename a file, if the name is free. Raises FileExistsError."""
    try:
        os.link(new, file)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        if file.exists():
            raise FileExistsError(str(file)) from None
        new.rename(file)

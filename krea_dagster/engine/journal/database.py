"""Connections to the journal's database: opened, upgraded, guarded, and explained when they fail.

A journal that is lost or exchanged while a run works must not look like one that is empty: the
run would buy everything again. So a SQLite file is created whole and in one place only, every
connection after that needs it to exist, every transaction asks which journal it is in, and one
that has written looks whether the file is still the one under the journal's name.

Connections are kept between uses, because the last one that closes takes SQLite's log into the
file, at ten times the cost of a commit. A kept one would not notice what happens to its file. So
before each use the file is looked at: where it is another one, or was written to by anybody else,
the connection is closed and a new one must find the journal as it should be.
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
    Table,
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
from krea_dagster.engine.journal.owners import FileLocks, Locks, SessionLocks
from krea_dagster.engine.journal.statements import insertion
from krea_dagster.engine.storage.storage import Storage, sync_folder
from krea_dagster.errors import ConfigError, JournalError, JournalUnavailable

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

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: SQLSTATEs of a transaction that PostgreSQL broke off for the sake of another (a deadlock, a
#: serialization failure), and the pauses before it is repeated, in seconds.
_CONCURRENT: Final = frozenset({"40001", "40P01"})
_PAUSES_S: Final = (0.01, 0.05, 0.2, 0.5, 1.0, 2.0)

#: The beginnings of SQLSTATEs by which PostgreSQL says that it cannot be talked to now: connection
#: exceptions, shutting down, starting up, too many connections.
_AWAY_STATES: Final = ("08", "57P", "53300")

#: How long connections to a server may be silent before they count as broken, for libpq's drivers.
_LIBPQ: Final = {
    "connect_timeout": 10,
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 3,
    "tcp_user_timeout": 30_000,
}


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
        self._given = url  # what is to be seen of it nowhere
        self.where = redact.location(url)
        self.sqlite = parsed.get_backend_name() == "sqlite"
        self._file = _file_of(parsed) if self.sqlite else None
        self._url = parsed
        if self._file is not None:
            self._url = _file_url(parsed, self._file, str(parsed.query.get("mode", "rw")))
        self._lock_timeout_s = lock_timeout_s
        self._history = revisions
        self._identity: tuple[str, str] | None = None
        self.begun = False
        try:
            self._reading = self._engine(begin="BEGIN")
            self._writing = self._engine(begin="BEGIN IMMEDIATE")
        except (ImportError, ValueError, TypeError, SQLAlchemyError) as error:
            said = redact.text(str(error), url)
            raise ConfigError(f"the journal {self.where} cannot be used: {said}") from None
        #: Which runs hold claims, and which of them are at work.
        self.locks: Locks = (
            SessionLocks(self._writing)
            if self._file is None
            else FileLocks(self._file.with_name(f"{self._file.name}-runs"))
        )
        self._finalizer = weakref.finalize(
            self, _dispose, os.getpid(), self.locks, self._reading, self._writing
        )
        try:
            with self.explained("open"):
                self._open()
        except BaseException:
            self.close()
            raise

    def insertion(self, table: Table) -> Any:
        """Return an INSERT that may say what is done about a conflict."""
        return insertion(self._writing, table)

    @property
    def journal_id(self) -> str:
        """The random name that tells this journal from every other."""
        return "" if self._identity is None else self._identity[0]

    def close(self) -> None:
        """Close the connections."""
        self._finalizer()

    @contextmanager
    def read(self, doing: str) -> Iterator[Connection]:
        """Yield a connection for one reading transaction. ``doing`` is a verb for its errors."""
        with self.explained(doing), self._reading.begin() as connection:
            self._check_identity(connection)
            yield connection

    def write(self, doing: str, work: Callable[[Connection], _T]) -> _T:
        """Do ``work`` in one transaction that is durable once this has returned.

        One that the database broke off for the sake of another, as PostgreSQL does, is repeated.
        """

        def once() -> _T:
            with self._writing.connect() as connection:
                with connection.begin():
                    self._check_identity(connection)
                    done = work(connection)
                if self._file is not None:
                    self._look_at_file(self._file, connection.info)
                return done

        with self.explained(doing):
            return self._repeated(once)

    def _repeated(self, once: Callable[[], _T]) -> _T:
        for pause_s in _PAUSES_S:
            try:
                return once()
            except DBAPIError as error:
                if getattr(error.orig, "sqlstate", None) not in _CONCURRENT:
                    raise
                time.sleep(pause_s)
        return once()

    def _look_at_file(self, file: Path, info: dict[Any, Any]) -> None:
        """See that what was written is in the file that has the journal's name."""
        found, opened = _Stamp.of(file), info.get("stamp")
        if found is None or opened is None or not found.is_same_file(opened):
            raise JournalError(
                f"the journal {self.where} was removed or replaced while it was written to. "
                f"Nothing more is bought. {_GONE}"
            )
        info["stamp"] = found  # a commit may have taken the log into the file

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

    def ping(self) -> None:
        """Check that the database answers. Raises JournalUnavailable, or another JournalError."""
        with self.read("read"):
            pass

    def check_integrity(self) -> None:
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
            self._identity = _as_identity(connection.execute(_IDENTITY).first())

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
                self.begun = True
                # Loudly, because it knows of no purchase: a wrong path begins one, too.
                _log.warning("A new journal is begun: %s. It knows of no earlier purchase.", file)
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
        self._check_found(connection.execute(_IDENTITY).first())

    def _check_found(self, row: Sequence[Any] | None) -> None:
        found = _as_identity(row)
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
        except SQLAlchemyError as error:
            cause = (error.orig or error) if isinstance(error, DBAPIError) else error
            said = self._explanation(doing, cause, is_away=self._is_away(error))
            raise said from redact.safe_cause(cause, self._given)

    def _is_away(self, error: SQLAlchemyError) -> bool:
        """Whether it is the database that cannot be reached now, and not what was asked of it."""
        if isinstance(error, PoolTimeout):
            return True
        if not isinstance(error, DBAPIError):
            return False
        if self.sqlite:
            return "locked" in str(error.orig)
        state = getattr(error.orig, "sqlstate", None)
        if state is None:  # the driver itself says it: there was no connection, or it broke
            return error.connection_invalidated or isinstance(error, OperationalError)
        return str(state).startswith(_AWAY_STATES)

    def _explanation(self, doing: str, error: BaseException, *, is_away: bool) -> JournalError:
        # The statement, its parameters and the further lines of some drivers hold prompts.
        said = (str(error).splitlines() or [type(error).__name__])[0]
        said = redact.text(said, self._given)
        if is_away:
            return JournalUnavailable(
                f"could not {doing} the journal {self.where}: {said}. Nothing more is bought "
                f"until it answers. {self._advice(said)}"
            )
        return JournalError(
            f"could not {doing} the journal {self.where}: {said}. Nothing more is bought "
            f"until this is mended. {self._advice(said)}"
        )

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
            libpq = self._url.get_driver_name() in ("psycopg", "psycopg2")
            given = set(self._url.query)
            settings = {k: v for k, v in _LIBPQ.items() if libpq and k not in given}
            return create_engine(self._url, pool_size=2, pool_pre_ping=True, connect_args=settings)
        # The engine must not hold this object, or neither would ever end.
        file, lock_timeout_s = self._file, self._lock_timeout_s
        engine = create_engine(
            url or self._url,
            poolclass=QueuePool,
            pool_size=1,
            max_overflow=-1,
            connect_args={"timeout": self._lock_timeout_s, "check_same_thread": False},
        )

        @event.listens_for(engine, "checkout")
        def _look(connection: Any, record: Any, proxy: Any) -> None:
            if record.info.pop("new", False):
                # Made just now, of the file as it is. That it has been written to since says
                # nothing, and after two refusals the pool would give up.
                return
            if record.info["pid"] != os.getpid():
                # It is the parent's, whose locks go with it if it is closed here.
                _of_the_parent.append(connection)
                record.dbapi_connection = proxy.dbapi_connection = None
                raise DisconnectionError
            if _Stamp.of(file) != record.info["stamp"]:
                raise DisconnectionError

        @event.listens_for(engine, "connect")
        def _configure(connection: Any, record: Any) -> None:
            record.info.update(pid=os.getpid(), stamp=_Stamp.of(file), new=True)
            # Transactions are begun by hand, because the driver would begin them too late to
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


def _turn_log_on(cursor: Any, lock_timeout_s: float) -> None:
    """Switch to the write-ahead log. SQLite itself does not wait for the lock it needs once."""
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
    """Return the URL of the journal in a storage root, where nobody named another.

    Raises ConfigError for a root that is no folder: SQLite needs a file.
    """
    if storage.folder is None:
        raise ConfigError(
            f"the storage root {storage.locate('')} is not a folder, so the journal needs a place "
            "of its own: set journal_url (KREA_JOURNAL_URL), for example to PostgreSQL"
        )
    return f"sqlite:///{storage.folder / 'journal.db'}"


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
        usable = "@" not in (parsed.host or "") and 0 < (parsed.port or 1) < 65536
    except (SQLAlchemyError, ValueError):
        usable = False
    if not usable:
        shown = f": {redact.location(url)}" if "://" in url else ""
        # Not what SQLAlchemy said: a password that is not encoded is taken for the port, and named.
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


#: Which journal this is, and at which revision of its tables.
_IDENTITY: Final = select(
    schema.about.c.journal_id,
    select(migrations.version_table.c.version_num).scalar_subquery().label("version"),
)


def _as_identity(row: Sequence[Any] | None) -> tuple[str, str]:
    return ("", "") if row is None else (str(row[0]), str(row[1]))


@dataclass(frozen=True)
class _Stamp:
    """What tells a file from another of its name, and from itself before it was written to."""

    device: int
    number: int
    size: int
    written_ns: int

    @classmethod
    def of(cls, file: Path) -> _Stamp | None:
        """The stamp of a file as it is now, or None where there is none."""
        try:
            found = file.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
        return cls(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)

    def is_same_file(self, other: _Stamp) -> bool:
        """Whether both are of one file."""
        return (self.device, self.number) == (other.device, other.number)


#: SQLite's connections of the process that this one was forked from: never used, never closed.
_of_the_parent: Final[list[Any]] = []


def _dispose(pid: int, locks: Locks, *engines: Engine) -> None:
    if os.getpid() == pid:
        locks.close()
    for engine in engines:
        # What a process has inherited is not its own to close.
        engine.dispose(close=os.getpid() == pid)


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

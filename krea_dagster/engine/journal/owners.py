"""The owners of claims, and whether they are alive.

This does not rely on clocks of hosts or process tables: clocks are set, and process ids repeat.

On SQLite a run locks a file next to the journal. The kernel releases the lock with the process, and
a run that ends in a living process releases it.

On PostgreSQL a run holds an advisory lock in a separate session and writes a heartbeat by the
database's clock. It is dead when it has lost the lock and has been silent for ``SILENCE_S``: a
connection that breaks for seconds loses only the lock, a suspended process only the heartbeat.
"""

from __future__ import annotations

import os
import socket
import threading
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from sqlalchemy import Connection, Engine, Row, literal_column, select, text
from sqlalchemy.exc import SQLAlchemyError

from krea_dagster import file_locks
from krea_dagster.engine.journal.schema import POSTGRES_NOW_US, UtcTime, owners

#: Seconds without a heartbeat after which an owner without a lock counts as dead.
SILENCE_S: Final = 90.0


@dataclass(frozen=True)
class Owner:
    """A run of a process. ``host`` and ``pid`` are for people."""

    owner: str
    run_id: str
    host: str
    pid: int


def new_owner(run_id: str) -> Owner:
    """Return a new owner for a run in this process."""
    return Owner(uuid.uuid4().hex, run_id, socket.gethostname(), os.getpid())


class FileLocks:
    """Locks on files in a folder next to a SQLite journal, one file for each owner.

    If the file system has no locks, or an owner's file was removed, the heartbeat decides: the
    owner is dead when this process has seen no new one for ``SILENCE_S`` by its monotonic clock.
    """

    def __init__(self, folder: Path, *, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._folder = folder
        self._monotonic = monotonic
        self._taken: set[str] = set()

    def take(self, owner: str) -> None:
        """Lock the owner's file; create it again if it was removed."""
        path = self._folder / owner
        with _guard:
            held = _held.get(owner)
            if held is not None and _is_file(path, held):
                return
            with suppress(OSError):  # then the heartbeat decides
                self._folder.mkdir(parents=True, exist_ok=True)
                descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    file_locks.lock(descriptor, wait=False)
                except OSError:
                    os.close(descriptor)
                    path.unlink(missing_ok=True)
                    raise
                _held[owner] = descriptor
                self._taken.add(owner)
                if held is not None:
                    os.close(held)

    def give_back(self, owner: str) -> None:
        """Close the owner's file, which releases the lock, and leave the file for others to see."""
        with _guard:
            _ended.add(owner)
            self._taken.discard(owner)
            descriptor = _held.pop(owner, None)
            if descriptor is not None:
                os.close(descriptor)

    def dead(self, connection: Connection) -> set[str]:
        """Return the owners whose file exists unlocked, or that are silent."""
        return {row.owner for row in connection.execute(select(owners)) if not self._is_alive(row)}

    def forget(self, owner: str) -> None:
        """Remove the file of an owner that is no longer registered."""
        with suppress(OSError):
            (self._folder / owner).unlink(missing_ok=True)

    def now(self) -> Any:
        """Return the time of this host: of a heartbeat it only counts that it is another one."""
        return datetime.now(timezone.utc)

    def close(self) -> None:
        """Release every lock that this object has taken."""
        for owner in list(self._taken):
            self.give_back(owner)

    def _is_alive(self, row: Row[Any]) -> bool:
        with _guard:
            if row.owner in _held:
                return True
            if row.owner in _ended:
                return False
            try:
                descriptor = os.open(self._folder / row.owner, os.O_RDWR)
            except OSError:
                return self._is_heard(row.owner, row.heartbeat_at)
            try:
                file_locks.lock(descriptor, wait=False)
            except OSError:
                return True
            finally:
                os.close(descriptor)
            return False

    def _is_heard(self, owner: str, heartbeat_at: datetime) -> bool:
        now_s = self._monotonic()
        last, since_s = _heard.get(owner, (None, now_s))
        if last != heartbeat_at:
            since_s = now_s
        _heard[owner] = (heartbeat_at, since_s)
        return now_s - since_s <= SILENCE_S


#: The files that this process has locked, its owners that have ended, and the heartbeats that it
#: has seen, by owner.
_held: Final[dict[str, int]] = {}
_ended: Final[set[str]] = set()
_heard: Final[dict[str, tuple[datetime, float]]] = {}
_guard: Final = threading.RLock()


def _close_inherited() -> None:
    """Close the locked files in a forked child, which would keep its parent's locks alive."""
    for descriptor in _held.values():
        with suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_guard.acquire,
        after_in_parent=_guard.release,
        after_in_child=lambda: (_close_inherited(), _guard.release()),  # type: ignore[func-returns-value]
    )


def _is_file(path: Path, descriptor: int) -> bool:
    try:
        found, opened = path.stat(), os.fstat(descriptor)
    except OSError:
        return False
    return (found.st_dev, found.st_ino) == (opened.st_dev, opened.st_ino)


#: The advisory locks that are held in this database.
_ADVISORY: Final = text(
    "SELECT (classid::bigint << 32) | objid::bigint FROM pg_locks WHERE locktype = 'advisory' "
    "AND objsubid = 1 AND database = (SELECT oid FROM pg_database WHERE datname = "
    "current_database())"
)
#: With these the server notices within a minute that a session's host is gone.
_KEEPALIVE: Final = (
    "SET tcp_keepalives_idle = 20",
    "SET tcp_keepalives_interval = 10",
    "SET tcp_keepalives_count = 3",
)


class AdvisoryLocks:
    """PostgreSQL's advisory locks, each in its own session, and heartbeats by its clock."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sessions: dict[str, Connection] = {}

    def take(self, owner: str) -> None:
        """Lock the owner's number, in a session that stays open."""
        session = self._sessions.get(owner)
        if session is not None:
            try:
                session.execute(text("SELECT 1"))
            except SQLAlchemyError:
                self.give_back(owner)
            else:
                return
        session = self._engine.connect().execution_options(isolation_level="AUTOCOMMIT")
        try:
            for setting in _KEEPALIVE:
                session.execute(text(setting))
            session.execute(text("SELECT pg_advisory_lock(:number)"), {"number": _number(owner)})
        except BaseException:
            session.invalidate()
            session.close()
            raise
        self._sessions[owner] = session

    def give_back(self, owner: str) -> None:
        """End the owner's session, which releases the lock."""
        session = self._sessions.pop(owner, None)
        if session is not None:
            with suppress(SQLAlchemyError):
                # In the pool the session would keep its lock.
                session.invalidate()
            session.close()

    def dead(self, connection: Connection) -> set[str]:
        """Return the owners that hold no lock and are silent, by the database's clock."""
        limit = text(f"heartbeat_at < {POSTGRES_NOW_US} - {int(SILENCE_S * 1_000_000)}")
        silent = set(connection.execute(select(owners.c.owner).where(limit)).scalars())
        if not silent:
            return silent
        locked = set(connection.execute(_ADVISORY).scalars())
        return {owner for owner in silent if _number(owner) not in locked}

    def forget(self, owner: str) -> None:
        """Do nothing: a session leaves nothing behind."""

    def now(self) -> Any:
        """Return the database's time, as an expression."""
        return literal_column(POSTGRES_NOW_US, UtcTime)

    def close(self) -> None:
        """End every session that this object has begun."""
        for owner in list(self._sessions):
            self.give_back(owner)


def _number(owner: str) -> int:
    """Return the number of an owner's lock, a signed 64-bit integer."""
    return int.from_bytes(bytes.fromhex(owner)[:8], "big", signed=True)

"""The SQLite file of the emulator's state: its tables, its lock, its transactions."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Final

#: How long a start waits for a previous emulator that may still be ending.
LOCK_WAIT_S = 5.0

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS accounts (
    id INTEGER PRIMARY KEY,
    key_hash TEXT NOT NULL UNIQUE,
    granted INTEGER NOT NULL,
    reserved INTEGER NOT NULL DEFAULT 0,
    charged INTEGER NOT NULL DEFAULT 0,
    returned INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS tasks (
    n INTEGER PRIMARY KEY,
    task_id TEXT NOT NULL UNIQUE,
    account INTEGER NOT NULL REFERENCES accounts (id),
    idempotency_key TEXT,
    fingerprint TEXT NOT NULL,
    prompt TEXT NOT NULL,
    size TEXT NOT NULL,
    quality TEXT NOT NULL,
    seed INTEGER,
    nsfw_check INTEGER NOT NULL,
    callback_url TEXT,
    used_seed INTEGER NOT NULL,
    reserved INTEGER NOT NULL,
    created_at REAL NOT NULL,
    started_at REAL NOT NULL,
    ready_at REAL,
    ends_as TEXT NOT NULL CHECK (ends_as IN ('completed', 'failed', 'cancelled')),
    error_code TEXT,
    faults TEXT NOT NULL,
    settled INTEGER NOT NULL DEFAULT 0,
    reads_at_end INTEGER NOT NULL DEFAULT 0,
    fetched INTEGER NOT NULL DEFAULT 0,
    file_sha256 TEXT
);
CREATE INDEX IF NOT EXISTS tasks_to_settle ON tasks (ready_at) WHERE settled = 0;
CREATE INDEX IF NOT EXISTS tasks_by_account ON tasks (account, settled, ends_as, n);
CREATE INDEX IF NOT EXISTS tasks_by_fingerprint ON tasks (fingerprint);
CREATE TABLE IF NOT EXISTS idempotency (
    account INTEGER NOT NULL REFERENCES accounts (id),
    key TEXT NOT NULL,
    body_hash TEXT NOT NULL,
    n INTEGER NOT NULL REFERENCES tasks (n),
    undecided_until REAL NOT NULL,
    PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS taken_keys (
    account INTEGER NOT NULL REFERENCES accounts (id),
    key TEXT NOT NULL,
    PRIMARY KEY (account, key)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS callbacks (
    id INTEGER PRIMARY KEY,
    n INTEGER NOT NULL REFERENCES tasks (n),
    due_at REAL NOT NULL,
    forged TEXT NOT NULL,
    tries INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS callbacks_by_time ON callbacks (due_at, id);
CREATE TABLE IF NOT EXISTS counts (
    kind TEXT NOT NULL, what TEXT NOT NULL, n INTEGER NOT NULL, PRIMARY KEY (kind, what)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS scripts (
    id INTEGER PRIMARY KEY,
    name TEXT NOT NULL,
    kind TEXT NOT NULL,
    arg TEXT,
    match TEXT,
    still INTEGER NOT NULL
);
"""


class StateInUseError(RuntimeError):
    """Another emulator uses the same state folder."""


class StateFile:
    """The open state file. Thread-safe; one process at a time.

    What a transaction wrote survives the end of the process, also a kill.
    Raises StateInUseError if another emulator uses the folder.
    """

    def __init__(self, folder: Path) -> None:
        self.lock = threading.RLock()
        self.db = _open(folder)
        self._inside = False

    def close(self) -> None:
        """Close the file. The state cannot be used afterwards."""
        with self.lock:
            self.db.close()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Commit everything inside together, at the end of the outermost block."""
        with self.lock:
            if self._inside:
                yield
                return
            self._inside = True
            self.db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self.db.execute("ROLLBACK")
                raise
            else:
                self.db.execute("COMMIT")
            finally:
                self._inside = False

    def count(self, kind: str, what: str) -> None:
        """Add one to a count."""
        with self.transaction():
            self.db.execute(
                "INSERT INTO counts VALUES (?, ?, 1) ON CONFLICT DO UPDATE SET n = n + 1",
                (kind, what),
            )

    def meta(self, name: str, default: str) -> str:
        """Return a stored text; the first time it is ``default``."""
        self.db.execute("INSERT OR IGNORE INTO meta VALUES (?, ?)", (name, default))
        row = self.db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return str(row[0])


def _open(state: Path) -> sqlite3.Connection:
    state.mkdir(parents=True, exist_ok=True)
    db = sqlite3.connect(
        state / "emulator.db", timeout=LOCK_WAIT_S, isolation_level=None, check_same_thread=False
    )
    try:
        # The lock of this mode keeps a second emulator out; a killed one leaves no lock.
        db.execute("PRAGMA locking_mode = EXCLUSIVE")
        db.execute("PRAGMA journal_mode = WAL")
        # Enough for a killed process. Only a power failure could lose the last commits.
        db.execute("PRAGMA synchronous = NORMAL")
        db.executescript(_SCHEMA)
    except sqlite3.OperationalError as error:
        db.close()
        if "locked" in str(error):
            raise StateInUseError(f"{state} is in use by another emulator") from None
        raise
    return db

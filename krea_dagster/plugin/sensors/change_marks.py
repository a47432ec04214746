"""Marks of the table's files, of the attempts and of reports, which the prompts sensor compares.

They are cheap to take. The table is read only if one has changed.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TypeVar

import dagster as dg
import fsspec.core

from krea_dagster.application.backend import Backend
from krea_dagster.prompts import PromptTable

#: Keys of a file's info that change with its content; each file system has its own.
_CONTENT_KEYS: Final = (
    "size", "Size", "mtime", "created", "ino", "ETag", "etag", "e_tag", "md5Hash", "content_md5",
    "generation", "LastModified", "last_modified", "updated", "modified",
)  # fmt: skip
_TIME_KEYS: Final = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")

#: A file written more recently than this may be written again without a new time or size.
_TOO_FRESH_S: Final = 2.0


T = TypeVar("T")


@dataclass(frozen=True)
class Marks:
    """The sensor's cursor: about 200 bytes for any number of partitions.

    ``files`` is empty if the listing of the files does not show changes; the table is then read at
    every tick. ``reported`` are the positions in Dagster's event log of the last reports, by the
    sensor or by runs. ``versions`` is one hash over the data versions of all partitions.
    """

    files: str
    attempts: str
    reported: str
    versions: str = ""

    def unchanged_since(self, before: "Marks | None") -> bool:
        """Return whether nothing has changed since ``before``, when everything was reported."""
        return (
            before is not None
            and self.files != ""
            and (self.files, self.attempts, self.reported)
            == (before.files, before.attempts, before.reported)
        )


def read_cursor(kind: type[T], cursor: str | None) -> T | None:
    """Read a cursor; None for none, and for one of another version of this package."""
    try:
        return kind(**json.loads(cursor or "null"))
    except (TypeError, ValueError):
        return None


def mark_of_files(source: str, *, now_s: float | None = None) -> str:
    """Return a hash over path, size, time and etag of a table's files, without reading them.

    Returns "" if that does not show changes: there is no such file, its file system gives no time,
    or it was written just now (``now_s`` in seconds since 1970; None for the clock's).
    """
    now_s = time.time() if now_s is None else now_s
    try:
        filesystem, root = fsspec.core.url_to_fs(source)
        filesystem.invalidate_cache()
        info = filesystem.info(root)
        found = {root: info} if info["type"] == "file" else filesystem.find(root, detail=True)
    except (ImportError, OSError, ValueError):
        return ""
    lines = sorted(
        json.dumps([path, *(str(info.get(name)) for name in _CONTENT_KEYS)])
        for path, info in found.items()
    )
    newest_s = max((at for one in found.values() if (at := _time_s(one))), default=None)
    if not lines or newest_s is None or abs(now_s - newest_s) < _TOO_FRESH_S:
        return ""
    return _hash(lines)


def mark_of_attempts(krea: Backend, table: PromptTable) -> str:
    """Return the number of a table's attempts in the journal, and their sum, which only grow.

    Creates no journal. Raises ConfigError or JournalError.
    """
    if not krea.has_journal():
        return ""
    with krea.open_journal() as journal:
        count, total = journal.attempts(krea.table_id(journal, table)).fingerprint()
    return f"{count}/{total}"


def mark_of_reports(instance: dg.DagsterInstance, keys: Sequence[dg.AssetKey]) -> str:
    """Return the positions of the assets' last materializations in Dagster's event log."""
    positions = {}
    for record in instance.get_asset_records(keys):
        last = record.asset_entry.last_materialization_record
        positions[record.asset_entry.asset_key] = None if last is None else last.storage_id
    return "/".join(str(positions.get(key) or 0) for key in keys)


def hash_of_versions(*versions: Mapping[str, str]) -> str:
    """Return one hash over the data versions of many partitions of some assets."""
    return _hash(
        json.dumps([number, *one])
        for number, some in enumerate(versions)
        for one in sorted(some.items())
    )


def _time_s(info: Mapping[str, Any]) -> float | None:
    """Return when a file was written, in seconds since 1970; None if its info does not say."""
    for name in _TIME_KEYS:
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp()
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, str):
            try:
                return datetime.fromisoformat(value.replace("Z", "+00:00")).timestamp()
            except ValueError:
                continue
    return None


def _hash(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]

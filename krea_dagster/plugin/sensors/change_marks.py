"""What the prompts sensor looks at: a mark of the table's files, of the attempts, and of reports.

Marks are cheap. Only where one has moved is the table read.
"""

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Final

import dagster as dg
import fsspec.core

from krea_dagster.application.backend import Backend
from krea_dagster.prompts import PromptTable

#: What file systems say of a file that another content would change, each in its own words.
_TELLING: Final = (
    "size", "Size", "mtime", "created", "ino", "ETag", "etag", "e_tag", "md5Hash", "content_md5",
    "generation", "LastModified", "last_modified", "updated", "modified",
)  # fmt: skip
_TIMES: Final = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")

#: A file that was written to so lately may be written to again without a new time or size.
_TOO_FRESH_S: Final = 2.0


@dataclass(frozen=True)
class Marks:
    """What the sensor keeps between ticks: some 200 bytes, however many partitions there are.

    ``files`` is empty where the files cannot be told from others by their listing; then the table
    is read at every tick. ``reported`` are the places in Dagster's event log of the last reports,
    whoever made them. ``versions`` is one hash over the data versions of all partitions.
    """

    files: str
    attempts: str
    reported: str
    versions: str = ""

    @classmethod
    def from_cursor(cls, cursor: str | None) -> "Marks | None":
        """Read a cursor; None for none, and for one of another version of this package."""
        try:
            return cls(**json.loads(cursor or "null"))
        except (TypeError, ValueError):
            return None

    def cursor(self) -> str:
        """Return the text to keep."""
        return json.dumps(asdict(self))

    def stand_still(self, before: "Marks | None") -> bool:
        """Whether nothing has moved since ``before``, at which all was reported."""
        return (
            before is not None
            and self.files != ""
            and (self.files, self.attempts, self.reported)
            == (before.files, before.attempts, before.reported)
        )


def mark_of_files(source: str, *, now_s: float | None = None) -> str:
    """Return a hash over path, size, time and etag of a table's files; reads none of them.

    Returns "" where that says too little: there is no such file, its file system has no words for
    it, or it was written to just now (``now_s`` in seconds since 1970; None for the clock's).
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
        json.dumps([path, *(str(info.get(word)) for word in _TELLING)])
        for path, info in found.items()
    )
    newest_s = max((at for one in found.values() if (at := _time_s(one))), default=None)
    if not lines or newest_s is None or abs(now_s - newest_s) < _TOO_FRESH_S:
        return ""
    return _hash(lines)


def mark_of_attempts(krea: Backend, table: PromptTable) -> str:
    """Return how many attempts the journal knows of a table, and their sum: they only ever grow.

    Makes no journal where there is none. Raises ConfigError or JournalError.
    """
    if not krea.has_journal():
        return ""
    with krea.open_journal() as journal:
        count, total = journal.attempts(krea.table_id(journal, table)).fingerprint()
    return f"{count}/{total}"


def mark_of_reports(instance: dg.DagsterInstance, keys: Sequence[dg.AssetKey]) -> str:
    """Return the places of the assets' last materializations in Dagster's event log."""
    places = {}
    for record in instance.get_asset_records(keys):
        last = record.asset_entry.last_materialization_record
        places[record.asset_entry.asset_key] = None if last is None else last.storage_id
    return "/".join(str(places.get(key) or 0) for key in keys)


def hash_of_versions(*versions: Mapping[str, str]) -> str:
    """Return one hash over the data versions of many partitions of some assets."""
    return _hash(
        json.dumps([number, *one])
        for number, some in enumerate(versions)
        for one in sorted(some.items())
    )


def _time_s(info: Mapping[str, Any]) -> float | None:
    """When a file was written, in seconds since 1970, by the first word that tells."""
    for word in _TIMES:
        value = info.get(word)
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

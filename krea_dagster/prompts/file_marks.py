"""The mark of a table's files: it tells cheaply whether the table must be read again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from krea_dagster.file_systems import Options, local_path, open_url

#: Keys of a file's info that change with its content; each file system has its own.
_CONTENT_KEYS: Final = (
    "size", "Size", "mtime", "created", "ino", "ETag", "etag", "e_tag", "md5Hash", "content_md5",
    "generation", "LastModified", "last_modified", "updated", "modified",
)  # fmt: skip
_TIME_KEYS: Final = ("mtime", "LastModified", "last_modified", "updated", "modified", "created")

#: A file written more recently than this may be written again without a new time or size.
_TOO_FRESH_S: Final = 2.0


def mark_of_files(
    source: str, options: Options | None = None, *, now_s: float | None = None
) -> str:
    """Return a hash over path, size, time and etag of a table's files, without reading them.

    Returns "" if that does not show changes: there is no such file, its file system gives no time,
    or it was written just now (``now_s`` in seconds since 1970; None for the clock's).
    """
    now_s = time.time() if now_s is None else now_s
    try:
        path = local_path(source)
        found = _remote_files(source, options) if path is None else _local_files(path)
    except Exception:  # noqa: BLE001 - each file system has errors of its own; reading shows them
        return ""
    lines = sorted(
        json.dumps([path, *(str(info.get(name)) for name in _CONTENT_KEYS)])
        for path, info in found.items()
    )
    newest_s = max((at for one in found.values() if (at := _time_s(one))), default=None)
    if not lines or newest_s is None or abs(now_s - newest_s) < _TOO_FRESH_S:
        return ""
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:32]


def _remote_files(source: str, options: Options | None) -> Mapping[str, Mapping[str, Any]]:
    filesystem, root = open_url(source, options)
    info = filesystem.info(root)
    if info["type"] == "file":
        return {root: info}
    found: Mapping[str, Mapping[str, Any]] = filesystem.find(root, detail=True)
    return found


def _local_files(root: Path) -> Mapping[str, Mapping[str, Any]]:
    """Return the same for a file or folder of this machine. Links to folders are not followed."""
    found = [root]
    if root.is_dir():
        found = [
            Path(folder, name)
            for folder, folders, files in os.walk(root)
            for name in (*files, *(name for name in folders if Path(folder, name).is_symlink()))
        ]
    infos = {}
    for path in found:
        about = path.stat()
        infos[str(path)] = {
            "size": about.st_size,
            "mtime": about.st_mtime,
            "created": about.st_ctime,
            "ino": about.st_ino,
        }
    return infos


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

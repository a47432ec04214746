"""The target of an export: a folder or an object store with atomically published versions.

.. code-block:: text

    <target>/LATEST             the name of the current version; written last
    <target>/latest             the same as a symbolic link, where the target is a folder
    <target>/<version>/         one export, immutable once it is published
        README.md               the dataset card
        croissant.json          the same for programs
        export.json             its content; a version without it is incomplete
        index.parquet           each image: its shard, its row, its hashes
        …                       the shards

A reader of ``LATEST`` (or the link) sees the old export or the new one, never a partial one. Shards
that are unchanged since the previous version are hard links in a folder, and server-side copies in
an object store.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import pyarrow as pa

from krea_dagster.engine.storage.storage import Storage, sync_folder
from krea_dagster.errors import StorageError
from krea_dagster.file_systems import Options
from krea_dagster.parquet_files import open_parquet

LATEST: Final = "LATEST"
LINK: Final = "latest"
EXPORT: Final = "export.json"
INDEX: Final = "index.parquet"

#: The columns of an index.
INDEX_SCHEMA: Final = pa.schema(
    [
        ("key", pa.string()),
        ("split", pa.string()),
        ("shard", pa.int32()),
        ("file", pa.string()),
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("request_key", pa.string()),
        ("image_sha256", pa.string()),
        ("exported_sha256", pa.string()),
        ("exported_bytes", pa.int64()),
    ]
)

FORMAT_VERSION: Final = 1

_VERSION: Final = re.compile(r"[0-9a-f]{16}")
_PIECE: Final = 1 << 20


class ExportTarget:
    """A folder or URL for exports. Thread-safe."""

    def __init__(self, root: str, options: Options | None = None) -> None:
        self.storage = Storage(root, options, called="the export's target")
        self._made: set[str] = set()
        self._unsynced = False

    @property
    def is_folder(self) -> bool:
        """Whether it is a local folder."""
        return self.storage.folder is not None

    def locate(self, name: str) -> str:
        """Return the path or URL of a name."""
        return self.storage.locate(name)

    def latest(self) -> str | None:
        """Return the current version; None where there is none yet."""
        try:
            found = self.storage.read(LATEST).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        return found if _VERSION.fullmatch(found) else None

    def described(self, version: str) -> dict[str, Any] | None:
        """Return a version's ``export.json``; None where it is incomplete or of another format."""
        try:
            found = json.loads(self.read(f"{version}/{EXPORT}"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
            return None
        return found

    def index(self, version: str) -> pa.Table:
        """Return the index of a version; empty where it was removed."""
        try:
            with self.storage.open(f"{version}/{INDEX}") as file:
                return open_parquet(file).read()
        except FileNotFoundError:
            return INDEX_SCHEMA.empty_table()

    def publish(self, version: str) -> None:
        """Make a complete version the current one. Raises StorageError.

        Another export may remove old versions at the same time (``prune``), including this one.
        """
        if self._unsynced and hasattr(os, "sync"):
            os.sync()  # small files were not synced one by one
        else:
            for folder in self._made:
                sync_folder(folder)
        before = self.latest()
        self._check_there(version)
        self._point_at(version)
        try:
            self._check_there(version)
        except StorageError:
            if before is not None and self.described(before) is not None:
                self._point_at(before)
            else:
                self.storage.remove(LATEST)
            raise
        if self.storage.folder is not None:
            link = self.storage.folder / LINK
            with suppress(OSError):  # some file systems have no links
                temporary = link.with_name(f".{LINK}-{os.getpid()}")
                temporary.unlink(missing_ok=True)
                temporary.symlink_to(version, target_is_directory=True)
                temporary.replace(link)

    def _point_at(self, version: str) -> None:
        self.storage.write(LATEST, lambda file: file.write(f"{version}\n".encode()))

    def _check_there(self, version: str) -> None:
        if self.described(version) is None:
            raise StorageError(
                f"the version {version} of {self.locate('')} was removed by another export before "
                "it was published. The previous version stays current. Export again."
            )

    def read(self, name: str) -> bytes:
        """Return a file's bytes. Raises FileNotFoundError."""
        return self.storage.read(name)

    def crc32(self, name: str) -> str:
        """Return the CRC-32 of a file. Raises FileNotFoundError."""
        with self.storage.open(name) as file:
            return crc32_of(file)

    def fetch(self, name: str, path: Path) -> None:
        """Download a file. Raises FileNotFoundError."""
        with self.storage.open(name) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, _PIECE)

    def put(self, name: str, data: bytes) -> None:
        """Write a small file atomically, without waiting until it is durable."""
        if self.storage.folder is None:
            self.storage.write(name, lambda file: file.write(data))
            return
        path = self._path(name)
        self._unsynced = True
        # Not in the shard's folder, where a killed export would leave it.
        with self.storage.scratch() as temporary:
            temporary.write_bytes(data)
            temporary.replace(path)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name: a hard link, or a copy where that is not possible."""
        if self.storage.folder is None:
            self.storage.copy(old, new)
            return
        path = self._path(new)
        with self.storage.scratch() as temporary:
            temporary.unlink()
            try:
                temporary.hardlink_to(self.storage.folder / old)
            except OSError:
                shutil.copyfile(self.storage.folder / old, temporary)
            temporary.replace(path)

    def send(self, temporary: Path, name: str) -> None:
        """Publish a finished file, durably. Raises StorageError where it is truncated."""
        size = temporary.stat().st_size
        self.storage.publish(temporary, name)
        if self.storage.size_bytes(name) != size:
            raise StorageError(f"{self.locate(name)} does not have its {size} bytes; export again")

    def prune(self, keep: int) -> list[str]:
        """Remove complete versions except the last ``keep``; return the removed ones."""
        latest = self.latest()
        found = {}
        for name in list(self.storage.names("")):
            version, _, file = name.partition("/")
            if file == EXPORT and _VERSION.fullmatch(version) and version != latest:
                found[version] = self.storage.modified_at(name)
        if self.described(latest or "") is None or any(at is None for at in found.values()):
            return []
        order = sorted(found, key=lambda version: (cast("Any", found[version]), version))
        gone = order[: max(0, len(order) - (keep - 1))]
        for version in gone:
            # First the file that makes it complete.
            self.storage.remove(f"{version}/{EXPORT}")
            self.remove_all(version)
        return gone

    def remove_all(self, folder: str) -> None:
        """Remove all files below a folder, which may be missing."""
        for name in list(self.storage.names(folder)):
            self.storage.remove(name)
        if self.storage.folder is not None:
            shutil.rmtree(self.storage.folder / folder, ignore_errors=True)
            self._made.discard(str(self.storage.folder / folder))

    def _path(self, name: str) -> Path:
        path = cast("Path", self.storage.folder) / name
        parent = str(path.parent)
        if parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(parent)
        return path


def crc32_of(file: BinaryIO) -> str:
    """Return the CRC-32 of the rest of a file, as 8 hexadecimal digits.

    It detects damage at a seventh of the cost of sha256, which the index has for the images.
    """
    found = 0
    while piece := file.read(_PIECE):
        found = zlib.crc32(piece, found)
    return f"{found:08x}"

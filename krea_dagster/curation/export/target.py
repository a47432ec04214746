"""Where an export goes: a folder or an object store, with versions that are there whole or not.

.. code-block:: text

    <target>/LATEST             the name of the version that counts; written last
    <target>/latest             the same as a link, where the target is a folder
    <target>/<version>/         one export, never changed once it is published
        README.md               the dataset card
        export.json             what it holds; no version is complete without it
        index.parquet           each image: its shard, its row, its hashes
        …                       the shards

A reader that goes by ``LATEST`` (or the link) sees the old export or the new one, never half.
What has not changed since the version before is a hard link in a folder, and a copy made by the
store itself in an object store.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO, Final, cast

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.engine.storage.storage import Storage, sync_folder
from krea_dagster.errors import StorageError

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
    ]
)

FORMAT_VERSION: Final = 1

_VERSION: Final = re.compile(r"[0-9a-f]{16}")
_PIECE: Final = 1 << 20


class ExportTarget:
    """A folder or URL that exports are written to. Methods may be called in several threads."""

    def __init__(self, root: str) -> None:
        self.storage = Storage(root)
        self._numbers = count()
        self._made: set[str] = set()
        self._loose = False

    @property
    def is_folder(self) -> bool:
        """Whether it is on this machine."""
        return self.storage.folder is not None

    def locate(self, name: str) -> str:
        """The path or URL of a name."""
        return self.storage.locate(name)

    def latest(self) -> str | None:
        """The version that counts; None where there is none yet."""
        try:
            with self.storage.open(LATEST) as file:
                found = file.read(64).decode("ascii", "replace").strip()
        except FileNotFoundError:
            return None
        return found if _VERSION.fullmatch(found) else None

    def described(self, version: str) -> dict[str, Any] | None:
        """What a version says that it holds; None where it is not complete, or of another kind."""
        try:
            found = json.loads(self.read(f"{version}/{EXPORT}"))
        except (FileNotFoundError, ValueError):
            return None
        if not isinstance(found, dict) or found.get("format_version") != FORMAT_VERSION:
            return None
        return found

    def index(self, version: str) -> pa.Table:
        """The index of a version; empty where somebody has removed it."""
        try:
            with self.storage.open(f"{version}/{INDEX}") as file:
                return pq.read_table(file)
        except FileNotFoundError:
            return INDEX_SCHEMA.empty_table()

    def publish(self, version: str) -> None:
        """Make a complete version the one that counts. Raises StorageError.

        Another export may remove old versions meanwhile (``prune``), and this one with them.
        """
        if self._loose and hasattr(os, "sync"):
            os.sync()  # they were not made durable one by one
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
        self.storage.write(LATEST, lambda file: _put(file, f"{version}\n".encode()))

    def _check_there(self, version: str) -> None:
        if self.described(version) is None:
            raise StorageError(
                f"the version {version} of {self.locate('')} was removed by another export before "
                "it was published. What was published before counts on. Export again."
            )

    def read(self, name: str) -> bytes:
        """A file's bytes. Raises FileNotFoundError."""
        with self.storage.open(name) as file:
            return file.read()

    def crc32(self, name: str) -> str:
        """The CRC-32 of a file's bytes. Raises FileNotFoundError."""
        with self.storage.open(name) as file:
            return crc32_of(file)

    def fetch(self, name: str, path: Path) -> None:
        """Copy a file to this machine. Raises FileNotFoundError."""
        with self.storage.open(name) as source, path.open("wb") as copy:
            shutil.copyfileobj(source, copy, _PIECE)

    def put(self, name: str, data: bytes) -> None:
        """Write a small file whole or not at all, without waiting until it is durable."""
        if self.storage.folder is None:
            self.storage.write(name, lambda file: _put(file, data))
            return
        path = self._path(name)
        temporary = self._beside(path)
        self._loose = True
        try:
            temporary.write_bytes(data)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name, without sending its bytes again where that can be."""
        if self.storage.folder is None:
            fs, path = fsspec.core.url_to_fs(self.locate(new))
            fs.cp_file(fsspec.core.url_to_fs(self.locate(old))[1], path)
            return
        path = self._path(new)
        temporary = self._beside(path)
        try:
            try:
                temporary.hardlink_to(self.storage.folder / old)
            except OSError:
                shutil.copyfile(self.storage.folder / old, temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    def send(self, temporary: Path, name: str) -> None:
        """Give a finished file its name, durably. Raises StorageError where it is cut short."""
        size = temporary.stat().st_size
        self.storage.publish(temporary, name)
        if self.storage.size_bytes(name) != size:
            raise StorageError(f"{self.locate(name)} is not the {size} bytes that were written")

    def prune(self, keep: int) -> list[str]:
        """Remove complete versions but the last ``keep``; return those that are gone."""
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
            # First what makes it count as complete.
            self.storage.remove(f"{version}/{EXPORT}")
            for name in list(self.storage.names(version)):
                self.storage.remove(name)
            if self.storage.folder is not None:
                shutil.rmtree(self.storage.folder / version, ignore_errors=True)
        return gone

    def _path(self, name: str) -> Path:
        path = cast("Path", self.storage.folder) / name
        parent = str(path.parent)
        if parent not in self._made:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._made.add(parent)
        return path

    def _beside(self, path: Path) -> Path:
        return path.with_name(f".{os.getpid()}-{next(self._numbers)}.part")


def crc32_of(file: BinaryIO) -> str:
    """The CRC-32 of what a file holds from here on, as 8 hexadecimal digits.

    It finds damage at a seventh of a sha256's cost; the images' own sha256 are in the index.
    """
    found = 0
    while piece := file.read(_PIECE):
        found = zlib.crc32(piece, found)
    return f"{found:08x}"


def _put(file: BinaryIO, data: bytes) -> None:
    file.write(data)

"""What is known of exported files before they are read: from an index, or an interrupted export.

Only where an export changes files: others are known from the manifest. Signed or converted files
cannot be derived again, or only at some cost, so their hashes are kept.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Final

import numpy as np
import pyarrow as pa

from krea_dagster.curation.export.image_content import ADDED_NAMES, ExportedFile
from krea_dagster.curation.export.plan import Shard
from krea_dagster.curation.export.target import ExportTarget

#: Below a version while it is incomplete: the files of each finished shard.
_FOLDER: Final = ".unfinished"


class IndexedFiles:
    """The files of a complete version, by key."""

    def __init__(self, index: pa.Table | None) -> None:
        if index is None or not {*ADDED_NAMES} <= {*index.schema.names}:
            index = pa.table({name: pa.array([], pa.string()) for name in ("key", *ADDED_NAMES)})
        keys = np.array(index["key"].to_pylist(), "S24")
        self._order = np.argsort(keys, kind="stable")
        self._keys = keys[self._order]
        self._files = index.select(ADDED_NAMES)

    def of(self, keys: Sequence[str]) -> list[ExportedFile] | None:
        """Return the files of these keys; None if they are not all known."""
        if not len(self._keys):
            return None
        wanted = np.array(keys, "S24")
        at = np.minimum(np.searchsorted(self._keys, wanted), len(self._keys) - 1)
        if not (self._keys[at] == wanted).all():
            return None
        found = self._files.take(pa.array(self._order[at]))
        return list(map(ExportedFile, *(column.to_pylist() for column in found.columns)))


class KnownFiles:
    """The files of the version that is being exported, if it is there already. Thread-safe."""

    def __init__(self, target: ExportTarget, version: str) -> None:
        self._target = target
        self._folder = f"{version}/{_FOLDER}"
        complete = target.described(version) is not None
        self._indexed = IndexedFiles(target.index(version) if complete else None)

    def of(self, shard: Shard, keys: Sequence[str]) -> list[ExportedFile] | None:
        """Return the files of a shard; None if they are not all known."""
        return self._indexed.of(keys) or self._noted(shard)

    def note(self, shard: Shard, files: Sequence[ExportedFile]) -> None:
        """Note the files of a finished shard, for an export that resumes this one."""
        self._target.put(self._name(shard), json.dumps(files).encode())

    def forget(self) -> None:
        """Remove the notes, before the version is complete."""
        self._target.remove_all(self._folder)

    def _name(self, shard: Shard) -> str:
        return f"{self._folder}/{shard.split}-{shard.number}.json"

    def _noted(self, shard: Shard) -> list[ExportedFile] | None:
        try:
            found = json.loads(self._target.read(self._name(shard)))
        except (FileNotFoundError, ValueError):
            return None
        return [ExportedFile(*file) for file in found]

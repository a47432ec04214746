"""Manifests that are made and not published yet: on disk, a file for each partition.

A run writes them row group by row group, so that none is in memory as a whole.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.arrow import as_array
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest.files import manifest_name, publish_manifest, write_parts
from krea_dagster.manifest.schema import MANIFEST_SCHEMA


class Manifests:
    """The manifests of some partitions, for an IO manager to store.

    Their files are temporary, and removed with this object.
    """

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="krea-manifest-")
        self._files: dict[str, Path] = {}

    @property
    def partition_keys(self) -> Sequence[str]:
        """The partitions, sorted."""
        return sorted(self._files)

    def add(self, partition_key: str, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
        """Write the manifest of a partition from tables of one schema."""
        path = Path(self._folder.name) / f"{len(self._files)}.parquet"
        with path.open("wb") as file:
            write_parts(file, schema, parts)
        self._files[partition_key] = path

    def publish(self, storage: Storage, partition_key: str, folders: Sequence[str] = ()) -> str:
        """Copy the manifest of a partition to storage, atomically; return its path or URL."""
        path = self._files[partition_key]

        def write(file: BinaryIO) -> pa.Array:
            with path.open("rb") as made:
                shutil.copyfileobj(made, file, 1 << 20)
            return as_array(pq.read_table(path, columns=["request_key"])["request_key"])

        return publish_manifest(storage, manifest_name(partition_key, folders), write)

    def to_table(self) -> pa.Table:
        """Return the rows of all partitions, in the order of their keys."""
        tables = [pq.read_table(self._files[key]) for key in self.partition_keys]
        if not tables:
            return MANIFEST_SCHEMA.empty_table()
        return pa.concat_tables(tables, promote_options="permissive")

    def close(self) -> None:
        """Remove the files."""
        self._folder.cleanup()

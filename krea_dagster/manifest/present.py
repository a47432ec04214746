"""Which manifests are present: those in ``manifest/``, and no others.

Every reader, also a query of that folder by pandas or DuckDB, relies on this. So a run that knows
the partitions of its table moves the rows of a manifest to ``earlier/`` once its partition has left
the table, or once the table is partitioned in another way.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.engine.record import PRUNED, PRUNED_MESSAGE
from krea_dagster.engine.storage.storage import STORE_THREADS, Storage
from krea_dagster.manifest.earlier import keep_rows_without
from krea_dagster.manifest.files import manifest_name, write_parts
from krea_dagster.manifest.schema import MANIFEST_SCHEMA
from krea_dagster.parquet_files import open_parquet

#: The entries of a manifest's metadata.
_TABLE: Final = b"krea_table"
_PARTITION_BY: Final = b"krea_partition_by"

#: How many manifests are asked how they were cut.
_ASKED: Final = 8


@dataclass(frozen=True)
class Origin:
    """What a manifest was made from: a prompt table, by its id in the journal, and how it was cut.

    Manifests of older versions do not say it, and have empty texts.
    """

    table_id: str = ""
    partition_by: str = ""

    def noted_in(self, schema: pa.Schema) -> pa.Schema:
        """Return the schema of a manifest that says its origin."""
        entries = {_TABLE: self.table_id, _PARTITION_BY: self.partition_by}
        return schema.with_metadata(entries)

    @classmethod
    def of(cls, storage: Storage, name: str) -> Origin | None:
        """Read the origin of a stored manifest; None if there is none that can be read."""
        try:
            with storage.open(name) as file:
                entries = open_parquet(file).schema_arrow.metadata or {}
        except (FileNotFoundError, pa.ArrowInvalid):
            return None
        return cls(entries.get(_TABLE, b"").decode(), entries.get(_PARTITION_BY, b"").decode())

    def may_be_of(self, other: Origin) -> bool:
        """Return whether a manifest with this origin may be of the same table."""
        return self.table_id in ("", other.table_id)

    def has_other_partitions(self, other: Origin) -> bool:
        """Return whether this table was cut in another way, so that rows may be in both."""
        return self.partition_by not in ("", other.partition_by)


def present_manifests(storage: Storage) -> list[str]:
    """Return the names of the manifests of all prompt tables, sorted."""
    return sorted(name for name in storage.names("manifest") if name.endswith(".parquet"))


def accepted_requests(storage: Storage) -> pa.Array:
    """Return the request keys in the tables of accepted images, of all prompt tables."""
    keys = [pa.array([], pa.string())]
    for name in storage.names("accepted"):
        if name.endswith(".parquet"):
            with storage.open(name) as file:
                keys.extend(open_parquet(file).read(columns=["request_key"])["request_key"].chunks)
    return pa.concat_arrays(keys)


def rows_with_requests(storage: Storage, request_keys: pa.Array) -> Iterator[pa.Table]:
    """Yield the rows of present manifests that have one of these requests, file by file."""
    for name in present_manifests(storage):
        with storage.open(name) as file:
            opened = open_parquet(file)
            found = opened.read(columns=["request_key"])["request_key"]
            mask = pc.is_in(found, value_set=request_keys)
            if pc.any(mask).as_py():
                table = opened.read(columns=MANIFEST_SCHEMA.names).filter(mask)
                yield table.replace_schema_metadata(None)


def without_files(storage: Storage, request_keys: pa.Array) -> None:
    """Write the present manifests so that these requests have no file: it was pruned."""
    for name in present_manifests(storage):
        with storage.open(name) as file:
            opened = open_parquet(file)
            found = opened.read(columns=["request_key", "image_path"])
            mask = pc.is_in(found["request_key"], value_set=request_keys)
            mask = as_array(pc.and_(mask, pc.is_valid(found["image_path"])))
            table = opened.read() if pc.any(mask).as_py() else None
        if table is not None:
            values = {"image_path": None, "error_code": PRUNED, "error_message": PRUNED_MESSAGE}
            for column, value in values.items():
                at = table.column_names.index(column)
                changed = pc.if_else(mask, pa.scalar(value, pa.string()), table[column])
                table = table.set_column(at, table.schema.field(at), changed)
            parts = [table]
            storage.write(name, partial(write_parts, schema=table.schema, parts=parts))


def retire_manifests(
    storage: Storage,
    folders: Sequence[str],
    origin: Origin,
    present: Collection[str],
    *,
    names: Iterable[str],
    written: Collection[str] = (),
    read_at: datetime,
) -> list[str]:
    """Move the rows of manifests that are not present to ``earlier/``; return their names.

    Args:
        storage: The storage root.
        folders: Those of the table's manifests.
        origin: The table as it is now.
        present: The keys of its partitions. None: an empty table is more often a mistake.
        names: Those of the table's stored manifests.
        written: The keys of the partitions whose manifests a run is about to write.
        read_at: When the table was read: a manifest that was written since may be of a newer one.
    """
    if not present:
        return []
    here = {manifest_name(key, folders) for key in present}
    own = {manifest_name(key, folders) for key in written}
    others = [name for name in names if name not in own]
    # All others are cut in the same way, as this function leaves them: a few tell.
    if written and not _is_cut_anew(storage, others[:_ASKED], origin):
        others = [name for name in others if name not in here]
    with ThreadPoolExecutor(STORE_THREADS if storage.folder is None else 1) as pool:
        origins = pool.map(lambda name: Origin.of(storage, name), others)
        gone = [
            name
            for name, found in zip(others, origins, strict=True)
            if found is not None
            and found.may_be_of(origin)
            and (name not in here or found.has_other_partitions(origin))
            and not _is_newer(storage, name, read_at)
        ]
    for name in gone:
        keep_rows_without(storage, name, pa.array([], pa.string()))
        # First what is made of it: a run that is killed here finds the manifest again.
        storage.remove(f"accepted{name.removeprefix('manifest')}")
        storage.remove(name)
    return gone


def _is_cut_anew(storage: Storage, names: Iterable[str], origin: Origin) -> bool:
    """Return whether one of these manifests was cut in another way, or does not say how."""
    found = [one for name in names if (one := Origin.of(storage, name)) and one.may_be_of(origin)]
    return any(not one.partition_by or one.has_other_partitions(origin) for one in found)


def _is_newer(storage: Storage, name: str, than: datetime) -> bool:
    written = storage.modified_at(name)
    return written is not None and written > than

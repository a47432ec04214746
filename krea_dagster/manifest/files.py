"""Manifest files: one Parquet file per partition under the storage root, written atomically."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest.earlier import keep_rows_without
from krea_dagster.manifest.locations import located_now
from krea_dagster.manifest.schema import MANIFEST_SCHEMA
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import safe_name

#: Rows per row group: small enough that memory stays flat, large enough to compress.
_ROW_GROUP: Final = 10_000


def table_name(kind: str, partition_key: str, folders: Sequence[str] = ()) -> str:
    """Return the name of a partition's table, such as ``accepted/KEY.parquet``, safe for any key.

    ``kind`` is the folder under the storage root; ``folders`` below it separate prompt tables that
    share a storage root.
    """
    return "/".join([kind, *map(safe_name, folders), f"{safe_name(partition_key)}.parquet"])


def table_names(storage: Storage, kind: str, folders: Sequence[str] = ()) -> Iterator[str]:
    """Yield the names of all stored tables of a kind, except those in folders further down."""
    home = "/".join([kind, *map(safe_name, folders)])
    for name in storage.names(home):
        folder, _, file = name.rpartition("/")
        if folder == home and file.endswith(".parquet"):
            yield name


def manifest_name(partition_key: str, folders: Sequence[str] = ()) -> str:
    """Return the name of a partition's manifest (see ``table_name``)."""
    return table_name("manifest", partition_key, folders)


def manifest_names(storage: Storage, folders: Sequence[str] = ()) -> Iterator[str]:
    """Yield the names of all stored manifests, except those in folders further down."""
    return table_names(storage, "manifest", folders)


def manifest_partitions(storage: Storage, folders: Sequence[str] = ()) -> list[str]:
    """Return the partition keys that have a manifest, sorted, as their first rows say."""
    keys = []
    for name in manifest_names(storage, folders):
        with storage.open(name) as file:
            for batch in open_parquet(file).iter_batches(1, columns=["partition_key"]):
                keys.append(str(batch.column(0)[0].as_py()))
                break
    return sorted(keys)


def write_manifest(
    storage: Storage, partition_key: str, table: pa.Table, folders: Sequence[str] = ()
) -> str:
    """Write a partition's manifest; return its path or URL. Equal tables give equal bytes."""
    return write_manifest_parts(storage, partition_key, table.schema, [table], folders)


def write_manifest_parts(
    storage: Storage,
    partition_key: str,
    schema: pa.Schema,
    parts: Iterable[pa.Table],
    folders: Sequence[str] = (),
) -> str:
    """Write a partition's manifest part by part; return its path or URL."""

    def write(file: BinaryIO) -> pa.Array:
        keys: list[pa.Array] = []
        write_parts(file, schema, _noting_keys(parts, keys))
        return pa.concat_arrays([pa.array([], pa.string()), *keys])

    return publish_manifest(storage, manifest_name(partition_key, folders), write)


def publish_manifest(storage: Storage, name: str, write: Callable[[BinaryIO], pa.Array]) -> str:
    """Write a manifest atomically, and keep the rows that it replaces; return its path or URL.

    ``write`` writes the file, and returns its request keys.
    """
    # Before it is replaced: a run that is killed in between finds the old one again.
    storage.write(name, lambda file: keep_rows_without(storage, name, write(file)))
    return storage.locate(name)


def _noting_keys(parts: Iterable[pa.Table], keys: list[pa.Array]) -> Iterator[pa.Table]:
    for part in parts:
        keys.extend(part["request_key"].chunks)
        yield part


def has_manifest(
    storage: Storage,
    partition_key: str,
    schema: pa.Schema,
    parts: Iterable[pa.Table],
    folders: Sequence[str] = (),
    *,
    rows: int,
    ignored: Collection[str] = (),
) -> bool:
    """Return whether the stored manifest is as these parts would be written.

    ``rows`` is the number of all rows: with another one no part is read. ``ignored`` columns may
    differ. A manifest that cannot be read is none.
    """
    compared = [at for at, name in enumerate(schema.names) if name not in ignored]
    try:
        with storage.open(manifest_name(partition_key, folders)) as file:
            stored, group = open_parquet(file), 0
            if stored.metadata.num_rows != rows or not stored.schema_arrow.equals(schema):
                return False
            for part in parts:
                end = group + max(1, -(-part.num_rows // _ROW_GROUP))
                if end > stored.num_row_groups:
                    return False
                found = stored.read_row_groups(range(group, end), use_threads=False)
                if not found.select(compared).equals(part.select(compared)):
                    return False
                group = end
            return bool(group == stored.num_row_groups)
    except (FileNotFoundError, pa.ArrowInvalid):
        return False


def write_parts(file: BinaryIO, schema: pa.Schema, parts: Iterable[pa.Table]) -> None:
    """Write tables of one schema as one Parquet file, in small row groups."""
    with pq.ParquetWriter(file, schema) as writer:
        for part in parts:
            writer.write_table(part, row_group_size=_ROW_GROUP)


def read_manifests(
    storage: Storage,
    partition_keys: Sequence[str],
    columns: Sequence[str] | None = None,
    folders: Sequence[str] = (),
) -> pa.Table:
    """Read the manifests of some partitions as one table, in the order of the keys.

    Partitions without a file are left out. A column that a file does not have is null for its rows.
    ``image_path`` is where the image is now, also in a root that was moved.
    ``columns`` limits the columns; without any file a passthrough column has Arrow's null type.
    Raises ConfigError for a column that none of the files has.
    """
    tables: list[pa.Table] = []
    known: dict[str, None] = {}
    for key in partition_keys:
        try:
            with storage.open(manifest_name(key, folders)) as file:
                names = open_parquet(file).schema_arrow.names
                known |= dict.fromkeys(names)
                wanted = None if columns is None else [name for name in columns if name in names]
                tables.append(open_parquet(file).read(columns=wanted))
        except FileNotFoundError:
            continue
    if columns is None:
        tables = tables or [MANIFEST_SCHEMA.empty_table()]
        return located_now(storage, pa.concat_tables(tables, promote_options="permissive"))
    if not tables:
        return _empty(columns)
    if missing := [name for name in columns if name not in known]:
        raise no_column(missing[0], known)
    table = pa.concat_tables(tables, promote_options="permissive").select(list(columns))
    return located_now(storage, table)


def no_column(name: str, known: Iterable[str]) -> ConfigError:
    """Return the error for a column that the manifests do not have."""
    return ConfigError(f"the manifest has no column {name!r}; it has {', '.join(known)}")


def manifest_paths(
    storage: Storage, partition_keys: Sequence[str], folders: Sequence[str] = ()
) -> list[str]:
    """Return the paths of the stored manifests of some partitions; none behind a URL."""
    if storage.folder is None:
        return []
    names = [manifest_name(key, folders) for key in partition_keys]
    return [storage.locate(name) for name in names if storage.size_bytes(name) is not None]


def _empty(columns: Sequence[str]) -> pa.Table:
    own = set(MANIFEST_SCHEMA.names)
    fields = [MANIFEST_SCHEMA.field(one) if one in own else (one, pa.null()) for one in columns]
    return pa.schema(fields).empty_table()


def read_missing(
    storage: Storage,
    partition_keys: Sequence[str],
    columns: Sequence[str],
    folders: Sequence[str] = (),
) -> pa.Table:
    """Read the rows without an image, a row group at a time, of columns of MANIFEST_SCHEMA."""
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in columns])
    tables = [schema.empty_table()]
    read = list(dict.fromkeys([*columns, "status"]))
    for key in partition_keys:
        try:
            with storage.open(manifest_name(key, folders)) as file:
                for batch in open_parquet(file).iter_batches(_ROW_GROUP, columns=read):
                    missing = pc.not_equal(batch.column("status"), State.STORED.value)
                    if pc.any(missing).as_py():
                        found = batch.filter(missing).select(list(columns))
                        tables.append(pa.Table.from_batches([found]))
        except FileNotFoundError:
            continue
    return pa.concat_tables(tables)

"""What is known of measured images: one Parquet file per partition, a row per stored image.

The file of a partition says in its schema's metadata what its figures mean, so that a later
measuring takes over what still holds.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.measures.builtin import VERSION
from krea_dagster.curation.measures.pdq import HASH_BYTES
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError
from krea_dagster.prompts import safe_name

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("image_sha256", pa.string(), "Hash of the file's bytes"),
    ("partition_key", pa.string(), "Dagster partition of the manifest"),
    ("width", pa.int32(), "Width, pixels"),
    ("height", pa.int32(), "Height, pixels"),
    (
        "perceptual_hash",
        pa.binary(HASH_BYTES),
        "PDQ hash; up to 31 of its 256 bits differ where two files show the same picture",
    ),
    (
        "perceptual_hash_quality",
        pa.int32(),
        "0 to 100; below 50 there is too little structure to compare by",
    ),
    ("sharpness", pa.float64(), "Variance of the Laplacian of grey 0 to 255, from 0"),
    ("brightness", pa.float64(), "Mean grey, 0 black to 1 white"),
    ("contrast", pa.float64(), "Standard deviation of grey, 0 to 0.5"),
    ("entropy", pa.float64(), "Entropy of the levels of grey, 0 to 8 bits"),
    ("main_colour_share", pa.float64(), "Share of pixels of the most common colour, 0 to 1"),
    ("border_share", pa.float64(), "Share of the area that even bars along the edges take, 0 to 1"),
)

#: The columns that every file has; a user's own measures follow, as float64.
MEASURES_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: What each column means, by name.
MEASURES_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: Rows per row group, as the manifests'.
_ROW_GROUP: Final = 10_000

#: In the schema's metadata: the versions of the figures, as JSON.
_VERSIONS: Final = b"krea_measures"

#: Under this name the versions hold that of the figures that every picture has.
BUILTIN: Final = ""


def measures_name(partition_key: str, folders: Sequence[str] = ()) -> str:
    """The name of a partition's file under the storage root, made as a manifest's is."""
    return "/".join(["measures", *map(safe_name, folders), f"{safe_name(partition_key)}.parquet"])


def measures_schema(further: Iterable[str] = ()) -> pa.Schema:
    """The columns of a file with a user's own measures of these names."""
    return pa.schema([*MEASURES_SCHEMA, *(pa.field(name, pa.float64()) for name in further)])


def read_measures(
    storage: Storage,
    partition_keys: Sequence[str],
    columns: Sequence[str] | None = None,
    folders: Sequence[str] = (),
) -> pa.Table:
    """Read the measures of these partitions as one table, in the order of the keys.

    Partitions that were never measured are left out. Where some have a user's measure and others
    not, it is null there. Raises ConfigError for a column that none of the files has; where there
    is no file, only those of ``MEASURES_SCHEMA`` are known.
    """
    tables: list[pa.Table] = []
    known = dict.fromkeys(MEASURES_SCHEMA.names)
    for key in partition_keys:
        try:
            with storage.open(measures_name(key, folders)) as opened:
                file = pq.ParquetFile(opened)
                names = file.schema_arrow.names
                known |= dict.fromkeys(names)
                wanted = None if columns is None else [name for name in columns if name in names]
                tables.append(file.read(wanted).replace_schema_metadata(None))
        except FileNotFoundError:
            continue
    if columns is not None and (missing := [name for name in columns if name not in known]):
        raise ConfigError(
            f"the measures have no column {missing[0]!r}; they have {', '.join(known)}"
        )
    if not tables:
        tables = [MEASURES_SCHEMA.empty_table()]
    table = pa.concat_tables(tables, promote_options="permissive")
    return table if columns is None else table.select(list(columns))


def read_valid_measures(
    storage: Storage, partition_key: str, versions: Mapping[str, str], folders: Sequence[str] = ()
) -> pa.Table:
    """Read what an earlier measuring of a partition found, as far as it still holds.

    ``versions`` are those of the user's measures, by name. The columns of other versions are
    left out; there are no rows where the figures of every picture have another.
    """
    name = measures_name(partition_key, folders)
    try:
        with storage.open(name) as opened:
            table = pq.ParquetFile(opened).read()
    except (FileNotFoundError, pa.ArrowInvalid):  # or damaged: it is about to be written anew
        return MEASURES_SCHEMA.empty_table()
    held = json.loads((table.schema.metadata or {}).get(_VERSIONS, b"{}"))
    if held.get(BUILTIN) != str(VERSION):
        return MEASURES_SCHEMA.empty_table()
    same = [name for name, version in versions.items() if held.get(name) == version]
    return table.select([*MEASURES_SCHEMA.names, *same]).replace_schema_metadata(None)


def write_measures(
    storage: Storage,
    partition_key: str,
    table: pa.Table,
    versions: Mapping[str, str],
    folders: Sequence[str] = (),
) -> str:
    """Write a partition's measures, atomically; returns their path or URL.

    Equal tables give equal bytes. Raises StorageError.
    """
    held = json.dumps({BUILTIN: str(VERSION), **versions})
    marked = table.replace_schema_metadata({_VERSIONS: held.encode()})
    name = measures_name(partition_key, folders)
    path = storage.locate(name)
    try:
        storage.write(name, lambda file: pq.write_table(marked, file, row_group_size=_ROW_GROUP))
    except OSError as error:
        raise StorageError(f"measures cannot be written to {path}: {error}") from error
    return path

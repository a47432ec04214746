"""The tables of measures: one Parquet file per partition, a row per stored image.

The file's schema metadata holds the versions of its measures, so a later run reuses valid ones.
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
from krea_dagster.errors import StorageError
from krea_dagster.manifest import table_name
from krea_dagster.parquet_files import open_parquet

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("image_sha256", pa.string(), "Hash of the file's bytes"),
    ("partition_key", pa.string(), "Dagster partition of the manifest"),
    ("width", pa.int32(), "Width, pixels"),
    ("height", pa.int32(), "Height, pixels"),
    (
        "perceptual_hash",
        pa.binary(HASH_BYTES),
        "PDQ hash; at most 31 of its 256 bits differ where two files show the same image",
    ),
    (
        "perceptual_hash_quality",
        pa.int32(),
        "0 to 100; below 50 there is too little structure to compare by",
    ),
    ("sharpness", pa.float64(), "Variance of the Laplacian of grey 0 to 255, from 0"),
    ("brightness", pa.float64(), "Mean grey, 0 black to 1 white"),
    ("contrast", pa.float64(), "Standard deviation of grey, 0 to 0.5"),
    ("entropy", pa.float64(), "Entropy of the grey levels, 0 to 8 bits"),
    ("main_colour_share", pa.float64(), "Share of pixels of the most common colour, 0 to 1"),
    ("border_share", pa.float64(), "Share of the area that even bars along the edges take, 0 to 1"),
)

#: The columns of every file; custom measures follow, as float64.
MEASURES_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: The description of each column.
MEASURES_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: Rows per row group, as in the manifests.
_ROW_GROUP: Final = 10_000

#: The key in the schema's metadata: the versions of the measures, as JSON.
_VERSIONS: Final = b"krea_measures"

#: The name under which the versions hold that of the built-in measures.
BUILTIN: Final = ""


def measures_name(partition_key: str, folders: Sequence[str] = ()) -> str:
    """Return the name of a partition's file under the storage root."""
    return table_name("measures", partition_key, folders)


def measures_schema(custom: Iterable[str] = ()) -> pa.Schema:
    """Return the columns of a file with custom measures of these names."""
    return pa.schema([*MEASURES_SCHEMA, *(pa.field(name, pa.float64()) for name in custom)])


def read_valid_measures(
    storage: Storage, partition_key: str, versions: Mapping[str, str], folders: Sequence[str] = ()
) -> pa.Table:
    """Read the measures of a partition's file that are still valid.

    ``versions`` are those of the custom measures, by name. Columns of other versions are left out,
    and all rows where the version of the built-in measures differs.
    """
    name = measures_name(partition_key, folders)
    try:
        with storage.open(name) as opened:
            table = open_parquet(opened).read()
    except (FileNotFoundError, pa.ArrowInvalid):  # a damaged file is replaced
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
    """Write a partition's measures atomically; return their path or URL. Raises StorageError.

    Equal tables give equal bytes.
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

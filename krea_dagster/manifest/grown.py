"""Manifests that grow: those of ``generate`` calls, each of which adds its rows."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import BinaryIO, Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array, united
from krea_dagster.engine.journal.prompt_table_log import GENERATED
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest.files import manifest_name, publish_manifest, write_parts
from krea_dagster.manifest.locations import located_now
from krea_dagster.manifest.present import Origin
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import safe_name

#: How often rows are added again that another call, at the same time, has written over.
_TRIES: Final = 5

#: How the names of these manifests begin.
_BEGINNING: Final = f"manifest/{safe_name(GENERATED)}"


def add_rows(storage: Storage, partition_key: str, rows: pa.Table, origin: Origin) -> None:
    """Add the stored rows of a table to the manifest of a partition, in place of earlier ones.

    A row with the same prompt_id and sample is replaced. Rows without an image are left out: no run
    would bring them up to date.
    """
    rows = rows.filter(pc.equal(rows["status"], State.STORED.value))
    at = rows.column_names.index("partition_key")
    keys = pa.repeat(pa.scalar(partition_key, pa.string()), rows.num_rows)
    rows = rows.set_column(at, "partition_key", keys)
    name = manifest_name(partition_key)
    for _ in range(_TRIES):
        before = _stored(storage, name)
        if before is not None:
            if pc.all(pc.is_in(_rows(rows), value_set=_rows(before))).as_py():
                return
            kept = before.filter(pc.invert(pc.is_in(_ids(before), value_set=_ids(rows))))
            table = united([located_now(storage, kept), rows])
        elif rows.num_rows:
            table = rows
        else:
            return
        _write(storage, name, table, origin)


def locate_grown(storage: Storage, names: Iterable[str]) -> None:
    """Write the present paths into those of these manifests that grow, if the root was moved.

    Those of a prompt table get them from its next run.
    """
    for name in names:
        if not name.startswith(_BEGINNING):
            continue
        with storage.open(name) as file:
            table = open_parquet(file).read()
        now = located_now(storage, table)
        if not now.equals(table):
            storage.write(name, partial(write_parts, schema=table.schema, parts=[now]))


def _write(storage: Storage, name: str, table: pa.Table, origin: Origin) -> None:
    schema = origin.noted_in(table.schema)
    keys = as_array(table["request_key"])

    def write(file: BinaryIO) -> pa.Array:
        write_parts(file, schema, [table])
        return keys

    publish_manifest(storage, name, write)


def _stored(storage: Storage, name: str) -> pa.Table | None:
    try:
        with storage.open(name) as file:
            return open_parquet(file).read().replace_schema_metadata(None)
    except (FileNotFoundError, pa.ArrowInvalid):
        return None


def _ids(rows: pa.Table) -> pa.Array:
    samples = as_array(rows["sample"]).cast(pa.string())
    return pc.binary_join_element_wise(samples, as_array(rows["prompt_id"]), "\x1f")


def _rows(rows: pa.Table) -> pa.Array:
    paths = as_array(rows["image_path"]).fill_null("")
    return pc.binary_join_element_wise(_ids(rows), as_array(rows["request_key"]), paths, "\x1f")

"""Rows that left a manifest: their request changed, or their partition is not in the table now.

They are kept in ``earlier/``, in files named as the manifests. The journal knows the images; only
these rows know which prompt_id, and which further columns, an image was made for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.arrow import united
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.parquet_files import open_parquet

#: The folder of these rows under the storage root.
FOLDER: Final = "earlier"

#: What identifies a row.
_ROW: Final = ("request_key", "prompt_id", "sample")


def keep_rows_without(storage: Storage, name: str, request_keys: pa.Array) -> None:
    """Keep the bought rows of a stored manifest whose request is not one of these.

    To be called before the manifest is replaced or removed. One that cannot be read has no rows.
    The rows also leave the partition's accepted images, so that no export has them.
    """
    try:
        with storage.open(name) as file:
            stored = open_parquet(file)
            if not {*_ROW, "task_id", "image_sha256"} <= set(stored.schema_arrow.names):
                return
            bought = stored.read(columns=["request_key", "task_id", "image_sha256"])
            leaves = pc.and_(
                pc.or_(pc.is_valid(bought["task_id"]), pc.is_valid(bought["image_sha256"])),
                pc.invert(pc.is_in(bought["request_key"], value_set=request_keys)),
            )
            if pc.any(leaves).as_py():
                _keep(storage, _beside(name, FOLDER), stored.read().filter(leaves))
                _leave(storage, _beside(name, "accepted"), request_keys)
    except (FileNotFoundError, pa.ArrowInvalid):
        return


def earlier_rows(storage: Storage, columns: Sequence[str] | None = None) -> pa.Table | None:
    """Return all kept rows, of all prompt tables; None if there are none.

    ``columns`` are some of the manifest's own. A column whose types differ between files is text.
    """
    tables = []
    for name in storage.names(FOLDER):
        if name.endswith(".parquet"):
            with storage.open(name) as file:
                table = open_parquet(file).read(columns=None if columns is None else list(columns))
                tables.append(table.replace_schema_metadata(None))
    return united(tables) if tables else None


def _keep(storage: Storage, name: str, rows: pa.Table) -> None:
    """Add rows to a file of earlier rows; a row that it has already is replaced."""
    tables = [rows]
    try:
        with storage.open(name) as file:
            before = open_parquet(file).read()
        tables.append(before.filter(pc.invert(pc.is_in(_ids(before), value_set=_ids(rows)))))
    except (FileNotFoundError, pa.ArrowInvalid):
        pass
    table = united(tables)
    storage.write(name, lambda file: pq.write_table(table, file))


def _ids(rows: pa.Table) -> pa.Array:
    parts = [rows[name].cast(pa.string()).combine_chunks().fill_null("") for name in _ROW]
    return pc.binary_join_element_wise(*parts, "\x1f")


def _leave(storage: Storage, name: str, request_keys: pa.Array) -> None:
    """Remove the rows of a table whose request is not one of these."""
    try:
        with storage.open(name) as file:
            table = open_parquet(file).read()
    except FileNotFoundError:
        return
    present = pc.is_in(table["request_key"], value_set=request_keys)
    if not pc.all(present).as_py():
        storage.write(name, lambda file: pq.write_table(table.filter(present), file))


def _beside(manifest: str, folder: str) -> str:
    return f"{folder}{manifest.removeprefix('manifest')}"

"""Images that were delivered and that no present manifest lists: their row changed or is gone.

The journal says which they are, and what was requested. Which row an image was made for is known
from the rows that left the manifests, from a present row whose earlier attempt it is, or from a
verdict on it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.engine.journal.bulk_reads import (
    REQUEST_SCHEMA,
    files_in_root,
    record_columns,
)
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest.build import manifest_table
from krea_dagster.manifest.earlier import earlier_rows
from krea_dagster.manifest.present import present_manifests
from krea_dagster.manifest.schema import MANIFEST_SCHEMA
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import PLAN_SCHEMA
from krea_dagster.prompts.past_attempts import earlier_attempts

#: The request key of the present row that took the place of an image's row; null without one.
SUCCESSOR: Final = "successor"

_ROW: Final = pa.schema(
    [("request_key", pa.string()), ("prompt_id", pa.string()), ("sample", pa.int32())]
)
_PRESENT: Final = ("prompt_id", "sample", "prompt", "request_key", "attempt")
_ROWS: Final = 50_000


def earlier_images(storage: Storage, journal: Journal) -> pa.Table:
    """Return the earlier images: a manifest of them, their tables' columns, and ``successor``.

    The prompt_id is empty where the row is not known. A successor has the same prompt_id and
    sample, or else the same prompt. Raises ConfigError for a manifest that cannot be read, and
    JournalError.
    """
    present, made_for = present_rows(storage)
    listed = as_array(present["request_key"])
    root_id = journal.roots.id_of(storage)
    keys = _without(files_in_root(journal, root_id), listed)["request_key"]
    if storage.folder is not None:  # a copy of a folder has files that the journal has elsewhere
        others = _without(files_in_root(journal, root_id, elsewhere=True), listed)
        others = _without(others, as_array(keys))
        sizes = storage.sizes_bytes(others["image_path"].to_pylist())
        here = pa.array([size is not None for size in sizes], pa.bool_())
        further = others["request_key"].filter(here)
        keys = pa.chunked_array([*keys.chunks, *further.chunks], pa.string())
    keys = pc.unique(keys)
    kept = earlier_rows(storage)
    if not len(keys):
        return _empty()
    verdicts = [
        {"request_key": one.request_key, "prompt_id": one.prompt_id, "sample": one.sample}
        for one in journal.verdicts.current().values()
    ]
    known = [] if kept is None else [kept.select(_ROW.names).cast(_ROW)]
    rows = pa.concat_tables([*known, *made_for, pa.Table.from_pylist(verdicts, _ROW)])
    places = pc.index_in(keys, value_set=as_array(rows["request_key"]))
    planned = {name: as_array(one) for name, one in _requests(journal, keys).items()}
    planned["request_key"] = keys
    planned["prompt_id"] = as_array(rows["prompt_id"]).take(places).fill_null("")
    planned["sample"] = as_array(rows["sample"]).take(places).fill_null(0)
    plan = pa.RecordBatch.from_arrays(
        [planned[field.name] for field in PLAN_SCHEMA], schema=PLAN_SCHEMA
    )
    records = record_columns(journal, keys)
    table = manifest_table(plan, records, locate=storage.locate, run_id="")
    followed_by = _successors(plan, present)
    table = table.append_column(SUCCESSOR, as_array(present["request_key"]).take(followed_by))
    if kept is not None:
        own = pc.index_in(keys, value_set=as_array(kept["request_key"]))
        for name in kept.column_names:
            if name not in table.column_names:
                table = table.append_column(name, as_array(kept[name]).take(own))
    order = ("prompt_id", "sample", "stored_at")
    return table.sort_by([(name, "ascending") for name in order])


def _without(files: pa.Table, request_keys: pa.Array) -> pa.Table:
    return files.filter(pc.invert(pc.is_in(files["request_key"], value_set=request_keys)))


def _empty() -> pa.Table:
    return pa.schema([*MANIFEST_SCHEMA, (SUCCESSOR, pa.string())]).empty_table()


def _requests(journal: Journal, keys: pa.Array) -> Mapping[str, Any]:
    found = record_columns(journal, keys, REQUEST_SCHEMA.names)
    return {name: found[name] for name in found.column_names}


def present_rows(storage: Storage) -> tuple[pa.Table, list[pa.Table]]:
    """Return the present rows, and those of their earlier attempts, with a few columns.

    Raises ConfigError for a manifest that cannot be read.
    """
    schema = pa.schema([MANIFEST_SCHEMA.field(name) for name in _PRESENT])
    present, earlier = [schema.empty_table()], []
    for name in present_manifests(storage):
        for batch in _batches(storage, name):
            present.append(pa.Table.from_batches([batch.select(list(_PRESENT))]).cast(schema))
            raised = batch.filter(pc.greater(batch.column("attempt"), 0))
            for made, _ in earlier_attempts(raised):
                part = pa.Table.from_batches([made]).select(_ROW.names)
                earlier.append(part.cast(_ROW))
    return pa.concat_tables(present), earlier


def _batches(storage: Storage, name: str) -> Iterator[pa.RecordBatch]:
    try:
        with storage.open(name) as file:
            yield from open_parquet(file).iter_batches(_ROWS, columns=PLAN_SCHEMA.names)
    except FileNotFoundError:  # moved just now
        return
    except (OSError, pa.ArrowException) as error:
        raise ConfigError(f"{name} cannot be read: {error}. Materialize it again.") from error


def _successors(plan: pa.RecordBatch, present: pa.Table) -> pa.Array:
    """Return the place of the present row that took the place of each image's row."""

    def found(*names: str) -> pa.Array:
        return pc.index_in(_joined(plan, names), value_set=_joined(present, names))

    return pc.coalesce(found("prompt_id", "sample"), found("prompt", "sample"))


def _joined(rows: Any, names: tuple[str, ...]) -> pa.Array:
    parts = [as_array(rows.column(name)).cast(pa.string()).fill_null("") for name in names]
    return pc.binary_join_element_wise(*parts, "\x1f")

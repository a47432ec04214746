"""The rows of a partition for exports: accepted images or a manifest, with their measures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.curation.export.exported_types import ExportedTypes
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import Verdict
from krea_dagster.parquet_files import open_parquet

_ROWS: Final = 10_000

#: Columns of the measures that are no measures of an image.
_NO_MEASURES: Final = frozenset(
    {"image_sha256", "partition_key", "width", "height", "perceptual_hash"}
)


#: The columns of a verdict in an export.
VERDICT_COLUMNS: Final = pa.schema(
    [
        ("verdict", pa.string()),
        ("verdict_reason", pa.string()),
        ("verdict_tags", pa.list_(pa.string())),
        ("verdict_note", pa.string()),
        ("reviewer", pa.string()),
        ("reviewed_at", pa.timestamp("us", tz="UTC")),
    ]
)


class PartitionTable:
    """A partition's table below a storage root, with the columns of ``measures`` next to its own.

    ``name`` is that of the accepted images or of the manifest. A partition that was not measured
    has no measures.
    """

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage = storage
        self._name = name
        with storage.open(name) as file:
            self._own = open_parquet(file).schema_arrow
        self._measures = self._read_measures()

    def schema(self, types: ExportedTypes) -> pa.Schema:
        """Return the columns in their exported types.

        A column of nulls keeps that type, so that it has the one of another partition.
        """
        measures = [one for one in self._measures.schema if one.name != "image_sha256"]
        return pa.schema(
            [
                (one.name, one.type if pa.types.is_null(one.type) else types.type_of(one.type))
                for one in (*self._own, *measures)
            ]
        )

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield those of these columns that exist, of the stored images."""
        needed = ["status", "image_sha256", "image_path"]
        wanted = list(dict.fromkeys([*columns, *needed]))
        own = set(self._own.names)
        added = [name for name in wanted if name not in own and name in self._measures.schema.names]
        with self._storage.open(self._name) as file:
            opened = open_parquet(file)
            for batch in opened.iter_batches(_ROWS, columns=[one for one in wanted if one in own]):
                stored = pc.and_(
                    pc.equal(batch.column("status"), State.STORED.value),
                    pc.and_(
                        pc.is_valid(batch.column("image_sha256")),
                        pc.is_valid(batch.column("image_path")),
                    ),
                )
                yield _joined(batch.filter(stored.fill_null(False)), self._measures, added)

    def _read_measures(self) -> pa.Table:
        own = set(self._own.names)
        name = "/".join(["measures", *self._name.split("/")[1:]])
        try:
            with self._storage.open(name) as file:
                table = open_parquet(file).read()
        except (FileNotFoundError, pa.ArrowInvalid):
            return pa.table({"image_sha256": pa.array([], pa.string())})
        names = [one for one in table.column_names if one not in own | _NO_MEASURES]
        return table.select(["image_sha256", *names]).replace_schema_metadata(None)


class EarlierTable:
    """The earlier images, with the interface of ``PartitionTable``; they have no measures."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def schema(self, types: ExportedTypes) -> pa.Schema:
        """Return the columns in their exported types."""
        return pa.schema([(one.name, types.type_of(one.type)) for one in self._table.schema])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield those of these columns that exist."""
        present = [name for name in dict.fromkeys(columns) if name in self._table.column_names]
        yield from self._table.select(present).to_batches(max_chunksize=_ROWS)


class JudgedTable:
    """A table with columns of the present verdicts in place of those that it has.

    ``verdicts`` has ``VERDICT_COLUMNS`` and ``image_sha256``, each image at most once.
    """

    def __init__(self, table: PartitionTable | EarlierTable, verdicts: pa.Table) -> None:
        self._table = table
        self._verdicts = verdicts

    def schema(self, types: ExportedTypes) -> pa.Schema:
        """Return the columns in their exported types."""
        own = [one for one in self._table.schema(types) if one.name not in VERDICT_COLUMNS.names]
        return pa.schema([*own, *VERDICT_COLUMNS])

    def batches(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Yield those of these columns that exist."""
        wanted = [name for name in VERDICT_COLUMNS.names if name in columns]
        own = [name for name in columns if name not in wanted]
        for batch in self._table.batches(own):
            kept = [name for name in batch.schema.names if name not in wanted]
            yield _joined(batch.select(kept), self._verdicts, wanted)


def verdict_columns(verdicts: Iterable[Verdict]) -> pa.Table:
    """Return present verdicts as ``JudgedTable`` takes them."""
    rows = [
        {
            "image_sha256": one.image_sha256,
            "verdict": one.verdict,
            "verdict_reason": one.reason,
            "verdict_tags": None if one.tags is None else list(one.tags),
            "verdict_note": one.note,
            "reviewer": one.reviewer,
            "reviewed_at": one.at,
        }
        for one in verdicts
    ]
    return pa.Table.from_pylist(
        rows, pa.schema([pa.field("image_sha256", pa.string()), *VERDICT_COLUMNS])
    )


def _joined(batch: pa.RecordBatch, table: pa.Table, names: Sequence[str]) -> pa.RecordBatch:
    """Append columns of a table that has a row for some of the images."""
    if not names:
        return batch
    known = as_array(table["image_sha256"])
    places = pc.index_in(batch.column("image_sha256").cast(known.type), value_set=known)
    for name in names:
        batch = batch.append_column(name, as_array(table[name]).take(places))
    return batch

"""The rows of a partition for exports: accepted images or a manifest, with their measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.curation.export.exported_types import ExportedTypes
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage

_ROWS: Final = 10_000

#: Columns of the measures that are no measures of an image.
_NO_MEASURES: Final = frozenset(
    {"image_sha256", "partition_key", "width", "height", "perceptual_hash"}
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
            self._own = pq.ParquetFile(file).schema_arrow
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
            opened = pq.ParquetFile(file)
            for batch in opened.iter_batches(_ROWS, columns=[one for one in wanted if one in own]):
                stored = pc.and_(
                    pc.equal(batch.column("status"), State.STORED.value),
                    pc.and_(
                        pc.is_valid(batch.column("image_sha256")),
                        pc.is_valid(batch.column("image_path")),
                    ),
                )
                yield self._with_measures(batch.filter(stored.fill_null(False)), added)

    def _read_measures(self) -> pa.Table:
        own = set(self._own.names)
        name = "/".join(["measures", *self._name.split("/")[1:]])
        try:
            with self._storage.open(name) as file:
                table = pq.ParquetFile(file).read()
        except (FileNotFoundError, pa.ArrowInvalid):
            return pa.table({"image_sha256": pa.array([], pa.string())})
        names = [one for one in table.column_names if one not in own | _NO_MEASURES]
        return table.select(["image_sha256", *names]).replace_schema_metadata(None)

    def _with_measures(self, batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
        if not names:
            return batch
        known = self._measures["image_sha256"].combine_chunks()
        places = pc.index_in(batch.column("image_sha256").cast(known.type), value_set=known)
        for name in names:
            values = self._measures[name].combine_chunks().take(places)
            batch = batch.append_column(name, values)
        return batch


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

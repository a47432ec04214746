"""Parquet files in the process's temporary folder: copies of tables that are not Parquet files."""

from __future__ import annotations

import hashlib
import tempfile
import weakref
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

#: A row group has these many rows or bytes, so that partitions can be read without the others.
_GROUP_ROWS: Final = 65_536
_GROUP_BYTES: Final = 32 * 1024**2


class Copy:
    """A Parquet file that is removed with its last user, or at the end of the process."""

    def __init__(self, batches: pa.RecordBatchReader) -> None:
        with tempfile.NamedTemporaryFile(
            prefix="krea-prompts-", suffix=".parquet", delete=False
        ) as file:
            self.path = file.name
        weakref.finalize(self, Path(self.path).unlink, missing_ok=True)
        with pq.ParquetWriter(self.path, batches.schema, compression="lz4") as writer:
            for group in _groups(batches):
                writer.write_table(group, row_group_size=_GROUP_ROWS)

    def mark(self) -> str:
        """Return a hash of the content."""
        return self._mark

    @cached_property
    def _mark(self) -> str:
        digest = hashlib.sha256()
        with Path(self.path).open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        return digest.hexdigest()[:32]


def _groups(batches: pa.RecordBatchReader) -> Iterator[pa.Table]:
    """Yield the rows in tables that are large enough for a row group."""
    gathered: list[pa.RecordBatch] = []
    rows = size = 0
    for batch in batches:
        gathered.append(batch)
        rows, size = rows + batch.num_rows, size + batch.nbytes
        if rows >= _GROUP_ROWS or size >= _GROUP_BYTES:
            yield pa.Table.from_batches(gathered, batches.schema)
            gathered, rows, size = [], 0, 0
    if gathered:
        yield pa.Table.from_batches(gathered, batches.schema)

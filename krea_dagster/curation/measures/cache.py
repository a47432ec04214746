"""Caches measures by the sha256 of the image, so that each is computed once.

A cache is a folder of small Parquet files. Each writer adds files of its own, atomically, and files
are never changed, so any number of processes can write and read at once, on a disk and in an object
store. Many small files are merged now and then; the merged file is written before the small ones
are removed. A crash loses at most the rows that were not written yet; they are measured again.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from krea_dagster import redact
from krea_dagster.arrow import as_array
from krea_dagster.curation.measures.builtin import NAMES, VERSION, measure
from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import StorageError
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import safe_name

_log = logging.getLogger(__name__)

#: Readers of Parquet folders skip names that begin with an underscore.
_HOME: Final = "measures/_cache"

DIGEST: Final = pa.binary(32)
KEY: Final = "sha256"

#: More small files than this are merged, up to this size each.
_MAX_SMALL_FILES: Final = 32
_SMALL_BYTES: Final = 8 * 1024 * 1024

#: How often the files are listed again when some of them were merged meanwhile.
_TRIES: Final = 3

_ROW_GROUP: Final = 50_000

#: The most rows that a writer holds before it writes them.
_WAITING_ROWS: Final = 2_000


def digests(sha256: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Return hexadecimal hashes, none of them null, as 32 bytes each."""
    data = bytes.fromhex("".join(sha256.to_pylist()))
    return pa.Array.from_buffers(DIGEST, len(sha256), [None, pa.py_buffer(data)])


class MeasureCache:
    """The cached measures of one ``kind``, a name with a version; ``schema`` is without the key."""

    def __init__(self, storage: Storage, kind: str, schema: pa.Schema) -> None:
        self._storage = storage
        self._folder = f"{_HOME}/{safe_name(kind)}"
        self._merges = True
        self.schema = pa.schema([pa.field(KEY, DIGEST), *schema])

    def __repr__(self) -> str:
        return f"MeasureCache({redact.location(self._storage.locate(self._folder))!r})"

    @classmethod
    def builtin(cls, storage: Storage) -> MeasureCache:
        """Return the cache of the built-in measures."""
        fields = [MEASURES_SCHEMA.field(name) for name in NAMES]
        return cls(storage, f"picture@{VERSION}", pa.schema(fields))

    @classmethod
    def custom(cls, storage: Storage, name: str, version: str) -> MeasureCache:
        """Return the cache of a custom measure."""
        return cls(storage, f"own {name}@{version}", pa.schema([("value", pa.float64())]))

    def find(self, wanted: pa.Array) -> pa.Table:
        """Return the cached rows of these digests, each once, in any order."""
        tables: list[pa.Table] = [self.schema.empty_table()]
        for _ in range(_TRIES):
            complete = True
            for name in self._names():
                try:
                    tables.append(self._matching_rows(name, wanted))
                except FileNotFoundError:  # merged into a file that may not be listed yet
                    complete = False
            if complete:
                break
        return _distinct(pa.concat_tables(tables))

    def add(self, table: pa.Table) -> None:
        """Write rows durably, and merge small files if there are many. Raises StorageError."""
        try:
            self._write(table)
        except OSError as error:
            raise StorageError(
                f"measures cannot be written to {self._storage.locate(self._folder)}: {error}"
            ) from error
        if self._merges:
            try:
                self._merge()
            except OSError as error:  # such as a store that allows no removal
                self._merges = False
                _log.warning(
                    "the small files of %s are not merged: %s", self, redact.text(str(error))
                )

    def _names(self) -> Iterator[str]:
        return (name for name in self._storage.names(self._folder) if name.endswith(".parquet"))

    def _matching_rows(self, name: str, wanted: pa.Array) -> pa.Table:
        found = []
        for batch in self._batches(name):
            known = pc.is_in(batch.column(0), value_set=wanted)
            if pc.any(known).as_py():
                found.append(batch.filter(known))
        return pa.Table.from_batches(found, self.schema)

    def _batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file; none of a damaged one."""
        with self._storage.open(name) as file:
            try:
                yield from open_parquet(file).iter_batches(_ROW_GROUP)
            except pa.ArrowInvalid as error:
                path = redact.location(self._storage.locate(name))
                _log.warning("%s is damaged, and may be removed: %s", path, redact.text(str(error)))

    def _write(self, table: pa.Table) -> None:
        self._storage.write(
            f"{self._folder}/{uuid.uuid4().hex}.parquet",
            # Hashes neither compress nor repeat.
            lambda file: pq.write_table(
                table, file, row_group_size=_ROW_GROUP, use_dictionary=False, compression="none"
            ),
        )

    def _merge(self) -> None:
        """Merge many small files into one. Two processes that do it at once lose nothing."""
        names = list(self._names())
        if len(names) <= _MAX_SMALL_FILES:
            return
        small, total_bytes = [], 0
        for name in names:
            size_bytes = self._storage.size_bytes(name)
            if (
                size_bytes is not None
                and size_bytes < _SMALL_BYTES
                and total_bytes < 4 * _SMALL_BYTES
            ):
                small.append(name)
                total_bytes += size_bytes
        if len(small) <= _MAX_SMALL_FILES:
            return
        batches: list[pa.RecordBatch] = []
        for name in small:
            with suppress(FileNotFoundError):
                batches += self._batches(name)
        self._write(_distinct(pa.Table.from_batches(batches, self.schema)))
        for name in small:
            self._storage.remove(name)


def _distinct(table: pa.Table) -> pa.Table:
    """Return the first row of each key."""
    keys = as_array(table[KEY])
    if not len(keys):
        return table
    places = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(places, return_index=True)
    return table if len(first) == len(keys) else table.take(np.sort(first))


class MeasureWriter:
    """Collects rows from any thread and writes them to a cache. Use it in a ``with`` statement.

    Rows are written after ``wait_s`` seconds of the ``clock``, or when there are 2,000, and at the
    end. With ``keep``, the written tables stay in ``written``.
    """

    def __init__(
        self,
        cache: MeasureCache,
        *,
        wait_s: float = 60.0,
        keep: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.written: list[pa.Table] = []
        self._cache = cache
        self._wait_s = wait_s
        self._keep = keep
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: list[tuple[Any, ...]] = []
        self._since_s = clock()

    def __enter__(self) -> MeasureWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def add(self, sha256: str, values: Sequence[Any]) -> None:
        """Add the measures of an image. Raises StorageError."""
        with self._lock:
            if not self._waiting:
                self._since_s = self._clock()
            self._waiting.append((bytes.fromhex(sha256), *values))
            late = self._clock() - self._since_s >= self._wait_s
            rows = self._pop_waiting() if late or len(self._waiting) >= _WAITING_ROWS else []
        self._write(rows)

    def close(self) -> None:
        """Write the rows that wait. Raises StorageError."""
        with self._lock:
            rows = self._pop_waiting()
        self._write(rows)

    def _pop_waiting(self) -> list[tuple[Any, ...]]:
        rows, self._waiting = self._waiting, []
        return rows

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        if not rows:
            return
        schema = self._cache.schema
        arrays = [
            pa.array(column, field.type)
            for column, field in zip(zip(*rows, strict=True), schema, strict=True)
        ]
        table = pa.Table.from_arrays(arrays, schema=schema)
        self._cache.add(table)
        if self._keep:
            self.written.append(table)


@contextmanager
def measured_while_verified(storage: Storage) -> Iterator[Callable[[str, Image.Image], None]]:
    """Yield a callback that measures each image that a run decodes to verify it.

    A failed write is logged and does not stop the run: the images are measured again from their
    files.
    """
    writer = MeasureWriter(MeasureCache.builtin(storage))

    def on_image(sha256: str, image: Image.Image) -> None:
        writer.add(sha256, measure(image).values())

    try:
        yield on_image
    finally:
        try:
            writer.close()
        except StorageError:
            _log.exception("the images are stored; they will be measured again from their files")

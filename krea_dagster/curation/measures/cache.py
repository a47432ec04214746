"""Keeps figures by the sha256 of the image, so that none is taken twice.

A cache is a folder of small Parquet files. Each writer adds files of its own, whole or not at
all, and nothing is ever changed, so that any number of processes may write and read at once, on
a disk and in an object store. Many small files are now and then made one: the new one is there
before the old ones go. A crash loses at most what was not written yet; it is measured again.
"""

from __future__ import annotations

import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from krea_dagster import redact
from krea_dagster.curation.measures.builtin import NAMES, VERSION, measure
from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import StorageError
from krea_dagster.prompts import safe_name

_log = logging.getLogger(__name__)

#: Readers of Parquet folders pass over it.
_HOME: Final = "measures/_cache"

DIGEST: Final = pa.binary(32)
KEY: Final = "sha256"

#: So many small files are made one, up to this size.
_MANY: Final = 32
_SMALL_BYTES: Final = 8 * 1024 * 1024

#: How often the files are looked through where some vanish meanwhile.
_TRIES: Final = 3

_ROW_GROUP: Final = 50_000

#: Rows that figures wait for, at most, before they are written.
_WAITING_ROWS: Final = 2_000


def digests(sha256: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Hashes in hex, none null, as 32 bytes each."""
    data = bytes.fromhex("".join(sha256.to_pylist()))
    return pa.Array.from_buffers(DIGEST, len(sha256), [None, pa.py_buffer(data)])


class MeasureCache:
    """The figures of one kind: ``schema`` without the key, ``kind`` as a name with a version."""

    def __init__(self, storage: Storage, kind: str, schema: pa.Schema) -> None:
        self._storage = storage
        self._folder = f"{_HOME}/{safe_name(kind)}"
        self._tidies = True
        self.schema = pa.schema([pa.field(KEY, DIGEST), *schema])

    def __repr__(self) -> str:
        return f"MeasureCache({redact.location(self._storage.locate(self._folder))!r})"

    @classmethod
    def builtin(cls, storage: Storage) -> MeasureCache:
        """The figures that every picture has."""
        own = [MEASURES_SCHEMA.field(name) for name in NAMES]
        return cls(storage, f"picture@{VERSION}", pa.schema(own))

    @classmethod
    def custom(cls, storage: Storage, name: str, version: str) -> MeasureCache:
        """The values of a user's measure."""
        return cls(storage, f"own {name}@{version}", pa.schema([("value", pa.float64())]))

    def find(self, wanted: pa.Array) -> pa.Table:
        """The rows of these digests that are known, each once, in any order."""
        tables: list[pa.Table] = [self.schema.empty_table()]
        for _ in range(_TRIES):
            gone = False
            for name in self._names():
                try:
                    tables.append(self._among(name, wanted))
                except FileNotFoundError:
                    gone = True
            if not gone:
                break
            # Made one with others meanwhile, whose rows are in a file that may not be listed yet.
        return _once(pa.concat_tables(tables))

    def add(self, table: pa.Table) -> None:
        """Write rows, durably; makes many small files one. Raises StorageError."""
        name = f"{self._folder}/{uuid.uuid4().hex}.parquet"
        try:
            self._write(name, table)
        except OSError as error:
            raise StorageError(
                f"measures cannot be written to {self._storage.locate(self._folder)}: {error}"
            ) from error
        if self._tidies:
            try:
                self._make_one()
            except OSError as error:  # such as a store that nothing may be removed from
                self._tidies = False
                _log.warning(
                    "the many small files of %s stay as they are: %s", self, redact.text(str(error))
                )

    def _names(self) -> Iterator[str]:
        return (name for name in self._storage.names(self._folder) if name.endswith(".parquet"))

    def _among(self, name: str, wanted: pa.Array) -> pa.Table:
        found = []
        for batch in self._batches(name):
            known = pc.is_in(batch.column(0), value_set=wanted)
            if pc.any(known).as_py():
                found.append(batch.filter(known))
        return pa.Table.from_batches(found, self.schema)

    def _batches(self, name: str) -> Iterator[pa.RecordBatch]:
        """The rows of a file; those of a damaged one are as if they were not known."""
        with self._storage.open(name) as file:
            try:
                yield from pq.ParquetFile(file).iter_batches(_ROW_GROUP)
            except pa.ArrowInvalid as error:
                path = redact.location(self._storage.locate(name))
                _log.warning("%s is damaged, and may be removed: %s", path, redact.text(str(error)))

    def _write(self, name: str, table: pa.Table) -> None:
        self._storage.write(
            name,
            # Hashes do not compress, and have no doubles.
            lambda file: pq.write_table(
                table, file, row_group_size=_ROW_GROUP, use_dictionary=False, compression="none"
            ),
        )

    def _make_one(self) -> None:
        """Make many small files one. Two at once do it twice, and lose nothing."""
        names = list(self._names())
        if len(names) <= _MANY:
            return
        small, bytes_ = [], 0
        for name in names:
            size_bytes = self._storage.size_bytes(name)
            if size_bytes is not None and size_bytes < _SMALL_BYTES and bytes_ < 4 * _SMALL_BYTES:
                small.append(name)
                bytes_ += size_bytes
        if len(small) <= _MANY:
            return
        batches: list[pa.RecordBatch] = []
        for name in small:
            with suppress(FileNotFoundError):
                batches += self._batches(name)
        together = _once(pa.Table.from_batches(batches, self.schema))
        self._write(f"{self._folder}/{uuid.uuid4().hex}.parquet", together)
        for name in small:
            self._storage.remove(name)


def _once(table: pa.Table) -> pa.Table:
    """The rows without those whose key came before."""
    keys = table[KEY].combine_chunks()
    if not len(keys):
        return table
    places = keys.dictionary_encode().indices.to_numpy(zero_copy_only=False)
    _, first = np.unique(places, return_index=True)
    return table if len(first) == len(keys) else table.take(np.sort(first))


class MeasureWriter:
    """Gathers rows from any thread, and writes them to a cache now and then, and at the end.

    They wait ``wait_s`` seconds of the ``clock`` at most, or until there are 2,000. With ``keep``
    the tables that were written stay in ``written``. Use it in a ``with`` statement.
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

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def take(self, sha256: str, values: Sequence[Any]) -> None:
        """Take note of the figures of an image. Raises StorageError."""
        with self._lock:
            if not self._waiting:
                self._since_s = self._clock()
            self._waiting.append((bytes.fromhex(sha256), *values))
            late = self._clock() - self._since_s >= self._wait_s
            rows = self._taken() if late or len(self._waiting) >= _WAITING_ROWS else []
        self._write(rows)

    def close(self) -> None:
        """Write what waits. Raises StorageError."""
        with self._lock:
            rows = self._taken()
        self._write(rows)

    def _taken(self) -> list[tuple[Any, ...]]:
        rows, self._waiting = self._waiting, []
        return rows

    def _write(self, rows: list[tuple[Any, ...]]) -> None:
        if rows:
            columns = zip(*rows, strict=True)
            arrays = [
                pa.array(column, field.type)
                for column, field in zip(columns, self._cache.schema, strict=True)
            ]
            table = pa.Table.from_arrays(arrays, schema=self._cache.schema)
            self._cache.add(table)
            if self._keep:
                self.written.append(table)


@contextmanager
def measured_while_verified(storage: Storage) -> Iterator[Callable[[str, Image.Image], None]]:
    """Yield what ``ImageStore`` takes as ``on_image``, so that a run measures what it decodes.

    What cannot be written is logged, and measured again from the file: a run that buys is not
    stopped for it.
    """
    notes = MeasureWriter(MeasureCache.builtin(storage))

    def on_image(sha256: str, picture: Image.Image) -> None:
        notes.take(sha256, measure(picture).values())

    try:
        yield on_image
    finally:
        try:
            notes.close()
        except StorageError:
            _log.exception("the images are stored; they will be measured again from their files")

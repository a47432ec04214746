"""Rows on disk by partition, so that a table of any size can be planned.

Some megabytes are gathered, sorted by partition, and appended to an unnamed temporary file, which
disappears with the process.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: Bytes that are gathered before they go to disk, and additional ones for each partition.
_GATHERED_BYTES: Final = 4 * 1024**2
_EACH_BYTES: Final = 4 * 1024

#: Bytes that are read back at once.
_BLOCK_BYTES: Final = 256 * 1024

_OPTIONS: Final = pa.ipc.IpcWriteOptions(compression="lz4")

_Numbers = npt.NDArray[np.int64]


class Keys:
    """Partition keys, numbered in the order of appearance."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._numbers)

    def numbers(self, keys: pa.Array) -> _Numbers:
        """Return the number of each key."""
        encoded = keys.dictionary_encode()
        known = [
            self._numbers.setdefault(key, len(self._numbers))
            for key in encoded.dictionary.to_pylist()
        ]
        numbers: _Numbers = np.array(known, np.int64)[encoded.indices.to_numpy()]
        return numbers

    def in_order(self) -> list[str]:
        """Return the keys, sorted."""
        return sorted(self._numbers)

    def ranks(self) -> _Numbers:
        """Return, for each number, the place of its key among all sorted keys."""
        numbers = np.array([self._numbers[key] for key in self.in_order()], np.int64)
        ranks = np.empty(len(numbers), np.int64)
        ranks[numbers] = np.arange(len(numbers))
        return ranks

    def number_of(self, key: str) -> int | None:
        """Return the number of a key, or None for an unknown one."""
        return self._numbers.get(key)


@dataclass
class _SortedRun:
    """Rows that were written together: sorted by partition, in blocks of ``block_rows`` rows.

    ``numbers`` are the partitions, ``starts`` their first rows and the end; ``places`` are the
    blocks' offsets and sizes in the file, and ``last`` is the block that was read last.
    """

    numbers: _Numbers
    starts: _Numbers
    block_rows: int
    places: list[tuple[int, int]]
    last: tuple[int, Any] = field(default=(-1, None))


class Spool:
    """Rows of one schema, by partition, in the order in which they were added.

    The last of its ``users`` to close it frees memory and disk.
    """

    def __init__(self, keys: Keys) -> None:
        self.users = 1
        self._file = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``close``
        self._keys = keys
        self._gathered: list[tuple[pa.RecordBatch, _Numbers]] = []
        self._bytes = 0
        self._runs: list[_SortedRun] = []

    def close(self) -> None:
        """Free memory and disk, if no other user is left."""
        self.users -= 1
        if self.users > 0:
            return
        self._gathered = []
        self._runs = []
        self._file.close()

    def add(self, batch: pa.RecordBatch, numbers: _Numbers) -> None:
        """Add rows, with the number of each row's partition."""
        self._gathered.append((batch, numbers))
        self._bytes += batch.nbytes
        if self._bytes > _GATHERED_BYTES + _EACH_BYTES * len(self._keys):
            self._write()

    def batches(self, key: str) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a partition; fastest when partitions are read in the order of keys."""
        number = self._keys.number_of(key)
        if number is None:
            return
        for run in self._runs:
            yield from self._from_run(run, number)
        for batch, numbers in self._gathered:
            mask = numbers == number
            if mask.any():
                yield batch.filter(pa.array(mask))

    def _from_run(self, run: _SortedRun, number: int) -> Iterator[pa.RecordBatch]:
        (places,) = np.nonzero(run.numbers == number)
        if not len(places):
            return
        start, end = int(run.starts[places[0]]), int(run.starts[places[0] + 1])
        while start < end:
            block, first = divmod(start, run.block_rows)
            length = min(end - start, run.block_rows - first)
            if run.last[0] != block:
                run.last = (block, self._read(*run.places[block]))
            yield run.last[1].slice(first, length)
            start += length

    def _read(self, offset: int, size: int) -> pa.RecordBatch:
        self._file.seek(offset)
        with pa.ipc.open_stream(self._file.read(size)) as reader:
            return reader.read_next_batch()

    def _write(self) -> None:
        numbers = np.concatenate([numbers for _, numbers in self._gathered])
        ranks = self._keys.ranks()[numbers]
        order = np.argsort(ranks, kind="stable")
        batches = [batch for batch, _ in self._gathered]
        table = pa.Table.from_batches(batches).combine_chunks().take(pa.array(order))
        ranks = ranks[order]
        starts = np.flatnonzero(np.concatenate([[True], ranks[1:] != ranks[:-1]]))
        rows = max(1, _BLOCK_BYTES * table.num_rows // max(1, self._bytes))
        run = _SortedRun(numbers[order][starts], np.append(starts, table.num_rows), rows, [])
        end = self._file.seek(0, 2)
        for batch in table.to_batches(max_chunksize=rows):
            # A stream for each block: nested dictionaries may differ between blocks.
            sink = pa.BufferOutputStream()
            with pa.ipc.new_stream(sink, batch.schema, options=_OPTIONS) as writer:
                writer.write_batch(batch)
            data = sink.getvalue()
            self._file.write(data)
            run.places.append((end, data.size))
            end += data.size
        self._runs.append(run)
        self._gathered = []
        self._bytes = 0

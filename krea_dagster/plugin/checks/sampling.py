"""A random sample of manifest rows, drawn in one pass and reproducible by its seed."""

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import digests_from_hex
from krea_dagster.engine.record import PRUNED
from krea_dagster.engine.states import State
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks.findings import RowFindings

#: A row of a manifest.
Row = Mapping[str, Any]

_Words = npt.NDArray[np.uint64]

_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(31)


class Sample:
    """Keeps up to ``most`` rows of different requests, by a hash of request key and seed."""

    def __init__(self, most: int, seed: int) -> None:
        self._most = most
        self._seed = np.uint64((seed * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64)
        self._numbers: _Words = np.empty(0, np.uint64)
        self._rows: pa.Table | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Add candidates; rows without a complete request key are skipped."""
        batch = with_digests(batch, "request_key")
        if not batch.num_rows or not self._most:
            return
        numbers = self._drawn(batch)
        if len(self._numbers) >= self._most:
            near = numbers < self._numbers.max()
            batch, numbers = batch.filter(pa.array(near)), numbers[near]
        rows = pa.Table.from_batches([batch])
        rows = rows if self._rows is None else pa.concat_tables([self._rows, rows])
        numbers, places = np.unique(np.concatenate([self._numbers, numbers]), return_index=True)
        self._numbers = numbers[: self._most]
        self._rows = rows.take(pa.array(places[: self._most]))

    def rows(self) -> list[Row]:
        """Return the drawn rows."""
        return [] if self._rows is None else self._rows.to_pylist()

    def _drawn(self, batch: pa.RecordBatch) -> _Words:
        numbers = (first_words(batch, "request_key") ^ self._seed) * _ODD
        numbers ^= numbers >> _SHIFT
        return np.asarray(numbers * _ODD, np.uint64)


def with_digests(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    """Return the rows whose value in this column is a hash of 64 hexadecimal digits."""
    whole = pc.match_substring_regex(batch.column(column), "^[0-9a-f]{64}$").fill_null(False)
    return batch.filter(whole)


def first_words(batch: pa.RecordBatch, column: str) -> _Words:
    """Return the first 8 bytes of each hash in a column of 64 digits, as numbers."""
    digests = digests_from_hex(batch.column(column).cast(pa.string()))
    words = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)
    return np.array(words[:, 0], np.uint64)


def bought_by_others(batch: pa.RecordBatch, run_id: str) -> pa.RecordBatch:
    """Return the rows of images that other runs than this one have bought."""
    return batch.filter(pc.not_equal(batch.column("run_id"), run_id).fill_null(True))


def check_sample(sample: int | None) -> None:
    """Raise ConfigError for a negative number of files. None means all files."""
    if sample is not None and sample < 0:
        raise ConfigError(f"sample is {sample}; give a number of files, or None for all")


def inspect_stored(
    batches: Iterable[pa.RecordBatch],
    findings: RowFindings,
    *,
    threads: int,
    sample: Sample | None,
    screen: Callable[[pa.RecordBatch], pa.RecordBatch],
    inspect: Callable[[Row], str | None],
) -> tuple[int, int]:
    """Inspect the files of stored rows, and return the number of stored and of inspected rows.

    ``screen`` adds findings about a batch, and returns the rows to inspect: all of them, or those
    in the sample. ``inspect`` returns what is wrong with a row's file, or None; it is called by
    several threads.
    """
    stored_count = inspected = 0
    with ThreadPoolExecutor(threads) as pool:

        def inspect_all(rows: list[Row]) -> int:
            for row, why in zip(rows, pool.map(inspect, rows), strict=True):
                if why is not None:
                    findings.add_row(row, why)
            return len(rows)

        for batch in batches:
            pruned = pc.equal(batch.column("error_code"), PRUNED).fill_null(False)
            is_stored = pc.equal(batch.column("status"), State.STORED.value)
            stored = batch.filter(pc.and_(is_stored, pc.invert(pruned)))
            stored_count += stored.num_rows
            screened = screen(stored)
            if sample is None:
                inspected += inspect_all(screened.to_pylist())
            else:
                sample.add(screened)
        if sample is not None:
            inspected = inspect_all(sample.rows())
    return stored_count, inspected

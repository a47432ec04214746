"""A random sample of the rows of manifests, drawn in one pass and the same for the same seed."""

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import digests_from_hex
from krea_dagster.errors import ConfigError

_Words = npt.NDArray[np.uint64]

_ODD: Final = np.uint64(0x9E3779B97F4A7C15)
_SHIFT: Final = np.uint64(31)


class Sample:
    """Keeps so many rows, of different requests, by a number drawn from request key and seed."""

    def __init__(self, most: int, seed: int) -> None:
        self._most = most
        self._seed = np.uint64((seed * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**64)
        self._numbers: _Words = np.empty(0, np.uint64)
        self._rows: pa.Table | None = None

    def add(self, batch: pa.RecordBatch) -> None:
        """Let rows take part; those without a whole request key do not."""
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

    def rows(self) -> Iterator[dict[str, Any]]:
        """Yield the rows that were drawn."""
        if self._rows is not None:
            yield from self._rows.to_pylist()

    def _drawn(self, batch: pa.RecordBatch) -> _Words:
        numbers = (first_words(batch, "request_key") ^ self._seed) * _ODD
        numbers ^= numbers >> _SHIFT
        return np.asarray(numbers * _ODD, np.uint64)


def with_digests(batch: pa.RecordBatch, column: str) -> pa.RecordBatch:
    """The rows in which this column is 64 digits."""
    whole = pc.match_substring_regex(batch.column(column), "^[0-9a-f]{64}$").fill_null(False)
    return batch.filter(whole)


def first_words(batch: pa.RecordBatch, column: str) -> _Words:
    """The first 8 bytes of each hash in a column of 64 digits, as numbers."""
    digests = digests_from_hex(batch.column(column).cast(pa.string()))
    words = np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)
    return np.array(words[:, 0], np.uint64)


def checked_sample(sample: int | None) -> int | None:
    """A number of rows, or None for all. Raises ConfigError for another."""
    if sample is not None and sample < 0:
        raise ConfigError(f"sample is {sample}; give a number of files, or None for all")
    return sample

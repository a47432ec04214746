"""Pass once over a prompt table: choose the rows, check them, yield them batch by batch.

Whole columns are read at a time, and several batches at once in threads: Arrow releases the
interpreter lock.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster import redact
from krea_dagster.errors import ConfigError, Problem
from krea_dagster.prompts.blanks import blanks_note, rows_that_differ_by_blanks, unusual_hashes
from krea_dagster.prompts.cells import Bad, plain_array, shown, whole_cells
from krea_dagster.prompts.column_names import check_prompt_columns
from krea_dagster.prompts.columns import (
    BadCells,
    as_mask,
    partition_keys,
    read_recognised,
    text_values,
)
from krea_dagster.prompts.duplicates import find_duplicates, hashes_of_ids
from krea_dagster.prompts.hints import seeds_hint
from krea_dagster.prompts.identity import buckets, derived_prompt_ids
from krea_dagster.prompts.murmur import Hashes, hashes_of_texts
from krea_dagster.prompts.partitioning import HashPartitions, PartitionBy
from krea_dagster.prompts.pushdown import row_group_filter
from krea_dagster.prompts.requests import Defaults
from krea_dagster.prompts.sources import Reading
from krea_dagster.prompts.table_schema import Layout, Problems, problem_in
from krea_dagster.prompts.tokens import WARN_TOKENS, at_most_tokens, estimate_tokens

#: A validated row with the defaults filled in. ``row`` counts from 1 in the table; a null seed is
#: drawn.
ROWS_SCHEMA: Final = pa.schema(
    [
        ("row", pa.int64()),
        ("prompt_id", pa.string()),
        ("prompt", pa.string()),
        ("size", pa.string()),
        ("quality", pa.string()),
        ("seed", pa.int64()),
        ("nsfw_check", pa.bool_()),
        ("num_images", pa.int64()),
        ("partition_key", pa.string()),
    ]
)

_Columns = dict[str, pa.Array]
_T = TypeVar("_T")

#: Batches that are worked on at once: more would only take memory.
_THREADS: Final = min(4, os.cpu_count() or 1)


@dataclass(frozen=True)
class Chunk:
    """Some rows (``ROWS_SCHEMA``) and their passthrough columns."""

    rows: pa.RecordBatch
    passthrough: pa.RecordBatch


@dataclass(frozen=True)
class _Batch:
    """Some rows of the table, their numbers in it, and their partition keys where known."""

    numbers: npt.NDArray[np.int64]
    columns: _Columns
    keys: pa.Array | None = None

    def filter(self, mask: npt.NDArray[np.bool_]) -> _Batch:
        if mask.all():
            return self
        kept = pa.array(mask)
        columns = {name: array.filter(kept) for name, array in self.columns.items()}
        keys = None if self.keys is None else self.keys.filter(kept)
        return _Batch(self.numbers[mask], columns, keys)


@dataclass
class _BatchResult:
    """The result of checking one batch; ``chunk`` is None where there is a problem or no row.

    ``hashes`` are those of every prompt_id of the batch, in any partition, of ``hash:N``.
    ``unusual`` are those of prompts with blanks or invisible characters that none needs.
    """

    problems: Problems = field(default_factory=Problems)
    warnings: Problems = field(default_factory=Problems)
    chunk: Chunk | None = None
    bad_keys: dict[str, BadCells] = field(default_factory=dict)
    hashes: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))
    unusual: Hashes = field(default_factory=lambda: np.empty(0, np.uint64))


class Scan:
    """One pass over a table: yields chunks, and raises PromptTableError at its end.

    Nothing that a pass yields before it raises may be used.
    """

    def __init__(
        self,
        source: Reading,
        by: PartitionBy,
        wanted: frozenset[str] | None,
        *,
        defaults: Defaults,
        count_tokens: Callable[[str], int],
        max_prompt_tokens: int,
        passthrough: bool,
        prompt_columns: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._source = source
        self._by = by
        self._defaults = defaults
        self._count_tokens = count_tokens
        self._max_tokens = max_prompt_tokens
        self._wanted = wanted
        self._wanted_keys = pa.array(sorted(wanted or ()), pa.string())
        self._problems = Problems()
        self.warnings = Problems()
        self._notes: list[str] = []
        self._is_noted = passthrough  # a pass for data versions says nothing to a person
        files = source.files()
        names = [name for file in files for name in file.schema.names]
        check_prompt_columns(list(dict.fromkeys(names)), prompt_columns, source.shown)
        self._layout = Layout.of(by, files, self._problems, prompt_columns)
        self.passthrough_schema = self._layout.passthrough if passthrough else pa.schema([])
        keys = by.keys() if isinstance(by, HashPartitions) else []
        self._bucket_names = pa.array(keys, pa.string())
        self._wanted_buckets = np.flatnonzero([key in (wanted or ()) for key in keys])

    @property
    def notes(self) -> tuple[str, ...]:
        """What is not a problem, and perhaps not expected; complete at the end of the pass."""
        return (*self._layout.notes, *self._notes)

    def map(self, use: Callable[[Chunk], _T]) -> Iterator[_T]:
        """Yield ``use(chunk)`` for each chunk, in their order; it is called in threads."""

        def work(name: str, first: int, batch: pa.RecordBatch) -> tuple[_BatchResult, _T | None]:
            try:
                result = self._check(first, batch)
            except (pa.ArrowException, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"{name} has a column that cannot be copied to the manifest: "
                    f"{redact.text(str(error))}; "
                    "remove it, or write it in a plain type, the same in all files"
                ) from error
            return result, None if result.chunk is None else use(result.chunk)

        files = self._layout.files
        has_ids = "prompt_id" in self._layout.recognised
        if has_ids and not isinstance(self._by, HashPartitions):
            find_duplicates(hashes_of_ids(files), files, self._problems)
        hashes: list[Hashes] = []
        unusual: list[Hashes] = []
        for result, made in _in_threads(work, self._batches()):
            hashes.append(result.hashes)
            unusual.append(result.unusual)
            self._problems.add(*result.problems.first, count=result.problems.count)
            self.warnings.add(*result.warnings.first, count=result.warnings.count)
            if made is not None and not self._problems.count:
                yield made
        find_duplicates(hashes, files, self._problems)
        self._problems.raise_for(self._source.shown, self._hints)
        if any(map(len, unusual)):
            self._note_blanks(np.concatenate(unusual))

    def _note_blanks(self, suspects: Hashes) -> None:
        prompts = (
            (first, text_values(batch.column(0)))
            for file in self._layout.files
            for first, batch in file.batches(["prompt"])
        )
        if pairs := rows_that_differ_by_blanks(prompts, suspects):
            self._notes.append(blanks_note(pairs))

    def _hints(self) -> list[str]:
        """Return what may help to correct the table."""
        wrong = {problem.column for problem in self._problems.first}
        if "seed" not in wrong & set(self._layout.recognised):
            return []
        seeds = (
            seed
            for file in self._layout.files
            for _, batch in file.batches(["seed"])
            for seed in whole_cells(batch.column(0))
        )
        hint = seeds_hint(seed for seed in seeds if isinstance(seed, int))
        return [hint] if hint else []

    def _batches(self) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        layout = self._layout
        names = [*layout.recognised, *self.passthrough_schema.names, *layout.partition_columns]
        for file in layout.files:
            keep = None
            if layout.partition_columns and self._wanted is not None:
                keep = row_group_filter(self._by, file.schema, self._wanted)
            for first, batch in file.batches(names, keep):
                yield file.name, first, batch

    def _check(self, first: int, read: pa.RecordBatch) -> _BatchResult:
        """Check the rows of a batch that are in the partitions."""
        result = _BatchResult()
        # Of dictionaries only the chosen rows are decoded.
        given = {name: read.column(name) for name in read.schema.names}
        columns = {
            name: array if pa.types.is_dictionary(array.type) else plain_array(array)
            for name, array in given.items()
        }
        batch = self._keyed(_Batch(np.arange(first, first + read.num_rows), columns), result)
        if not len(batch.numbers):
            return result
        plain = {name: plain_array(array) for name, array in batch.columns.items()}
        rows, bad = read_recognised(plain, len(batch.numbers), self._defaults)
        self._add_problems(rows, bad, batch, result)
        if not result.problems.count:
            if self._is_noted:
                result.unusual = unusual_hashes(rows["prompt"])
            result.chunk = self._chunk(rows, _Batch(batch.numbers, plain, batch.keys))
        return result

    def _chunk(self, rows: _Columns, batch: _Batch) -> Chunk | None:
        rows["row"] = pa.array(batch.numbers)
        rows["seed"] = pc.if_else(
            pc.equal(rows["seed"], 0), pa.scalar(None, pa.int64()), rows["seed"]
        )
        if "prompt_id" not in self._layout.recognised:
            rows["prompt_id"] = derived_prompt_ids(rows)
        keys, passthrough = batch.keys, batch.columns
        if isinstance(self._by, HashPartitions) and keys is None:
            # The bucket follows from the prompt_id, which was derived from the row just now.
            keys = self._bucket_names.take(
                pa.array(buckets(self._by, hashes_of_texts(rows["prompt_id"])))
            )
            if self._wanted is not None:
                mask = pc.is_in(keys, value_set=self._wanted_keys)
                keys = keys.filter(mask)
                rows = {name: array.filter(mask) for name, array in rows.items()}
                passthrough = {
                    name: passthrough[name].filter(mask) for name in self.passthrough_schema.names
                }
        if keys is None:  # its column cannot be used: a problem of the table
            return None
        rows["partition_key"] = keys
        return Chunk(
            pa.RecordBatch.from_arrays(
                [rows[name] for name in ROWS_SCHEMA.names], schema=ROWS_SCHEMA
            ),
            _batch_of(passthrough, self.passthrough_schema, len(keys)),
        )

    def _keyed(self, batch: _Batch, result: _BatchResult) -> _Batch:
        """Find the partition of each row, and keep the rows of those that are wanted."""
        if isinstance(self._by, HashPartitions):
            return self._bucketed(batch, self._by, result)
        if not self._layout.partition_columns:
            return batch
        keys, bad = partition_keys(self._by, batch.columns)
        batch = _Batch(batch.numbers, batch.columns, keys)
        if self._wanted is None:
            result.bad_keys = bad
            return batch
        return batch.filter(as_mask(pc.is_in(keys, value_set=self._wanted_keys)))

    def _bucketed(self, batch: _Batch, by: HashPartitions, result: _BatchResult) -> _Batch:
        if "prompt_id" not in batch.columns:
            return batch
        ids = text_values(batch.columns["prompt_id"])
        hashes = hashes_of_texts(ids)
        usable = as_mask(pc.not_equal(ids, "").fill_null(False))
        result.hashes = hashes if usable.all() else hashes[usable]
        numbers = buckets(by, hashes)
        if self._wanted is not None:
            # A row without a usable prompt_id may belong to any partition.
            mask = np.isin(numbers, self._wanted_buckets) | as_mask(ids.is_null())
            batch, numbers = batch.filter(mask), numbers[mask]
        keys = self._bucket_names.take(pa.array(numbers))
        return _Batch(batch.numbers, batch.columns, keys)

    def _add_problems(
        self, rows: _Columns, bad: dict[str, BadCells], batch: _Batch, result: _BatchResult
    ) -> None:
        ids = rows["prompt_id"]

        def problem(column: str, at: int, cell: Bad) -> Problem:
            return problem_in(int(batch.numbers[at]), ids[at].as_py() or None, column, cell)

        def all_of(bad: dict[str, BadCells]) -> list[Problem]:
            return [
                problem(column, at, cell)
                for column, cells in bad.items()
                for at, cell in cells.items()
            ]

        result.problems.add(*all_of(bad))
        for at, prompt in self._suspects(rows["prompt"]):
            tokens = self._count_tokens(prompt)
            if tokens > self._max_tokens:
                allowed = f"has about {tokens} tokens; EvoLink takes at most {self._max_tokens}"
                result.problems.add(problem("prompt", at, Bad(shown(prompt), allowed)))
            elif tokens > WARN_TOKENS:
                allowed = (
                    f"has about {tokens} tokens; above {WARN_TOKENS} the model may not read all"
                )
                result.warnings.add(problem("prompt", at, Bad(shown(prompt), allowed)))
        result.problems.add(*all_of(result.bad_keys))

    def _suspects(self, prompts: pa.Array) -> list[tuple[int, str]]:
        """Return the prompts that may have too many tokens, each with its place."""
        if self._count_tokens is not estimate_tokens:
            return [(at, prompt) for at, prompt in enumerate(prompts.to_pylist()) if prompt]
        free = min(self._max_tokens, WARN_TOKENS)
        # The estimate never exceeds the number of bytes, so most prompts need not be counted.
        over = pc.greater(pc.binary_length(prompts), free).fill_null(False)
        places = np.flatnonzero(as_mask(over))
        if len(places):
            bounds = at_most_tokens(prompts.take(pa.array(places)))
            places = places[as_mask(pc.greater(bounds, free))]
        return [(int(at), prompts[int(at)].as_py()) for at in places]


def _in_threads(work: Callable[..., _T], items: Iterable[tuple[Any, ...]]) -> Iterator[_T]:
    """Yield ``work(*item)`` for each item, in their order, computed a few ahead."""
    with ThreadPoolExecutor(_THREADS) as pool:
        ahead: deque[Future[_T]] = deque()
        try:
            for item in items:
                ahead.append(pool.submit(work, *item))
                if len(ahead) > _THREADS:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()


def _batch_of(columns: _Columns, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    if not schema.names:
        # A batch without columns has no length of its own.
        return pa.RecordBatch.from_arrays([pa.nulls(rows)], names=[""]).select([])
    arrays = [columns[column.name].cast(column.type) for column in schema]
    return pa.RecordBatch.from_arrays(arrays, schema=schema)

"""Pass once over a prompt table: choose the rows, check them, yield them batch by batch.

Whole columns at a time, several batches at once in threads: Arrow and DuckDB let go of the
interpreter. Only a batch with something in it that is not plainly right is read cell by cell
(``exact``), to say what is wrong, or to find that nothing is.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster import redact
from krea_dagster.errors import ConfigError
from krea_dagster.models import QUALITIES, SEED_MAX, SIZES
from krea_dagster.prompts import validate_columns
from krea_dagster.prompts.cells import Bad, plain_array, shown, text_cells
from krea_dagster.prompts.duplicates import find_doubles, hashes_of_ids
from krea_dagster.prompts.files import open_files
from krea_dagster.prompts.identity import Hasher, buckets, derived_prompt_ids
from krea_dagster.prompts.murmur import Numbers, hashes_of_texts
from krea_dagster.prompts.partitioning import HashPartitions, PartitionBy
from krea_dagster.prompts.pushdown import row_group_filter
from krea_dagster.prompts.requests import MAX_IMAGES, Defaults
from krea_dagster.prompts.table_schema import Layout, Problems, problem_in
from krea_dagster.prompts.tokens import WARN_TOKENS, at_most_tokens, estimate_tokens
from krea_dagster.prompts.validate_cells import ExactRows
from krea_dagster.prompts.validate_columns import BadCells

#: A row with the defaults filled in, as ``requests.PromptRow`` has it. A null seed is drawn.
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
    """Some rows (``ROWS_SCHEMA``), and beside them the columns that are carried along."""

    rows: pa.RecordBatch
    carried: pa.RecordBatch


@dataclass(frozen=True)
class _Batch:
    """Some rows of the table with their numbers; ``keys`` are null where a cell is no key."""

    numbers: npt.NDArray[np.int64]
    columns: _Columns
    keys: pa.Array | None = None
    bad_keys: BadCells | None = None

    def filter(self, mask: npt.NDArray[np.bool_]) -> _Batch:
        if mask.all():
            return self
        kept = pa.array(mask)
        bad = self.bad_keys
        return _Batch(
            self.numbers[mask],
            {name: array.filter(kept) for name, array in self.columns.items()},
            None if self.keys is None else self.keys.filter(kept),
            None if bad is None else {name: _chosen(cells, mask) for name, cells in bad.items()},
        )


@dataclass
class _Looked:
    """What was found in one batch."""

    problems: Problems = field(default_factory=Problems)
    warnings: Problems = field(default_factory=Problems)
    chunk: Chunk | None = None
    #: Of ``hash:N``: the hash of every prompt_id, in whatever partition.
    hashes: Numbers = field(default_factory=lambda: np.empty(0, np.uint64))


class Scan:
    """One pass over a table: yields chunks, and raises at its end.

    Nothing of a pass that raises may be used.
    """

    def __init__(
        self,
        source: str,
        by: PartitionBy,
        wanted: frozenset[str] | None,
        *,
        defaults: Defaults,
        count_tokens: Callable[[str], int],
        max_prompt_tokens: int,
        carry: bool,
        hasher: Hasher,
    ) -> None:
        self._source = source
        self._by = by
        self._defaults = defaults
        self._count_tokens = count_tokens
        self._max_tokens = max_prompt_tokens
        self._wanted = wanted
        self._wanted_values = None if wanted is None else pa.array(sorted(wanted), pa.string())
        self._hasher = hasher
        self._problems = Problems()
        self.warnings = Problems()
        self._layout = Layout.of(by, open_files(source), self._problems)
        self.carried_schema = self._layout.carried if carry else pa.schema([])
        self._names = pa.array(by.keys() if isinstance(by, HashPartitions) else [], pa.string())
        self._wanted_buckets = (
            None
            if self._wanted_values is None
            else _mask(pc.is_in(self._names, value_set=self._wanted_values))
        )

    def map(self, use: Callable[[Chunk], _T]) -> Iterator[_T]:
        """Yield what ``use`` makes of each chunk, in their order; it is called in threads."""

        def work(name: str, first: int, batch: pa.RecordBatch) -> tuple[_Looked, _T | None]:
            try:
                looked = self._look(first, batch)
            except (pa.ArrowException, ValueError, OverflowError) as error:
                raise ConfigError(
                    f"{name} has a column that cannot be carried along: {redact.text(str(error))}; "
                    "leave it out, or write it in a plain type, the same in all files"
                ) from error
            return looked, None if looked.chunk is None else use(looked.chunk)

        files = self._layout.files
        has_ids = "prompt_id" in self._layout.recognised
        if has_ids and not isinstance(self._by, HashPartitions):
            find_doubles(hashes_of_ids(files), files, self._problems)
        hashes: list[Numbers] = []
        for looked, made in _in_threads(work, self._batches()):
            hashes.append(looked.hashes)
            self._problems.add(*looked.problems.first, count=looked.problems.count)
            self.warnings.add(*looked.warnings.first, count=looked.warnings.count)
            if made is not None and not self._problems.count:
                yield made
        # hash:N has looked at every prompt_id by now.
        find_doubles(hashes, files, self._problems)
        self._problems.raise_for(self._source)

    def _batches(self) -> Iterator[tuple[str, int, pa.RecordBatch]]:
        layout = self._layout
        names = [*layout.recognised, *self.carried_schema.names]
        names += layout.partition_columns
        for file in layout.files:
            keep = None
            if layout.partition_columns and self._wanted is not None:
                keep = row_group_filter(self._by, file.schema, self._wanted)
            for first, batch in file.batches(names, keep):
                yield file.name, first, batch

    def _look(self, first: int, read: pa.RecordBatch) -> _Looked:
        """Check the chosen rows of a batch; they are not given where there is a problem."""
        looked = _Looked()
        numbers = np.arange(first, first + read.num_rows)
        # Without their encodings, but for dictionaries: of those only the chosen rows are.
        given = {name: read.column(name) for name in read.schema.names}
        whole = {
            name: array if pa.types.is_dictionary(array.type) else plain_array(array)
            for name, array in given.items()
        }
        batch = self._keyed(_Batch(numbers, whole), looked)
        plain = {name: plain_array(array) for name, array in batch.columns.items()}
        batch = replace(batch, columns=plain)
        rows = self._rows(batch, looked) if len(batch.numbers) else None
        if rows is None or looked.problems.count:
            return looked
        carried = batch.columns
        if isinstance(self._by, HashPartitions) and batch.keys is None:
            # The prompt_id was drawn from the row, and the partition is drawn from that.
            keys = self._name(buckets(self._by, hashes_of_texts(rows["prompt_id"])))
            rows["partition_key"] = keys
            if self._wanted_values is not None:
                mask = pc.is_in(keys, value_set=self._wanted_values)
                rows = {name: array.filter(mask) for name, array in rows.items()}
                carried = {name: carried[name].filter(mask) for name in self.carried_schema.names}
        if "partition_key" not in rows:  # its column cannot serve: a problem of the table
            return looked
        looked.chunk = Chunk(
            pa.RecordBatch.from_arrays(
                [rows[name] for name in ROWS_SCHEMA.names], schema=ROWS_SCHEMA
            ),
            _carried(carried, self.carried_schema, len(rows["row"])),
        )
        return looked

    # -- which partition ----------------------------------------------------------------------

    def _name(self, numbers: npt.NDArray[np.uint32]) -> pa.Array:
        return self._names.take(pa.array(numbers))

    def _keyed(self, batch: _Batch, looked: _Looked) -> _Batch:
        """Say which partition each row belongs to, and keep the rows of those that are wanted."""
        if self._layout.partition_columns and not isinstance(self._by, HashPartitions):
            keys, bad = validate_columns.partition_keys(self._by, batch.columns)
            batch = _Batch(batch.numbers, batch.columns, keys, bad)
            if self._wanted_values is None:
                return batch
            return batch.filter(_mask(pc.is_in(keys, value_set=self._wanted_values)))
        if not isinstance(self._by, HashPartitions) or "prompt_id" not in batch.columns:
            return batch
        return self._bucketed(batch, self._by, looked)

    def _bucketed(self, batch: _Batch, by: HashPartitions, looked: _Looked) -> _Batch:
        ids = validate_columns.texts(batch.columns["prompt_id"])
        if ids is None:
            cells = text_cells(batch.columns["prompt_id"])
            ids = pa.array([cell if isinstance(cell, str) else None for cell in cells], pa.string())
        hashes = hashes_of_texts(ids)
        usable = _mask(pc.not_equal(ids, "").fill_null(False))
        looked.hashes = hashes if usable.all() else hashes[usable]
        numbers = buckets(by, hashes)
        unkeyed = _mask(ids.is_null())
        if self._wanted_buckets is not None:
            # A row without a usable prompt_id may belong to any of them.
            mask = self._wanted_buckets[numbers] | unkeyed
            if not mask.any():
                return _Batch(batch.numbers[:0], {})
            numbers = numbers[mask]
            batch = batch.filter(mask)
        return _Batch(batch.numbers, batch.columns, self._name(numbers))

    # -- what is in the rows ------------------------------------------------------------------

    def _rows(self, batch: _Batch, looked: _Looked) -> _Columns | None:
        """Return the recognised columns, or None where there is a problem."""
        plain = self._plain(batch.columns, len(batch.numbers))
        if plain is not None and batch.bad_keys is None:
            ids = plain["prompt_id"]
            for at, bad in self._too_long(self._long(plain["prompt"]), batch, ids, looked):
                who = ids[at].as_py() or None
                looked.problems.add(problem_in(int(batch.numbers[at]), who, "prompt", bad))
            return self._completed(plain, batch)
        exact = ExactRows(batch.columns, batch.numbers.tolist(), self._defaults)
        prompts = enumerate(exact.columns["prompt"])
        texts = [(at, prompt) for at, prompt in prompts if prompt is not None]
        ids = pa.array(exact.columns["prompt_id"], pa.string())
        for at, bad in self._too_long(texts, batch, ids, looked):
            exact.add("prompt", at, bad)
        for name, cells in (batch.bad_keys or {}).items():
            exact.add_bad(name, cells)
        looked.problems.add(*exact.problems())
        if looked.problems.count:
            return None
        kinds = {name: ROWS_SCHEMA.field(name).type for name in exact.columns}
        found = {name: pa.array(cells, kinds[name]) for name, cells in exact.columns.items()}
        return self._completed(found, batch)

    def _plain(self, given: _Columns, rows: int) -> _Columns | None:
        """Return the recognised columns where all is plainly right; absent ids are empty."""
        defaults = self._defaults
        prompts = validate_columns.texts(given["prompt"]) if "prompt" in given else None
        if prompts is None or prompts.null_count or _any(_is_blank(prompts)):
            return None
        ids = (
            validate_columns.texts(given["prompt_id"]) if "prompt_id" in given else _same("", rows)
        )
        if ids is None or ids.null_count or ("prompt_id" in given and _any(pc.equal(ids, ""))):
            return None
        found: _Columns = {"prompt": prompts, "prompt_id": ids}
        choices: tuple[tuple[str, tuple[str, ...], str], ...] = (
            ("size", SIZES, defaults.size),
            ("quality", QUALITIES, defaults.quality),
        )
        for name, allowed, default in choices:
            values = validate_columns.texts(given[name]) if name in given else _same(default, rows)
            if values is None:
                return None
            found[name] = values.fill_null(default)
            if not _all(pc.is_in(found[name], value_set=pa.array(allowed, pa.string()))):
                return None
        numbers: tuple[tuple[str, int, int, int], ...] = (
            ("seed", 0, SEED_MAX, 0),
            ("num_images", 1, MAX_IMAGES, defaults.num_images),
        )
        for name, least, most, default_number in numbers:
            values = (
                validate_columns.wholes(given[name])
                if name in given
                else _same(default_number, rows)
            )
            if values is None:
                return None
            found[name] = values.fill_null(default_number)
            if not _all(
                pc.and_(pc.greater_equal(found[name], least), pc.less_equal(found[name], most))
            ):
                return None
        checks = (
            validate_columns.flags(given["nsfw_check"])
            if "nsfw_check" in given
            else _same(defaults.nsfw_check, rows)
        )
        if checks is None:
            return None
        found["nsfw_check"] = checks.fill_null(defaults.nsfw_check)
        return found

    def _completed(self, plain: _Columns, batch: _Batch) -> _Columns:
        """Add what follows from the other columns."""
        seeds = plain["seed"]
        rows = {
            **plain,
            "row": pa.array(batch.numbers),
            "seed": pc.if_else(pc.equal(seeds, 0), pa.scalar(None, pa.int64()), seeds),
        }
        if "prompt_id" not in self._layout.recognised:
            rows["prompt_id"] = derived_prompt_ids(
                self._hasher,
                prompts=plain["prompt"],
                sizes=plain["size"],
                qualities=plain["quality"],
                seeds=rows["seed"],
                nsfw_checks=plain["nsfw_check"],
            )
        if batch.keys is not None:
            rows["partition_key"] = batch.keys
        return rows

    # -- lengths ------------------------------------------------------------------------------

    def _long(self, prompts: pa.Array) -> list[tuple[int, str]]:
        """Return the prompts that may have too many tokens, each with its place."""
        if self._count_tokens is not estimate_tokens:
            return list(enumerate(prompts.to_pylist()))
        free = min(self._max_tokens, WARN_TOKENS)
        # The estimate is never above the number of bytes: most prompts need no counting.
        long = np.flatnonzero(_mask(pc.greater(pc.binary_length(prompts), free)))
        if len(long):
            bounds = at_most_tokens(prompts.take(pa.array(long)))
            long = long[_mask(pc.greater(bounds, free))]
        return [(int(at), prompts[int(at)].as_py()) for at in long]

    def _too_long(
        self, suspects: Iterable[tuple[int, str]], batch: _Batch, ids: pa.Array, looked: _Looked
    ) -> Iterator[tuple[int, Bad]]:
        """Yield what is wrong with prompts that are too long; warn of those that are nearly."""
        count, most = self._count_tokens, self._max_tokens
        # As in ``_long``: these are free where nothing else has been ruled out.
        free = min(most, WARN_TOKENS) if count is estimate_tokens else -1
        for at, prompt in suspects:
            if prompt.isascii() and len(prompt) <= free:
                continue
            tokens = count(prompt)
            if tokens > most:
                said = f"has about {tokens} tokens; EvoLink takes at most {most}"
                yield at, Bad(shown(prompt), said)
            elif tokens > WARN_TOKENS:
                said = f"has about {tokens} tokens; above {WARN_TOKENS} the model may not read all"
                who = ids[at].as_py() or None
                looked.warnings.add(
                    problem_in(int(batch.numbers[at]), who, "prompt", Bad(shown(prompt), said))
                )


def _in_threads(work: Callable[..., _T], items: Iterable[tuple[Any, ...]]) -> Iterator[_T]:
    """Yield what ``work`` makes of each item, in their order, a few ahead of who asks."""
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


def _carried(columns_: _Columns, schema: pa.Schema, rows: int) -> pa.RecordBatch:
    if not schema.names:
        # A batch without columns has no length of its own.
        return pa.RecordBatch.from_arrays([pa.nulls(rows)], names=[""]).select([])
    arrays = []
    for column in schema:
        array = columns_[column.name]
        arrays.append(array if array.type == column.type else array.cast(column.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def _chosen(cells: list[str | Bad], mask: npt.NDArray[np.bool_]) -> list[str | Bad]:
    return [cells[at] for at in np.flatnonzero(mask)]


def _is_blank(prompts: pa.Array) -> pa.Array:
    return pc.or_(pc.equal(prompts, ""), pc.utf8_is_space(prompts))


def _same(value: str | int | bool, rows: int) -> pa.Array:
    return pa.repeat(value, rows)


def _mask(flags: Any) -> npt.NDArray[np.bool_]:
    return np.asarray(flags.to_numpy(zero_copy_only=False), np.bool_)


def _any(flags: Any) -> bool:
    return bool(pc.any(flags).as_py())


def _all(flags: Any) -> bool:
    return pc.all(flags).as_py() is not False

"""Pass once over a prompt table: choose the rows, check them, yield them batch by batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import ConfigError, Problem
from krea_dagster.models import QUALITIES, SEED_MAX, SIZES
from krea_dagster.prompts.cells import (
    Bad,
    Cells,
    column_keys,
    day_keys,
    flag_cells,
    plain_array,
    shown,
    text_cells,
    whole_cells,
)
from krea_dagster.prompts.layout import MAX_PROBLEMS, Layout, Problems, problem_in
from krea_dagster.prompts.partitioning import DayPartitions, HashPartitions, PartitionBy
from krea_dagster.prompts.pushdown import row_group_filter
from krea_dagster.prompts.requests import MAX_IMAGES, Defaults, PromptRow, derived_prompt_id
from krea_dagster.prompts.source import TableFile, open_files
from krea_dagster.prompts.tokens import WARN_TOKENS, estimate_tokens

T = TypeVar("T", bound=Hashable)


class Scan:
    """One pass over a table: yields ``(rows, carried columns)``, and raises at its end.

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
    ) -> None:
        self._source = source
        self._by = by
        self._defaults = defaults
        self._count_tokens = count_tokens
        self._max_tokens = max_prompt_tokens
        self._wanted = wanted
        self._problems = Problems()
        self.warnings = Problems()
        self._layout = Layout.of(by, open_files(source), self._problems)
        self.carried_schema = self._layout.carried if carry else pa.schema([])

    def __iter__(self) -> Iterator[tuple[list[PromptRow], pa.RecordBatch]]:
        layout = self._layout
        columns = [*layout.recognised, *self.carried_schema.names]
        if layout.partition_column is not None:
            columns.append(layout.partition_column)
        if "prompt_id" in layout.recognised:
            find_doubles(layout.files, self._problems)
        for file in layout.files:
            keep = None
            if layout.partition_column is not None and self._wanted is not None:
                kind = file.schema.field(layout.partition_column).type
                keep = row_group_filter(self._by, kind, self._wanted)
            for first, batch in file.batches(columns, keep):
                numbered = _Batch(batch, list(range(first, first + batch.num_rows)))
                try:
                    chunk = self._chunk(numbered)
                except pa.ArrowException as error:
                    raise ConfigError(
                        f"{file.name} has a column that cannot be carried along: {error}; "
                        "leave it out, or write it in a plain type, the same in all files"
                    ) from error
                yield chunk
        self._problems.raise_for(self._source)

    def _chunk(self, batch: _Batch) -> tuple[list[PromptRow], pa.RecordBatch]:
        by, wanted, layout = self._by, self._wanted, self._layout
        keys: list[str | Bad] | None = None
        if layout.partition_column is not None:
            keys = partition_cells(by, batch.columns.column(layout.partition_column))
            if wanted is not None:
                chosen = [key in wanted for key in keys]
                batch, keys = batch.filter(chosen), _chosen(keys, chosen)
        elif isinstance(by, HashPartitions) and "prompt_id" in layout.recognised:
            ids = text_cells(batch.columns.column("prompt_id"))
            unkeyed = Bad("")
            keys = [by.key_for(id_) if isinstance(id_, str) else unkeyed for id_ in ids]
            if wanted is not None:
                # A row without a usable prompt_id may belong to any of them.
                chosen = [key in wanted or key is unkeyed for key in keys]
                batch, keys = batch.filter(chosen), _chosen(keys, chosen)

        rows = self._rows(batch, keys)
        if wanted is not None and keys is None:
            chosen = [row.partition_key in wanted for row in rows]
            rows = _chosen(rows, chosen)
            if not self._problems.count:
                batch = batch.filter(chosen)
        if self._problems.count:
            return [], _cast(batch.columns.slice(0, 0), self.carried_schema)
        return rows, _cast(batch.columns, self.carried_schema)

    def _rows(self, batch: _Batch, keys: list[str | Bad] | None) -> list[PromptRow]:
        """Return the rows of a batch; none once there is a problem, but all are checked."""
        defaults = self._defaults
        checks = _Checks(batch)
        prompts = checks.cells("prompt", text_cells, _is_prompt, "")
        ids = checks.cells("prompt_id", text_cells, bool, "")
        sizes = checks.cells("size", text_cells, SIZES.__contains__, defaults.size)
        qualities = checks.cells("quality", text_cells, QUALITIES.__contains__, defaults.quality)
        seeds = checks.cells("seed", whole_cells, _is_seed, 0)
        flags = checks.cells("nsfw_check", flag_cells, _is_flag, defaults.nsfw_check)
        counts = checks.cells("num_images", whole_cells, _is_count, defaults.num_images)
        self._check_lengths(checks, prompts, ids)
        if keys is not None and self._layout.partition_column is not None:
            checks.add_bad(self._layout.partition_column, keys)

        self._problems.add(*checks.problems(ids))
        if self._problems.count:
            return []
        has_ids = "prompt_id" in self._layout.recognised
        rows: list[PromptRow] = []
        for at, number in enumerate(batch.numbers):
            prompt, size, quality, flag = prompts[at], sizes[at], qualities[at], flags[at]
            seed = seeds[at] or None
            prompt_id = (
                ids[at]
                if has_ids
                else derived_prompt_id(
                    prompt=prompt, size=size, quality=quality, seed=seed, nsfw_check=flag
                )
            )
            key = self._by.key_for(prompt_id) if keys is None else keys[at]  # type: ignore[union-attr]  # only hash:N leaves the key to the prompt_id
            rows.append(
                PromptRow(
                    number, prompt_id, prompt, size, quality, seed, flag, counts[at], str(key)
                )
            )
        return rows

    def _check_lengths(
        self, checks: _Checks, prompts: Sequence[str | None], ids: Sequence[str | None]
    ) -> None:
        count, most = self._count_tokens, self._max_tokens
        # The estimate is never above the number of bytes: most prompts need no counting.
        free = min(most, WARN_TOKENS) if count is estimate_tokens else -1
        for at, prompt in enumerate(prompts):
            if prompt is None or (prompt.isascii() and len(prompt) <= free):
                continue
            tokens = count(prompt)
            if tokens > most:
                said = f"has about {tokens} tokens; EvoLink takes at most {most}"
                checks.add("prompt", at, Bad(shown(prompt), said))
            elif tokens > WARN_TOKENS:
                said = f"has about {tokens} tokens; above {WARN_TOKENS} the model may not read all"
                row = checks.batch.numbers[at]
                self.warnings.add(
                    problem_in(row, ids[at] or None, "prompt", Bad(shown(prompt), said))
                )


@dataclass(frozen=True)
class _Batch:
    """Some rows of the table, with their numbers."""

    columns: pa.RecordBatch
    numbers: list[int]

    def filter(self, chosen: list[bool]) -> _Batch:
        if all(chosen):
            return self
        columns = [plain_array(column) for column in self.columns.columns]
        batch = pa.RecordBatch.from_arrays(columns, names=self.columns.schema.names)
        mask = pa.array(chosen, pa.bool_())
        return _Batch(batch.filter(mask), _chosen(self.numbers, chosen))


class _Checks:
    """Reads the columns of one batch and notes what is wrong in them."""

    def __init__(self, batch: _Batch) -> None:
        self.batch = batch
        self._wrong: list[tuple[int, str, Bad]] = []

    def cells(
        self,
        column: str,
        read: Callable[[pa.Array], Cells[T]],
        right: Callable[[T], bool],
        default: T,
    ) -> list[Any]:
        """Read a column, with the default where a cell, or the column, is missing.

        A cell that is wrong is noted, and stands as None.
        """
        if column not in self.batch.columns.schema.names:
            return [default] * len(self.batch.numbers)
        # Each different value is looked at once.
        found = read(self.batch.columns.column(column))
        values = set(found)
        kept = {cell: cell for cell in values if not isinstance(cell, Bad | None) and right(cell)}
        if len(kept) == len(values):
            return found
        required = column in {"prompt", "prompt_id"}
        for at, cell in enumerate(found):
            if isinstance(cell, Bad):
                self.add(column, at, cell)
            elif cell is None and required:
                self.add(column, at, Bad("missing"))
            elif cell is not None and cell not in kept:
                self.add(column, at, Bad(shown(cell)))
        return [
            (None if required else default)
            if cell is None
            else (None if isinstance(cell, Bad) else kept.get(cell))
            for cell in found
        ]

    def add(self, column: str, at: int, bad: Bad) -> None:
        self._wrong.append((at, column, bad))

    def add_bad(self, column: str, cells: Iterable[object]) -> None:
        for at, cell in enumerate(cells):
            if isinstance(cell, Bad):
                self.add(column, at, cell)

    def problems(self, ids: Sequence[str | None]) -> list[Problem]:
        numbers = self.batch.numbers
        return [
            problem_in(numbers[at], ids[at] or None, column, bad) for at, column, bad in self._wrong
        ]


def _is_prompt(prompt: str) -> bool:
    return bool(prompt.strip())


def _is_seed(seed: int) -> bool:
    return 0 <= seed <= SEED_MAX


def _is_flag(_flag: bool) -> bool:
    return True


def _is_count(count: int) -> bool:
    return 1 <= count <= MAX_IMAGES


def partition_cells(by: PartitionBy, array: pa.Array) -> list[str | Bad]:
    """Read the partition column of a batch as keys."""
    return day_keys(array) if isinstance(by, DayPartitions) else column_keys(array)


def _chosen(values: Sequence[T], chosen: Iterable[bool]) -> list[T]:
    return [value for value, keep in zip(values, chosen, strict=True) if keep]


def _cast(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    arrays = []
    for column in schema:
        array = plain_array(batch.column(column.name))
        arrays.append(array if array.type == column.type else array.cast(column.type))
    return pa.RecordBatch.from_arrays(arrays, schema=schema)


def find_doubles(files: Sequence[TableFile], problems: Problems) -> None:
    """Note every row whose prompt_id an earlier row has, over the whole table.

    First by eight bytes a row (Python's hash, whose seed no table can know), so that a large
    table fits in memory; the texts are read again only where two hashes agree.
    """
    hashes = [
        pa.array(map(hash, _ids(batch)), pa.int64())
        for file in files
        for _, batch in file.batches(["prompt_id"])
    ]
    counted = pc.value_counts(pa.chunked_array(hashes, pa.int64()))
    many = counted.filter(pc.greater(counted.field("counts"), 1))
    if not len(many):
        return
    suspects = set(many.field("values").to_pylist())
    total = pc.sum(many.field("counts")).as_py() - len(many)
    first_rows: dict[str, int] = {}
    found: list[Problem] = []
    for file in files:
        for first, batch in file.batches(["prompt_id"]):
            cells = text_cells(batch.column(0))
            for row, cell in enumerate(cells, first):
                if not isinstance(cell, str) or not cell or hash(cell) not in suspects:
                    continue
                if cell in first_rows:
                    said = f"must be unique, but row {first_rows[cell]} has it too"
                    found.append(problem_in(row, cell, "prompt_id", Bad(shown(cell), said)))
                    if len(found) == MAX_PROBLEMS:
                        problems.add(*found, count=total)
                        return
                else:
                    first_rows[cell] = row
    problems.add(*found)


def _ids(batch: pa.RecordBatch) -> list[str]:
    # Empty and unreadable ones are problems of their own rows.
    return [cell for cell in text_cells(batch.column(0)) if isinstance(cell, str) and cell]

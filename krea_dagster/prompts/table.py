"""Read the partitions of a prompt table, and say what is wrong by row and column.

A table streams by in batches. Only the columns that are needed are read, and only the row
groups that can hold the partitions that are asked for; the rows that are kept are those asked
for. All that is wrong is collected and raised as one error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import ConfigError, Problem
from krea_dagster.prompts import validate_columns
from krea_dagster.prompts.cells import Bad, shown
from krea_dagster.prompts.files import open_files
from krea_dagster.prompts.identity import Hasher
from krea_dagster.prompts.partitioning import (
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
)
from krea_dagster.prompts.plan import Plan, Planner
from krea_dagster.prompts.requests import Attempts, Defaults, PromptRow
from krea_dagster.prompts.scan import Scan
from krea_dagster.prompts.table_schema import (
    RECOGNISED_COLUMNS,
    RESERVED_COLUMNS,
    Layout,
    Problems,
    problem_in,
)
from krea_dagster.prompts.tokens import MAX_TOKENS, estimate_tokens

__all__ = ["RECOGNISED_COLUMNS", "RESERVED_COLUMNS", "PromptRows", "PromptTable"]


@dataclass(frozen=True)
class PromptRows:
    """Rows of the prompt table, in its order, and their further columns.

    ``carried`` has one row for each of ``rows``, with every column that is not recognised;
    dictionary and view encodings are undone. ``warnings`` names the first of the rows whose
    prompt is so long that the model may not read all of it; ``warning_count`` is their number.
    """

    rows: tuple[PromptRow, ...]
    carried: pa.Table
    warnings: tuple[Problem, ...] = ()
    warning_count: int = 0

    def by_partition(self) -> dict[str, PromptRows]:
        """Return the rows of each partition that has some, by key, sorted; without warnings."""
        keys = pa.array([row.partition_key for row in self.rows], pa.string())
        parts: dict[str, list[PromptRow]] = {}
        for row in self.rows:
            parts.setdefault(row.partition_key, []).append(row)
        return {
            key: PromptRows(tuple(parts[key]), self.carried.filter(pc.equal(keys, key)))
            for key in sorted(parts)
        }


@dataclass(frozen=True)
class PromptTable:
    """A prompt table: a Parquet file, a folder of them, or the URL of either.

    The table is read afresh by every method. All raise
    :class:`~krea_dagster.errors.ConfigError` where a file cannot be found or read, and
    :class:`~krea_dagster.errors.PromptTableError` where its content cannot be used.

    ``count_tokens`` counts the tokens of a prompt; more than ``max_prompt_tokens`` is a problem.
    ``name`` tells it from other tables that share a journal; empty: its source does.
    """

    source: str
    partition_by: PartitionBy
    defaults: Defaults = field(default_factory=Defaults)
    count_tokens: Callable[[str], int] = estimate_tokens
    max_prompt_tokens: int = MAX_TOKENS
    name: str = ""

    def partition_keys(self) -> list[str]:
        """Return the keys of all partitions, sorted.

        Of ``hash:N`` these are all N, and nothing is read. Else the partition column is read.
        """
        if isinstance(self.partition_by, HashPartitions):
            return self.partition_by.keys()
        return sorted(self._keys_in_table())

    def first_time(self) -> str | None:
        """Return the first day, week or month, as its key; None for an empty table.

        Raises ConfigError for partitions that are not by time.
        """
        by = self.partition_by
        if not isinstance(by, TimePartitions | MultiPartitions):
            raise ConfigError(f"partitions by {by} have no first day; use day:NAME")
        keys = self._keys_in_table()
        if isinstance(by, MultiPartitions):
            keys = {key.rpartition(MultiPartitions.BAR)[2] for key in keys}
        return min(keys, default=None)

    def row_count(self) -> int:
        """Return how many rows the table has, as the footers of its files say."""
        return sum(file.row_count for file in open_files(self.source))

    def read(self, keys: Sequence[str] | None = None) -> PromptRows:
        """Return the rows of these partitions, or of all, validated, in table order.

        A key without rows gives none. Rows of other partitions are not checked, but for
        prompt_ids, which are unique in the whole table, and for cells that decide the
        partition. Raises ConfigError for a key that this partitioning cannot have.
        """
        rows: list[PromptRow] = []
        batches: list[pa.RecordBatch] = []
        with closing(Hasher()) as hasher:
            scan = self.scan(self._wanted(keys), hasher, carry=True)
            for chunk in scan.map(lambda chunk: chunk):
                rows += (PromptRow(**row) for row in chunk.rows.to_pylist())
                batches.append(chunk.carried)
        carried = _joined(batches, scan.carried_schema, len(rows))
        warnings = scan.warnings
        return PromptRows(tuple(rows), carried, tuple(warnings.first), warnings.count)

    def plan(
        self,
        keys: Sequence[str] | None = None,
        attempts: Attempts | None = None,
        *,
        drawn: Collection[tuple[str, int]] = (),
        keep: bool = True,
    ) -> Plan:
        """Return the images that the rows of these partitions ask for, or of all.

        The rows are checked as by :meth:`read`, whole columns at a time, and are kept on disk.
        ``drawn`` are the (prompt_id, sample) whose seed is drawn although the row fixes one, where
        another image was asked for. Without ``keep`` the plan knows the request keys and no more.
        """
        return self._plan(keys, attempts, drawn, keep=keep, carry=True)

    def versions(
        self,
        keys: Sequence[str] | None = None,
        attempts: Attempts | None = None,
        *,
        drawn: Collection[tuple[str, int]] = (),
    ) -> dict[str, str]:
        """Return the data version of these partitions, or of all, by key, sorted.

        It hangs on the request keys of the partition's rows alone
        (:func:`~krea_dagster.prompts.requests.partition_version`). Partitions of ``hash:N`` and
        those that are named have one also where they hold no row.
        """
        with closing(self._plan(keys, attempts, drawn, keep=False, carry=False)) as plan:
            return plan.versions()

    def _plan(
        self,
        keys: Sequence[str] | None,
        attempts: Attempts | None,
        drawn: Collection[tuple[str, int]],
        *,
        keep: bool,
        carry: bool,
    ) -> Plan:
        wanted = self._wanted(keys)
        named = wanted
        if named is None and isinstance(self.partition_by, HashPartitions):
            named = frozenset(self.partition_by.keys())
        with closing(Hasher()) as hasher:
            scan = self.scan(wanted, hasher, carry=carry)
            planner = Planner(scan.carried_schema, attempts, hasher, drawn=drawn, keep=keep)
            try:
                for planned in scan.map(planner.planned):
                    planner.add(planned)
                warnings = scan.warnings
                return planner.plan(named or (), tuple(warnings.first), warnings.count)
            except BaseException:
                planner.close()
                raise

    def scan(self, wanted: frozenset[str] | None, hasher: Hasher, *, carry: bool) -> Scan:
        """Return a pass over the rows of these partitions, or all; ``carry`` adds columns."""
        return Scan(
            self.source,
            self.partition_by,
            wanted,
            defaults=self.defaults,
            count_tokens=self.count_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            carry=carry,
            hasher=hasher,
        )

    def _wanted(self, keys: Sequence[str] | None) -> frozenset[str] | None:
        if keys is None:
            return None
        if isinstance(keys, str):
            raise TypeError("keys is a sequence of partition keys, not one text")
        for key in keys:
            if not self.partition_by.has_key(key):
                raise ConfigError(f"{shown(key)} is no partition of {self.partition_by}")
        return frozenset(keys)

    def _keys_in_table(self) -> set[str]:
        problems = Problems()
        by = self.partition_by
        layout = Layout.of(by, open_files(self.source), problems)
        keys: set[str] = set()
        if layout.partition_columns and not isinstance(by, HashPartitions):
            for file in layout.files:
                for first, batch in file.batches(layout.partition_columns):
                    given = {name: batch.column(name) for name in layout.partition_columns}
                    found, bad_cells = validate_columns.partition_keys(by, given)
                    keys.update(found.unique().drop_null().to_pylist())
                    for name, cells in (bad_cells or {}).items():
                        for row, cell in enumerate(cells, first):
                            if isinstance(cell, Bad):
                                problems.add(problem_in(row, None, name, cell))
        problems.raise_for(self.source)
        return keys


def _joined(batches: list[pa.RecordBatch], schema: pa.Schema, rows: int) -> pa.Table:
    if schema.names:
        return pa.Table.from_batches(batches, schema)
    # A table without columns has no length of its own: make one, then drop its only column.
    return pa.table({"": pa.nulls(rows)}).select([])

"""The prompt table: its partitions, their plans and their data versions.

A table streams by in batches. Only the needed columns are read, and only the row groups that can
hold the wanted partitions. All problems are collected and raised as one error.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace

from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import Options
from krea_dagster.prompts.cells import shown
from krea_dagster.prompts.column_names import parse_prompt_columns
from krea_dagster.prompts.columns import partition_keys
from krea_dagster.prompts.kinds import kind_by_name
from krea_dagster.prompts.partitioning import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
)
from krea_dagster.prompts.plan import Attempts, Plan, Planner
from krea_dagster.prompts.requests import Defaults
from krea_dagster.prompts.scan import Scan
from krea_dagster.prompts.sources import (
    Kept,
    Reading,
    Source,
    place_of,
    reading_of,
    shown_source,
    source_of,
)
from krea_dagster.prompts.table_schema import Layout, Problems, problem_in
from krea_dagster.prompts.tokens import MAX_TOKENS, estimate_tokens
from krea_dagster.prompts.united import united


@dataclass(frozen=True)
class PromptTable:
    """A prompt table. Every method reads a path again, and calls a function again.

    Args:
        source: A Parquet file, a folder (all ``.parquet`` and ``.pq`` files in it and below), or
            the URL of either, of any kind that fsspec knows; a value: a table of pandas, Polars,
            Arrow or DuckDB, or a list of rows, which is read once; or a function without arguments
            that returns a path or a value.
        partition_by: How rows are divided into partitions; see :func:`parse_partition_by`.
        defaults: The settings of rows that do not say theirs.
        count_tokens: Counts the tokens of a prompt.
        max_prompt_tokens: A prompt with more tokens is a problem of its row.
        name: Distinguishes tables that share a journal. Empty: the path ``source`` does.
        storage_options: How fsspec opens a URL. A value ``{"env": "NAME"}`` names a variable.
        prompt_columns: Columns that are read under another name (``text=prompt``), and columns that
            are only copied to the manifest although their names suggest more (``n``).

    Raises:
        ConfigError: By every method: a file is missing or cannot be read.
        PromptTableError: By every method that reads rows: some cannot be used. The error lists the
            first problems by row and column, and counts all.
    """

    source: Source
    partition_by: PartitionBy
    defaults: Defaults = field(default_factory=Defaults)
    count_tokens: Callable[[str], int] = estimate_tokens
    max_prompt_tokens: int = MAX_TOKENS
    name: str = ""
    storage_options: Options = field(default_factory=dict, hash=False, repr=False)
    prompt_columns: Sequence[str] = ()
    _kept: Kept = field(default_factory=Kept, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "source", source_of(self.source))
        parse_prompt_columns(self.prompt_columns)  # so that a wrong one is refused here
        object.__setattr__(self, "prompt_columns", tuple(self.prompt_columns))

    @property
    def shown(self) -> str:
        """What the table is called in messages: its path or URL without credentials, or a text."""
        return shown_source(self.source)

    @property
    def place(self) -> str:
        """The path or URL; empty if the source is a value or a function."""
        return place_of(self.source)

    @property
    def kind(self) -> str:
        """What the source seems to be without a look at it, such as ``csv`` or ``python``."""
        return kind_by_name(self.place).name.lower() if self.place else "python"

    def pinned(self) -> PromptTable:
        """Return the table with its source as it is now: a function is called, but once.

        Raises ConfigError.
        """
        reading = self._reading()
        return self if reading is self.source else replace(self, source=reading)

    def mark(self) -> str:
        """Return a mark that changes with the source's content; empty if nothing cheap tells.

        Of a file it is made of size, time and etag. Raises ConfigError.
        """
        return self._reading().mark()

    def partition_keys(self) -> list[str]:
        """Return the keys of all partitions, sorted.

        For ``hash:N`` these are all N, and nothing is read. Otherwise the partition columns are
        read.
        """
        by = self.partition_by
        return by.keys() if isinstance(by, HashPartitions) else sorted(self._keys_in_table(by))

    def first_time(self) -> str | None:
        """Return the key of the first day, week or month; None for an empty table.

        Raises:
            ConfigError: The partitions are not by time.
        """
        by = self.partition_by
        if not isinstance(by, TimePartitions | MultiPartitions):
            raise ConfigError(f"partitions by {by} have no first day; use day:NAME")
        keys = self._keys_in_table(by)
        if isinstance(by, MultiPartitions):
            keys = {key.rpartition(MultiPartitions.BAR)[2] for key in keys}
        return min(keys, default=None)

    def row_count(self) -> int:
        """Return the number of rows, from the footers of the files."""
        return sum(file.row_count for file in self._reading().files())

    def column_names(self) -> list[str]:
        """Return the names of the columns, from the footers of the files."""
        files, _ = united(self._reading().files(), parse_prompt_columns(self.prompt_columns))
        return list(dict.fromkeys(files[0].schema.names))

    def plan(
        self,
        keys: Sequence[str] | None = None,
        attempts: Attempts | None = None,
        *,
        drawn: Collection[tuple[str, int]] = (),
        keep: bool = True,
    ) -> Plan:
        """Return the images that the rows of some partitions request, after checking these rows.

        Rows of other partitions are not checked, except that prompt_ids must be unique in the whole
        table, and that a row without a prompt_id is a problem of every partition of ``hash:N``.

        Args:
            keys: The partitions; None for all. A partition without rows has no images.
            attempts: How often another image of a (prompt_id, sample) was requested.
            drawn: The (prompt_id, sample) whose seed is drawn from the second attempt on although
                the row names one.
            keep: Keep the images, on disk. Otherwise the plan only knows the request keys.

        Returns:
            The plan, to be closed.

        Raises:
            ConfigError: A key that this partitioning cannot have.
        """
        return self._plan(keys, attempts, drawn, keep=keep, passthrough=True)

    def versions(
        self,
        keys: Sequence[str] | None = None,
        attempts: Attempts | None = None,
        *,
        drawn: Collection[tuple[str, int]] = (),
    ) -> dict[str, str]:
        """Return the data version of some partitions, or of all, by key, sorted.

        It depends on the request keys of the partition's rows alone. Partitions of ``hash:N`` and
        those that ``keys`` names have a version even without rows. The arguments are those of
        :meth:`plan`.
        """
        with closing(self._plan(keys, attempts, drawn, keep=False, passthrough=False)) as plan:
            return plan.versions()

    def scan(self, wanted: frozenset[str] | None = None, *, passthrough: bool = True) -> Scan:
        """Return a pass over the rows of some partitions, or of all."""
        return Scan(
            self._reading(),
            self.partition_by,
            wanted,
            defaults=self.defaults,
            count_tokens=self.count_tokens,
            max_prompt_tokens=self.max_prompt_tokens,
            passthrough=passthrough,
            prompt_columns=parse_prompt_columns(self.prompt_columns),
        )

    def _reading(self) -> Reading:
        names = parse_prompt_columns(self.prompt_columns)
        return reading_of(self.source, self.storage_options, self._kept, names)

    def _plan(
        self,
        keys: Sequence[str] | None,
        attempts: Attempts | None,
        drawn: Collection[tuple[str, int]],
        *,
        keep: bool,
        passthrough: bool,
    ) -> Plan:
        wanted = self._wanted(keys)
        named = wanted
        if named is None and isinstance(self.partition_by, HashPartitions):
            named = frozenset(self.partition_by.keys())
        scan = self.scan(wanted, passthrough=passthrough)
        planner = Planner(scan.passthrough_schema, attempts or {}, drawn, keep=keep)
        try:
            for planned in scan.map(planner.planned):
                planner.add(planned)
            warnings = scan.warnings
            return planner.plan(named or (), tuple(warnings.first), warnings.count, scan.notes)
        except BaseException:
            planner.close()
            raise

    def _wanted(self, keys: Sequence[str] | None) -> frozenset[str] | None:
        if keys is None:
            return None
        if isinstance(keys, str):
            raise TypeError("keys is a sequence of partition keys, not one text")
        for key in keys:
            if not self.partition_by.has_key(key):
                raise ConfigError(f"{shown(key)} is not a partition of {self.partition_by}")
        return frozenset(keys)

    def _keys_in_table(self, by: ColumnPartitions | TimePartitions | MultiPartitions) -> set[str]:
        problems = Problems()
        reading = self._reading()
        names = parse_prompt_columns(self.prompt_columns)
        layout = Layout.of(by, reading.files(), problems, names)
        keys: set[str] = set()
        for file in layout.files if layout.partition_columns else ():
            for first, batch in file.batches(layout.partition_columns):
                given = {name: batch.column(name) for name in layout.partition_columns}
                found, bad = partition_keys(by, given)
                keys.update(found.unique().drop_null().to_pylist())
                for name, cells in bad.items():
                    problems.add(
                        *(problem_in(first + at, None, name, cell) for at, cell in cells.items())
                    )
        problems.raise_for(reading.shown)
        return keys

"""Check the columns of a prompt table by the footers of its files, and collect problems."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

import pyarrow as pa

from krea_dagster.errors import Problem, PromptTableError
from krea_dagster.prompts.cells import Bad, is_text, plain, plain_type
from krea_dagster.prompts.column_names import SETTING, accepted, read_as
from krea_dagster.prompts.columns import RULES
from krea_dagster.prompts.files import TableFile
from krea_dagster.prompts.near_miss import near_misses, prompt_meant
from krea_dagster.prompts.partitioning import (
    HashPartitions,
    MultiPartitions,
    PartitionBy,
    TimePartitions,
)
from krea_dagster.prompts.united import MissingColumn, united, widest_type

#: How many problems an error names; the others are counted.
MAX_PROBLEMS: Final = 20

#: The columns that mean something. Only ``prompt`` is required.
RECOGNISED_COLUMNS: Final = tuple(RULES)

#: The columns that every file of a table must have, or none.
_IN_EVERY_FILE: Final = ("prompt", "prompt_id")

#: The manifest's own columns. A passthrough column may not have such a name, because the manifest
#: holds both.
RESERVED_COLUMNS: Final = (
    "sample",
    "model",
    "attempt",
    "request_key",
    "partition_key",
    "status",
    "task_id",
    "image_path",
    "image_sha256",
    "image_bytes",
    "image_format",
    "width",
    "height",
    "credits_reserved",
    "credits_charged",
    "billing_rule",
    "user_group",
    "submitted_at",
    "completed_at",
    "stored_at",
    "reused",
    "run_id",
    "error_code",
    "error_message",
)


class Problems:
    """The first problems in row order, and the count of all."""

    def __init__(self) -> None:
        self.first: list[Problem] = []
        self.count = 0

    def add(self, *problems: Problem, count: int | None = None) -> None:
        """Add problems; ``count`` is the number of all where only the first are given."""
        self.count += len(problems) if count is None else count
        # Stable: problems of the whole table come first, those of one row in the order of columns.
        self.first = sorted([*self.first, *problems], key=lambda problem: problem.row or 0)
        del self.first[MAX_PROBLEMS:]

    def raise_for(self, source: str, hints: Callable[[], Sequence[str]] = tuple) -> None:
        """Raise PromptTableError if there was a problem; ``hints`` may help to correct it."""
        if self.count:
            raise PromptTableError(source, self.first, self.count, hints())


def problem_in(row: int, prompt_id: str | None, column: str, bad: Bad) -> Problem:
    """Return the problem of one cell."""
    shown_id = None if prompt_id is None else plain(prompt_id)
    return Problem(row, shown_id, plain(column), bad.value, bad.allowed or RULES[column].allowed)


@dataclass(frozen=True)
class Layout:
    """The files of a table and the columns that can be used; the others are problems.

    ``passthrough`` are the columns that are copied to the manifest. ``partition_columns`` decide
    the partition; the tuple is empty where one of them cannot be used. ``notes`` say what is not a
    problem and perhaps not expected.
    """

    files: list[TableFile]
    recognised: tuple[str, ...]
    passthrough: pa.Schema
    partition_columns: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @classmethod
    def of(
        cls,
        by: PartitionBy,
        files: list[TableFile],
        problems: Problems,
        prompt_columns: Mapping[str, str] = MappingProxyType({}),
    ) -> Layout:
        """Read the files' schemas, and add what is wrong with them to ``problems``.

        ``prompt_columns`` are the names under which columns are read, by their names in the table.
        """
        files, missing = united(files, prompt_columns)
        names = list(dict.fromkeys(files[0].schema.names))
        unusable = _doubled(files, problems)
        notes = _noted(missing, {*_IN_EVERY_FILE, *by.columns}, problems)
        notes += _near_misses(names, {*accepted(names, prompt_columns), *by.columns}, problems)
        _missing(names, "prompt", "the table needs this column", problems)
        for name in by.columns:
            if name != "prompt":
                _missing(names, name, f"{by} needs this column", problems)

        recognised: list[str] = []
        passthrough: list[pa.Field] = []
        for name in names:
            if name in unusable:
                continue
            types = _types(files, name)
            if name in RECOGNISED_COLUMNS:
                if _types_fit(name, types, RULES[name].fits, RULES[name].allowed, problems):
                    recognised.append(name)
                continue
            if name in RESERVED_COLUMNS:
                problems.add(_reserved(name))
            kind = _one_type(name, types, problems)
            if kind is not None:
                passthrough.append(pa.field(name, kind))

        usable = [
            name
            for name, fits, allowed in _partition_types(by)
            if name in names
            and name not in unusable
            and _types_fit(name, _types(files, name), fits, allowed, problems)
        ]
        deciding = by.columns if len(usable) == len(by.columns) else ()
        return cls(files, tuple(recognised), pa.schema(passthrough), deciding, tuple(notes))


def _of_table(name: str, value: str, allowed: str) -> Problem:
    return Problem(None, None, plain(name), value, allowed)


def _types(files: Iterable[TableFile], name: str) -> dict[pa.DataType, str]:
    """Return the types that a column has, each with the first file that has it so."""
    types: dict[pa.DataType, str] = {}
    for file in files:
        types.setdefault(plain_type(file.schema.field(name).type), file.name)
    return types


def _doubled(files: Iterable[TableFile], problems: Problems) -> set[str]:
    doubled: set[str] = set()
    for file in files:
        names = file.schema.names
        for name in dict.fromkeys(name for name in names if names.count(name) > 1):
            if name not in doubled:
                doubled.add(name)
                value = f"there {names.count(name)} times in {file.name}"
                problems.add(_of_table(name, value, "a column's name must be unique"))
    return doubled


def _noted(
    missing: Sequence[MissingColumn], needed: Collection[str], problems: Problems
) -> list[str]:
    """Return what is said of columns that some files lack; of a needed one it is a problem."""
    for column in missing:
        if column.name in needed:
            value = f"missing in {column.first}"
            problems.add(_of_table(column.name, value, "every file of the table needs this column"))
    return [str(column) for column in missing if column.name not in needed]


def _near_misses(names: Sequence[str], accepted: Collection[str], problems: Problems) -> list[str]:
    """Return what is said of columns that nothing reads, unless they are problems."""
    said: list[str] = []
    for found in near_misses(names, accepted):
        if found.stops:
            problems.add(_of_table(found.column, "not read", found.said))
        else:
            said.append(f"{plain(found.column)} is not read: {found.said}")
    return said


def _reserved(name: str) -> Problem:
    """Return the problem of a column that the manifest has too."""
    new = plain(f"table_{name}")
    allowed = (
        f"the image manifest has a column of this name; rename it, or read it by {SETTING} "
        f"{plain(name)}={new}"
    )
    if name in {"width", "height"}:
        allowed += "; the shape of an image is its size, a ratio such as 16:9"
    return _of_table(name, "", allowed)


def _missing(names: list[str], name: str, need: str, problems: Problems) -> None:
    if name in names:
        return
    there = ", ".join(plain(other) for other in names[:MAX_PROBLEMS]) or "none"
    if len(names) > MAX_PROBLEMS:
        there += f" and {len(names) - MAX_PROBLEMS} more"
    by_lower = {other.lower(): other for other in reversed(names)}
    close = difflib.get_close_matches(name.lower(), by_lower, n=1)
    meant = by_lower[close[0]] if close else prompt_meant(names) if name == "prompt" else None
    guess = "" if meant is None else f"; is {plain(meant)} meant? Read it by {read_as(meant, name)}"
    problems.add(_of_table(name, "missing", f"{need}; its columns are: {there}{guess}"))


def _types_fit(
    name: str,
    types: dict[pa.DataType, str],
    fits: Callable[[pa.DataType], bool],
    allowed: str,
    problems: Problems,
) -> bool:
    wrong = [kind for kind in types if not (fits(kind) or pa.types.is_null(kind))]
    for kind in wrong:
        problems.add(_of_table(name, f"of the type {kind} in {types[kind]}", allowed))
    return not wrong


def _is_column_key(kind: pa.DataType) -> bool:
    types = pa.types
    return bool(
        is_text(kind) or types.is_integer(kind) or types.is_boolean(kind) or types.is_date(kind)
    )


def _is_time_key(kind: pa.DataType) -> bool:
    return bool(is_text(kind) or pa.types.is_date(kind) or pa.types.is_timestamp(kind))


_TypeRule = tuple[str, Callable[[pa.DataType], bool], str]


def _partition_types(by: PartitionBy) -> list[_TypeRule]:
    """Return the columns that decide the partition, with the rule for their types."""
    if isinstance(by, HashPartitions):
        return []
    if isinstance(by, MultiPartitions):
        return [*_partition_types(by.by_column), *_partition_types(by.time)]
    if isinstance(by, TimePartitions):
        return [
            (by.column, _is_time_key, "must be dates, times or ISO texts, to be a partition key")
        ]
    allowed = "must be text, whole numbers, booleans or dates, to be a partition key"
    return [(by.column, _is_column_key, allowed)]


# The types that writers choose for the same column. Values are cast exactly, or refused.
_COMMON_TYPES: Final[tuple[tuple[Callable[[pa.DataType], bool], pa.DataType], ...]] = (
    (is_text, pa.large_string()),
    (pa.types.is_integer, pa.int64()),
    (lambda kind: pa.types.is_integer(kind) or pa.types.is_floating(kind), pa.float64()),
)


def _one_type(name: str, types: dict[pa.DataType, str], problems: Problems) -> pa.DataType | None:
    """Return the type of a passthrough column; a file that holds only nulls does not count."""
    kinds = [kind for kind in types if not pa.types.is_null(kind)] or [pa.null()]
    if len(kinds) > 1:
        for fits, common in _COMMON_TYPES:
            if all(map(fits, kinds)):
                return common
        if (widest := widest_type(kinds)) is not None:
            return widest
        value = " and ".join(f"{kind} in {types[kind]}" for kind in kinds[:2])
        allowed = "a column must have one type in all files"
        problems.add(_of_table(name, f"of the types {value}", allowed))
        return None
    return kinds[0]

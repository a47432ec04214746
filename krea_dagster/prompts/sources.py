"""What a prompt table is read from: a path, a value in Python, or a function that returns either.

What is not a Parquet file is copied into one, so that all other code reads Parquet.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final, TypeAlias

import pyarrow as pa

from krea_dagster import redact
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.file_systems import Options
from krea_dagster.prompts.copies import Copy
from krea_dagster.prompts.file_marks import mark_of_files
from krea_dagster.prompts.files import (
    TableFile,
    filesystem_of,
    first_line,
    open_files,
    reading,
)
from krea_dagster.prompts.kinds import FORMATS, Kind, catalog_of, kind_of
from krea_dagster.prompts.table_formats import format_table, open_table
from krea_dagster.prompts.text_files import TextFile, csv_stream, jsonl_stream
from krea_dagster.prompts.values import kind_of_value, plain_stream, stream_of

#: A path or URL, a value such as a data frame, or a function without arguments that returns either.
Source: TypeAlias = Any

_TABLE: Final = "the prompt table"


class Given:
    """A value that is a table. It is read once: a stream cannot be read again."""

    def __init__(self, value: object, shown: str = "") -> None:
        self.shown = shown or f"{_TABLE} given as {kind_of_value(value)}"
        self._value: object = value
        self._lock = threading.Lock()
        self._copy: Copy | None = None

    def __repr__(self) -> str:
        return f"<{self.shown}>"

    def copy(self) -> Copy:
        """Return the copy of the value. Raises ConfigError, or TypeError for another value."""
        with self._lock:
            if self._copy is None:
                value = self._value
                self._copy = _copied(lambda: stream_of(value, self.shown), self.shown)
                self._value = None
            return self._copy


class Kept:
    """The copy that a table made last, for readings with the same mark."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._mark = ""
        self._copy: Copy | None = None

    def copy(self, mark: str, made: Callable[[], Copy]) -> Copy:
        """Return the last copy if it has this mark, else make one."""
        with self._lock:
            if self._copy is None or not mark or mark != self._mark:
                self._copy, self._mark = made(), mark
            return self._copy


class Reading(ABC):
    """A source as it is at one moment; ``source`` is what was given."""

    def __init__(self, source: Source, shown: str) -> None:
        self.source = source
        self.shown = shown

    @abstractmethod
    def mark(self) -> str:
        """Return a mark that another content has not; empty if there is none."""

    @abstractmethod
    def files(self) -> list[TableFile]:
        """Return the files of the table, with their footers read. Raises ConfigError."""


class ParquetReading(Reading):
    """A Parquet file or folder. It is read where it is, each time."""

    def __init__(self, source: Source, place: str, options: Options) -> None:
        super().__init__(source, redact.location(place))
        self._place = place
        self._options = options
        self._is_alone = False
        self._checking = threading.Lock()

    def mark(self) -> str:
        """Return a mark of the files' sizes and times."""
        return mark_of_files(self._place, self._options)

    def files(self) -> list[TableFile]:
        """Return the files. That they are not a part of another table is checked once."""
        # A run's two first readings are at the same time.
        with nullcontext() if self._is_alone else self._checking:
            found = open_files(self._place, self._options, is_alone=self._is_alone)
            self._is_alone = True
        return found


class CopiedReading(Reading):
    """A source of another kind, which is copied into a Parquet file when it is first read."""

    def __init__(
        self,
        source: Source,
        shown: str,
        kept: Kept,
        mark: Callable[[], str],
        stream: Callable[[], pa.RecordBatchReader],
    ) -> None:
        super().__init__(source, shown)
        self._kept = kept
        self._marked = mark
        self._stream = stream
        self._mark: str | None = None
        self._copy: Copy | None = None
        self._lock = threading.Lock()

    def mark(self) -> str:
        """Return the mark of the content, taken before it is read."""
        with self._lock:
            if self._mark is None:
                self._mark = self._marked()
            return self._mark

    def files(self) -> list[TableFile]:
        """Return the copy, which is made unless the last one of the table has the same mark."""
        mark = self.mark()
        with self._lock:
            if self._copy is None:
                self._copy = self._kept.copy(mark, lambda: _copied(self._stream, self.shown))
        return files_of_copy(self._copy, self.shown)


class GivenReading(Reading):
    """A value."""

    def __init__(self, source: Source, given: Given) -> None:
        super().__init__(source, given.shown)
        self._given = given

    def mark(self) -> str:
        """Return a hash of the content."""
        return self._given.copy().mark()

    def files(self) -> list[TableFile]:
        """Return the value's copy."""
        return files_of_copy(self._given.copy(), self.shown)


def source_of(given: Any, shown: str = "") -> Source:
    """Return what a table keeps as its source: a value is read once, by all that read the table."""
    if isinstance(given, str | Path | Given | Reading) or is_function(given):
        return given
    return given if format_table(given) else Given(given, shown)


def is_function(source: Source) -> bool:
    """Return whether a source is a function that returns one."""
    return callable(source) and not hasattr(source, "__arrow_c_stream__")


def shown_source(source: Source) -> str:
    """Return a source for messages, without credentials."""
    if isinstance(source, Given | Reading):
        return source.shown
    if is_function(source):
        return getattr(source, "shown", "") or f"{_TABLE} of the function {_name_of(source)}"
    if isinstance(source, str | Path):
        return redact.location(str(source))
    return f"{_TABLE} given as {kind_of_value(source)}"


def place_of(source: Source) -> str:
    """Return a source's path or URL; empty if it is a value or a function."""
    if isinstance(source, Reading):
        return place_of(source.source)
    return str(source) if isinstance(source, str | Path) else ""


def reading_of(
    source: Source,
    options: Options,
    kept: Kept | None = None,
    renamed: Mapping[str, str] = MappingProxyType({}),
) -> Reading:
    """Return a source as it is now: a function is called. Raises ConfigError.

    ``kept`` has the last copy of the table, which is used again where its mark is still the same.
    ``renamed`` are the names under which columns of a CSV file are read: they decide the types.
    """
    if isinstance(source, Reading):
        return source
    kept = kept or Kept()
    if not is_function(source):
        return _reading_of(source, source, options, kept, renamed)
    shown = shown_source(source)
    result = _called(source, shown)
    if is_function(result):
        raise ConfigError(f"{shown} is a function again; return a path or a table")
    return _reading_of(source, source_of(result, shown), options, kept, renamed)


def files_of_copy(copy: Copy, shown: str) -> list[TableFile]:
    """Return the file of a copy, which lives as long as the file is used."""
    return [replace(file, name=shown, owner=copy) for file in open_files(copy.path)]


def _reading_of(
    source: Source, found: Source, options: Options, kept: Kept, renamed: Mapping[str, str]
) -> Reading:
    """Return the reading of what a source is, or of what its function has returned."""
    if isinstance(found, Given):
        return GivenReading(source, found)
    if not isinstance(found, str | Path):
        table = format_table(found)
        if table is None:
            raise TypeError(f"{_TABLE} cannot be {kind_of_value(found)}")
        return CopiedReading(source, shown_source(source), kept, table.mark, table.stream)
    place = str(found)
    shown = redact.location(place)
    if catalog_of(place):
        kind = Kind.ICEBERG
    else:
        filesystem, root = filesystem_of(place, options)
        with reading(shown, place, options):
            kind = kind_of(filesystem, root, shown)
    if kind is Kind.PARQUET:
        return ParquetReading(source, place, options)
    if kind in FORMATS:
        table = open_table(kind, place, shown, options)
        return CopiedReading(source, shown, kept, table.mark, table.stream)
    read = partial(csv_stream, renamed=renamed) if kind is Kind.CSV else jsonl_stream
    return CopiedReading(
        source,
        shown,
        kept,
        lambda: mark_of_files(place, options),
        lambda: read(TextFile(filesystem, root, shown)),
    )


def _called(function: Callable[[], Any], shown: str) -> Any:
    try:
        return function()
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - a function of the user raises errors of any type
        raise ConfigError(
            f"{shown} raised {type(error).__name__}: {first_line(error)}. Nothing was bought."
        ) from redact.safe_cause(error)


def _name_of(function: Any) -> str:
    return str(getattr(function, "__name__", type(function).__name__))


def _copied(stream: Callable[[], pa.RecordBatchReader], shown: str) -> Copy:
    try:
        return Copy(plain_stream(stream()))
    except (KreaError, TypeError):
        raise
    except Exception as error:  # noqa: BLE001 - each library has errors of its own
        raise ConfigError(f"{shown} cannot be read: {first_line(error)}") from redact.safe_cause(
            error
        )

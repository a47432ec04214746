"""CSV and JSONL as Arrow batches, typed with care: what looks like a number may be a name.

Of a CSV file the columns whose values are numbers or booleans by definition are read as such; every
other cell is text, as it is written (``007``). An empty cell is missing. JSON has types of its own.
A line that is broken is an error with its number, never a row that is left out.
"""

from __future__ import annotations

import csv
import io
import json
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import islice
from types import MappingProxyType
from typing import Any, Final

import pyarrow as pa

from krea_dagster.errors import ConfigError, Problem
from krea_dagster.prompts.cells import Bad, plain
from krea_dagster.prompts.column_names import read_names
from krea_dagster.prompts.columns import type_of_text, value_of_text
from krea_dagster.prompts.table_schema import Problems

_AT_ONCE: Final = 8_192
#: A file that was written more recently may be written further.
_GROWING_S: Final = 10.0
_OTHER_SEPARATORS: Final = (";", "\t", "|")

#: The types of JSON, by Python's, with their names.
_JSON_KINDS: Final = {
    bool: "a boolean", int: "a number", float: "a number", str: "text", list: "a list",
    dict: "an object",
}  # fmt: skip


class TextFile:
    """A text file, perhaps packed. ``name`` is what it is called in messages."""

    def __init__(self, filesystem: Any, path: str, name: str) -> None:
        self.name = name
        self._filesystem = filesystem
        self._path = path
        self._packed = "gzip" if path.lower().endswith(".gz") else None
        self._info = filesystem.get_file_info(path)

    @contextmanager
    def text(self) -> Iterator[io.TextIOWrapper]:
        """Open it. Raises ConfigError if its text is not UTF-8, or has changed at the end."""
        data = self._filesystem.open_input_stream(self._path, compression=self._packed)
        with data, io.TextIOWrapper(data, encoding="utf-8-sig", newline="") as file:
            try:
                yield file
            except UnicodeDecodeError as error:
                raise ConfigError(
                    f"{self.name} is not UTF-8 text: {error.reason} "
                    f"({error.object[error.start]:#x}). Nothing was bought. Save it as UTF-8."
                ) from error
        now = self._filesystem.get_file_info(self._path)
        if (now.size, now.mtime_ns) != (self._info.size, self._info.mtime_ns):
            raise ConfigError(
                f"{self.name} changed while it was read. Nothing was bought. Run again when it is "
                "complete."
            )

    def refuse_growing(self, last_line: str, *, now_s: float | None = None) -> None:
        """Raise ConfigError if it was written just now, and its last line has no end.

        Its last cell may be cut short, which only the next write would show.
        """
        written = self._info.mtime
        if written is None or last_line[-1:] in "\r\n" or self._packed:
            return
        if (time.time() if now_s is None else now_s) - written.timestamp() < _GROWING_S:
            raise ConfigError(
                f"{self.name} was written just now, and its last line has no line break: it may "
                f"not be complete. Nothing was bought. Run again in {_GROWING_S:.0f} seconds."
            )


def csv_stream(
    file: TextFile, renamed: Mapping[str, str] = MappingProxyType({})
) -> pa.RecordBatchReader:
    """Return the rows of a CSV file, with some columns ``renamed``.

    Raises ConfigError for a broken line, also later.
    """
    rows = _csv_rows(file)
    header = next(rows)
    names = read_names(header, renamed)
    header = [names.get(column, column) for column in header]
    schema = pa.schema([(column, type_of_text(column)) for column in header])
    return pa.RecordBatchReader.from_batches(schema, _csv_batches(rows, schema, file.name))


def jsonl_stream(file: TextFile) -> pa.RecordBatchReader:
    """Return the rows of a file with a JSON object on each line. Reads the file twice.

    Raises ConfigError for a line that is none, and for a column of several types.
    """
    schema = _json_schema(_objects(file), file.name)

    def batches() -> Iterator[pa.RecordBatch]:
        objects = (found for _, found in _objects(file))
        for some in _in_parts(objects):
            columns = [[one.get(field.name) for one in some] for field in schema]
            arrays = [
                pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)
            ]
            yield pa.RecordBatch.from_arrays(arrays, schema=schema)

    return pa.RecordBatchReader.from_batches(schema, batches())


# -- CSV ------------------------------------------------------------------------------------------


def _csv_rows(text_file: TextFile) -> Iterator[list[str]]:
    """Yield the header and the rows, which are all as long."""
    name = text_file.name
    with text_file.text() as file:
        lines = _Lines(file)
        reader = csv.reader(lines, strict=True)
        line, header = 1, None
        try:
            for row in reader:
                if header is None:
                    header = _checked_header(row, name)
                    yield header
                elif row and len(row) != len(header):
                    raise ConfigError(
                        f"{name} line {line}: it has {len(row)} cells, and the header has "
                        f"{len(header)}. Nothing was bought. A cell with a comma, a quote or a "
                        "line break must be in quotes."
                    )
                elif row:  # not a blank line
                    yield row
                line = reader.line_num + 1
        except csv.Error as error:
            raise ConfigError(f"{name} line {line}: {error}. Nothing was bought.") from error
        if header is None:
            raise ConfigError(f"{name} is empty; its first line must name the columns")
        text_file.refuse_growing(lines.last)


class _Lines:
    """Yields lines, and keeps the last one."""

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self.last = ""

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        self.last = next(self._lines)
        return self.last


def _checked_header(header: list[str], name: str) -> list[str]:
    for separator in _OTHER_SEPARATORS:
        if len(header) == 1 and separator in header[0]:
            raise ConfigError(f"{name} separates its columns by {separator!r}; write it by commas")
    for number, column in enumerate(header, 1):
        if not column.strip():
            raise ConfigError(f"{name} line 1: column {number} has no name")
    return header


def _csv_batches(
    rows: Iterator[list[str]], schema: pa.Schema, name: str
) -> Iterator[pa.RecordBatch]:
    problems, first = Problems(), 1
    for some in _in_parts(rows):
        arrays = [
            _csv_array(field, cells, first, problems)
            for field, cells in zip(schema, zip(*some, strict=True), strict=True)
        ]
        yield pa.RecordBatch.from_arrays(arrays, schema=schema)
        first += len(some)
    problems.raise_for(name)


def _csv_array(field: pa.Field, cells: Sequence[str], first: int, problems: Problems) -> pa.Array:
    if pa.types.is_string(field.type):
        return pa.array([cell or None for cell in cells], field.type)
    values = [value_of_text(field.name, cell) for cell in cells]
    for row, value in enumerate(values, first):
        if isinstance(value, Bad):
            problems.add(Problem(row, None, plain(field.name), value.value, value.allowed))
    return pa.array([None if isinstance(one, Bad) else one for one in values], field.type)


# -- JSONL ----------------------------------------------------------------------------------------


def _objects(text_file: TextFile) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the number and the object of each line that is not blank."""
    name = text_file.name
    decoder = json.JSONDecoder(object_pairs_hook=_object, parse_constant=_no_number)
    with text_file.text() as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = decoder.decode(line.rstrip("\r\n"))
            except ValueError as error:
                said = str(error)
                if isinstance(error, json.JSONDecodeError):
                    said = f"{error.msg} in column {error.colno}"
                raise ConfigError(f"{name} line {number}: {said}. Nothing was bought.") from error
            if not isinstance(found, dict):
                kind = _JSON_KINDS.get(type(found), "null")
                raise ConfigError(
                    f"{name} line {number}: it is {kind}, not an object. Nothing was bought."
                )
            yield number, found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in an object")
    return found


def _no_number(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def _json_schema(objects: Iterable[tuple[int, dict[str, Any]]], name: str) -> pa.Schema:
    """Return the type of each column; that of lists and objects is decided by Arrow."""
    kinds: dict[str, dict[type, int]] = {}
    types: dict[str, list[pa.DataType]] = {}
    for some in _in_parts(objects):
        nested: dict[str, list[Any]] = {}
        for number, one in some:
            for column, value in one.items():
                found = kinds.setdefault(column, {})
                if value is None:
                    continue
                found.setdefault(type(value), number)
                if isinstance(value, list | dict):
                    nested.setdefault(column, []).append(value)
        for column, values in nested.items():
            types.setdefault(column, []).append(_nested_type(column, values, name))
    if not kinds:
        kinds["prompt"] = {}  # a file without a line is an empty table
    fields = [
        pa.field(column, _json_type(column, found, types.get(column, []), name))
        for column, found in kinds.items()
    ]
    return pa.schema(fields)


def _json_type(
    column: str, found: dict[type, int], nested: list[pa.DataType], name: str
) -> pa.DataType:
    first: dict[str, int] = {}
    for kind, line in found.items():
        said = _JSON_KINDS[kind]
        first[said] = min(line, first.get(said, line))
    if len(first) > 1:
        (one, line), (other, other_line) = list(first.items())[:2]
        raise ConfigError(
            f"{name}: {plain(column)} is {one} in line {line} and {other} in line {other_line}; "
            "a column must have one type. Nothing was bought."
        )
    if nested:
        schemas = [pa.schema([(column, kind)]) for kind in nested]
        unified = pa.unify_schemas(schemas, promote_options="permissive")
        return unified.field(0).type
    if float in found:
        return pa.float64()
    by_kind = {bool: pa.bool_(), int: pa.int64(), str: pa.string()}
    return by_kind[next(iter(found))] if found else pa.null()


def _nested_type(column: str, values: list[Any], name: str) -> pa.DataType:
    try:
        return pa.array(values).type
    except (pa.ArrowException, OverflowError) as error:
        raise ConfigError(
            f"{name}: {plain(column)} has lists or objects of several types: {error}. "
            "Nothing was bought."
        ) from error


# -- both -----------------------------------------------------------------------------------------


def _in_parts(items: Iterable[Any]) -> Iterator[list[Any]]:
    iterator = iter(items)
    while part := list(islice(iterator, _AT_ONCE)):
        yield part

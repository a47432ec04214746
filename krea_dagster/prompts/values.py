"""Tables that are given as values in Python, such as data frames, as a stream of Arrow batches."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds

from krea_dagster.errors import ConfigError
from krea_dagster.prompts.cells import is_text, plain_type

#: The libraries whose values are named by them, by the first part of the type's module.
_LIBRARIES: Final = {
    "pandas": "pandas",
    "polars": "Polars",
    "pyarrow": "Arrow",
    "duckdb": "DuckDB",
    "_duckdb": "DuckDB",
}
_NAMES: Final = {"DuckDBPyRelation": "relation"}

#: What pandas calls an index without a name; it says nothing about a row.
_UNNAMED_INDEX: Final = re.compile(r"__index_level_\d+__")


def kind_of_value(value: object) -> str:
    """Return what a value is, for people: ``a pandas DataFrame``, ``a list``."""
    library = _LIBRARIES.get(type(value).__module__.partition(".")[0])
    name = _NAMES.get(type(value).__name__, type(value).__name__)
    said = f"{library} {name}" if library else name
    return f"{'an' if said[0] in 'AEIOUaeiou' else 'a'} {said}"


def stream_of(value: Any, shown: str) -> pa.RecordBatchReader:
    """Return a value as a stream of batches, in types that a Parquet file can hold.

    Args:
        value: A table (pandas, Polars, also lazy, Arrow, also a dataset or a reader, a DuckDB
            relation, or anything else that exports an Arrow stream); a column of texts; or texts
            and rows by column.
        shown: What it is called in messages.

    Raises:
        ConfigError: A column cannot be read, or has cells of several types.
        TypeError: It is none of these.
    """
    if isinstance(value, str | bytes | Mapping):
        raise TypeError(f"{shown}: give a list of texts or rows, or a table; not one text or row")
    reader = _reader_of(value, shown)
    unnamed = [name for name in reader.schema.names if _UNNAMED_INDEX.fullmatch(name)]
    return plain_stream(reader, unnamed if _is_of_pandas(value) else ())


def plain_stream(reader: pa.RecordBatchReader, dropped: Sequence[str] = ()) -> pa.RecordBatchReader:
    """Return a stream in types that a Parquet file can hold, without metadata of the types."""
    fields = [
        pa.field(field.name, _storable(field.type))
        for field in reader.schema
        if field.name not in dropped
    ]
    return pa.RecordBatchReader.from_batches(pa.schema(fields), _cast(reader, fields))


def _reader_of(value: Any, shown: str) -> pa.RecordBatchReader:
    if isinstance(value, pa.RecordBatch):
        return pa.Table.from_batches([value]).to_reader()
    if isinstance(value, ds.Dataset):
        return value.scanner().to_reader()
    if isinstance(value, ds.Scanner):
        return value.to_reader()
    if type(value).__name__ == "LazyFrame" and hasattr(value, "collect"):
        value = value.collect()
    if type(value).__name__ == "Series" and _is_of_pandas(value):
        value = pa.Array.from_pandas(value)  # before pandas 3 it exports no stream
    if isinstance(value, pa.Array):
        value = pa.chunked_array([value])
    if not hasattr(value, "__arrow_c_stream__"):
        return _table_of_rows(value, shown).to_reader()
    try:
        return pa.RecordBatchReader.from_stream(value)
    except pa.ArrowInvalid:
        # A column, such as a pandas Series, and no table.
        column = pa.chunked_array(value)
    if not (is_text(plain_type(column.type)) or pa.types.is_null(column.type)):
        raise ConfigError(
            f"{shown} is one column of the type {column.type}; give a column of texts, which are "
            "prompts, or a table with a column prompt"
        )
    return pa.table({"prompt": column}).to_reader()


def _table_of_rows(rows: Any, shown: str) -> pa.Table:
    if not isinstance(rows, Iterable):
        raise TypeError(
            f"{shown} is {kind_of_value(rows)}; give a path, a table (pandas, Polars, Arrow, "
            "DuckDB), or a list of rows"
        )
    listed = [{"prompt": row} if isinstance(row, str) else dict(row) for row in _checked(rows)]
    names = dict.fromkeys(name for row in listed for name in row)
    columns: dict[str, pa.Array] = {} if listed else {"prompt": pa.array([], pa.string())}
    for name in names:
        try:
            columns[name] = pa.array([row.get(name) for row in listed])
        except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError) as error:
            raise ConfigError(
                f"the column {name} of {shown} has cells of several types: {error}. "
                "Nothing was bought."
            ) from error
    return pa.table(columns)


def _checked(rows: Iterable[Any]) -> Iterator[str | Mapping[str, Any]]:
    for number, row in enumerate(rows, 1):
        if not isinstance(row, str | Mapping):
            raise TypeError(f"prompt {number} is a {type(row).__name__}, not a text or a row")
        yield row


def _is_of_pandas(value: object) -> bool:
    return type(value).__module__.partition(".")[0] == "pandas"


def _storable(kind: pa.DataType) -> pa.DataType:
    """Return the type in the file: Parquet has none for views, nor for some encodings."""
    if pa.types.is_dictionary(kind):
        return pa.dictionary(kind.index_type, _storable(kind.value_type), kind.ordered)
    if pa.types.is_run_end_encoded(kind):
        return _storable(kind.value_type)
    return plain_type(kind)


def _cast(reader: pa.RecordBatchReader, fields: list[pa.Field]) -> Iterator[pa.RecordBatch]:
    for batch in reader:
        arrays = [_cast_array(batch.column(at), field.type) for at, field in _places(batch, fields)]
        yield pa.RecordBatch.from_arrays(arrays, schema=pa.schema(fields))


def _places(batch: pa.RecordBatch, fields: list[pa.Field]) -> Iterator[tuple[int, pa.Field]]:
    """Yield each kept column's place; names may occur twice, which is reported later."""
    left = list(fields)
    for at, name in enumerate(batch.schema.names):
        if left and left[0].name == name:
            yield at, left.pop(0)


def _cast_array(array: pa.Array, kind: pa.DataType) -> pa.Array:
    if array.type == kind:
        return array
    if pa.types.is_dictionary(array.type):
        return pa.DictionaryArray.from_arrays(
            array.indices, _cast_array(array.dictionary, kind.value_type), ordered=kind.ordered
        )
    if pa.types.is_run_end_encoded(array.type):
        array = pc.run_end_decode(array)
    return array.cast(kind)

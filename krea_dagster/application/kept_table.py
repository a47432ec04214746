"""A prompt table that is made as a value, such as a data frame: it is kept as Parquet files.

The folder has one file, or one for each partition of the asset that makes it. Each file says which
value it is: a run that was slow may write an older one, and the next look then sees that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import same_kind
from krea_dagster.prompts import PromptTable, safe_name
from krea_dagster.prompts.copies import Copy
from krea_dagster.prompts.files import TableFile
from krea_dagster.prompts.sources import Given, reading_of

#: The folder of such tables under the storage root.
FOLDER: Final = "prompt_tables"

_WHOLE: Final = "table.parquet"
_PART: Final = "partition-"

#: The entries of a file's metadata: which value it is, and a hash of its content.
_MARK: Final = b"krea_value"
_CONTENT: Final = b"krea_content"


class KeptTable:
    """The files of a prompt table whose source is a folder."""

    def __init__(self, table: PromptTable) -> None:
        self._table = table
        self._storage = Storage(table.place, table.storage_options)

    def exists(self) -> bool:
        """Return whether a value was ever kept."""
        return any(self._names())

    def mark(self, partition: str | None) -> str:
        """Return the mark of the kept value; empty if there is none, or it is not known which."""
        return self._entries(_name(partition)).get(_MARK, b"").decode()

    def keep(self, value: Any, shown: str, *, partition: str | None = None, mark: str = "") -> None:
        """Keep a value, atomically. One that is kept already is not written again.

        Args:
            value: A table of any kind that ``PromptTable`` takes, or a path or URL of one.
            shown: What it is called in messages.
            partition: The partition that it is; None if it is the whole table.
            mark: Which value it is; empty if that is not known.

        Raises:
            ConfigError: It is not a table.
            StorageError: It cannot be written.
        """
        copy, name = _copy_of(value, shown, self._table), _name(partition)
        content = copy.mark()
        kept = self._entries(name)
        is_new = kept.get(_CONTENT, b"").decode() != content
        if is_new or (mark and kept.get(_MARK, b"").decode() != mark):
            entries = {_MARK: mark.encode(), _CONTENT: content.encode()}
            self._storage.write(name, lambda file: _write(copy, file, entries))
        others = [_WHOLE] if partition is not None else list(self._names())
        for other in others:
            if other != name:
                self._storage.remove(other)

    def _names(self) -> Iterator[str]:
        for name in self._storage.names(""):
            if name == _WHOLE or name.startswith(_PART):
                yield name

    def _entries(self, name: str) -> dict[bytes, bytes]:
        try:
            with self._storage.open(name) as file:
                return dict(pq.read_schema(file).metadata or {})
        except (FileNotFoundError, pa.ArrowInvalid):
            return {}


def _name(partition: str | None) -> str:
    return _WHOLE if partition is None else f"{_PART}{safe_name(partition)}.parquet"


def _copy_of(value: Any, shown: str, table: PromptTable) -> Copy:
    if value is None:
        raise ConfigError(
            f"{shown} is None: return the table, or give its path as prompts and the asset in deps"
        )
    if isinstance(value, str | Path):
        place = str(value)
        options = table.storage_options if same_kind(place, table.place) else {}
        value = _stream(reading_of(place, options).files())
    try:
        return Given(value, shown).copy()
    except TypeError as error:
        raise ConfigError(str(error)) from error


def _stream(files: Sequence[TableFile]) -> pa.RecordBatchReader:
    """Return files as one stream; a column that a file lacks is empty in its rows."""
    schema = pa.unify_schemas([file.schema.remove_metadata() for file in files])

    def batches() -> Iterator[pa.RecordBatch]:
        empty = schema.empty_table()
        for file in files:
            for _, batch in file.batches(file.schema.names):
                part = pa.Table.from_batches([batch])
                whole = pa.concat_tables([empty, part], promote_options="default")
                yield from whole.select(schema.names).cast(schema).to_batches()

    return pa.RecordBatchReader.from_batches(schema, batches())


def _write(copy: Copy, file: BinaryIO, entries: dict[bytes, bytes]) -> None:
    made = pq.ParquetFile(copy.path)
    schema = made.schema_arrow.with_metadata(entries)
    with pq.ParquetWriter(file, schema, compression="zstd") as writer:
        for group in range(made.num_row_groups):
            rows = made.read_row_group(group).replace_schema_metadata(entries)
            writer.write_table(rows)

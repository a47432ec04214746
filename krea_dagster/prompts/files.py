"""Find and read the Parquet files of a prompt table, on a disk or behind a URL.

Every failure is raised as a :class:`~krea_dagster.errors.ConfigError` that names the file and says
what to do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
from pyarrow import fs

from krea_dagster import redact
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.file_systems import Options, open_url, store_error
from krea_dagster.file_systems import kind_of as file_kind
from krea_dagster.prompts.hive import FolderColumns
from krea_dagster.prompts.kinds import (
    PARQUET_ENDINGS,
    database_of,
    describe_file,
    table_around,
    table_within,
)
from krea_dagster.store_faults import is_of_client

#: The size of a batch: these bytes, within these rows.
_BATCH_BYTES: Final = 4 * 1024**2
BATCH_ROWS: Final = 16_384
_LEAST_ROWS: Final = 2_048

# Column chunks are read piece by piece, so that a row group of a million rows takes no more memory
# than one of ten thousand.
_BUFFER_BYTES: Final = 1 << 20

# A column with fewer bytes per value is dictionary-encoded in the file: plain text takes 4 or more.
_LEAST_TEXT_BYTES: Final = 2


_GCS_RETRY_S: Final = 30
#: The extras of object stores.
_EXTRAS: Final = {"s3": "s3", "gs": "gcs", "az": "azure"}


@dataclass(frozen=True)
class TableFile:
    """One Parquet file of the table. ``name`` is shown in messages, without credentials.

    ``first_row`` is the number of its first row in the table, from 1. ``owner`` keeps a temporary
    file as long as this one is used. ``schema`` may have columns that the file does not have, which
    are null in its rows, and ``renamed`` maps other names of its columns to the file's own.
    """

    name: str
    schema: pa.Schema
    first_row: int
    _path: str
    _options: Options
    _filesystem: Any
    _fragment: Any
    _by_folder: FolderColumns = field(default_factory=FolderColumns)
    owner: object = None
    renamed: Mapping[str, str] = field(default_factory=dict)

    @property
    def row_count(self) -> int:
        """The number of rows, from the footer."""
        return int(self._fragment.metadata.num_rows)

    def batches(
        self, columns: Sequence[str], keep: Any | None = None
    ) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield ``(number of the first row, batch)`` in the file's order.

        Only the named columns are read. ``keep``, a ``pyarrow.dataset`` expression, skips row
        groups that have no such row, by their statistics; it does not filter rows. Raises
        ConfigError.
        """
        columns = list(dict.fromkeys(columns))
        own = [self.renamed.get(name, name) for name in columns]
        in_file = set(self._fragment.physical_schema.names)
        there = in_file | set(self._by_folder.values)
        read = [name for name in own if name in in_file]
        known = [name for name in own if name in there]
        with reading(self.name, self._path, self._options):
            metadata = self._fragment.metadata
            first_rows = [self.first_row]
            for group in range(metadata.num_row_groups):
                first_rows.append(first_rows[-1] + metadata.row_group(group).num_rows)
            wanted = self._groups(known, None if known != columns else keep)
            if not wanted or not columns:
                return
            for group, batches in self._read(read, wanted):
                row = first_rows[group]
                for batch in batches:
                    found = self._by_folder.complete(batch, known, self.name, row)
                    yield row, _as_read(found, own, columns, batch.num_rows)
                    row += batch.num_rows

    def _read(
        self, columns: Sequence[str], wanted: Sequence[int]
    ) -> Iterator[tuple[int, Iterable[pa.RecordBatch]]]:
        """Yield the batches of each wanted row group."""
        metadata = self._fragment.metadata
        if not columns:
            for group in wanted:
                yield group, _without_columns(metadata.row_group(group).num_rows)
            return
        with self._filesystem.open_input_file(self._path) as handle:
            dictionaries: list[str] | None = None
            for place, group in enumerate(wanted):
                if place == 1:
                    dictionaries = self._dictionaries(columns, wanted[0])
                if place <= 1:
                    file = pq.ParquetFile(
                        handle,
                        metadata=metadata,
                        read_dictionary=dictionaries,
                        pre_buffer=False,
                        buffer_size=_BUFFER_BYTES,
                    )
                rows = _batch_rows(metadata.row_group(group))
                yield group, file.iter_batches(rows, [group], columns)

    def _dictionaries(self, columns: Sequence[str], group: int) -> list[str]:
        """Return the text columns that the file has as dictionaries, to read them as such.

        The row group must have been read before: Arrow ends the process when it is asked for the
        size of an encrypted column.
        """
        own = self._fragment.physical_schema
        texts = {
            name for name in columns if "." not in name and pa.types.is_string(own.field(name).type)
        }
        schema, row_group = self._fragment.metadata.schema, self._fragment.metadata.row_group(group)
        found = []
        for place in range(row_group.num_columns):
            if (name := schema.column(place).path) in texts:
                column = row_group.column(place)
                if column.total_uncompressed_size < _LEAST_TEXT_BYTES * column.num_values:
                    found.append(name)
        return found

    def _groups(self, columns: Sequence[str], keep: Any | None) -> list[int]:
        if keep is None:
            return list(range(self._fragment.metadata.num_row_groups))
        schema = pa.schema([self.schema.field(name) for name in columns])
        return [group.id for group in self._fragment.subset(filter=keep, schema=schema).row_groups]


def _as_read(
    batch: pa.RecordBatch, own: Sequence[str], columns: Sequence[str], rows: int
) -> pa.RecordBatch:
    """Return columns under the names that they are read by; null where the file has none."""
    if batch.schema.names == columns:
        return batch
    arrays = [batch.column(name) if name in batch.schema.names else pa.nulls(rows) for name in own]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _without_columns(rows: int) -> Iterator[pa.RecordBatch]:
    """Yield batches with this number of rows: one without columns would have no length."""
    for first in range(0, rows, BATCH_ROWS):
        nothing = pa.nulls(min(BATCH_ROWS, rows - first))
        yield pa.RecordBatch.from_arrays([nothing], names=[""])


def _batch_rows(group: Any) -> int:
    """Return how many rows of a row group make a batch."""
    rows = _BATCH_BYTES * group.num_rows // max(1, group.total_byte_size)
    return int(min(BATCH_ROWS, max(_LEAST_ROWS, rows)))


def open_files(
    source: str, options: Options | None = None, *, is_alone: bool = False
) -> list[TableFile]:
    """Return the table's files, sorted, with their footers read. Raises ConfigError.

    ``is_alone`` if it is known that they are not a part of a table of a table format.

    In a folder these are all ``.parquet`` and ``.pq`` files in it and below, except names that
    begin with "." or "_". Folders such as ``theme=sea`` give a column to the files in them.
    """
    filesystem, root = filesystem_of(source, options)
    files: list[TableFile] = []
    first_row = 1
    options = options or {}
    for name, path in _listing(source, options, filesystem, root, is_alone=is_alone):
        by_folder = FolderColumns.of(path.removeprefix(root), name)
        file = replace(_open(name, path, options, filesystem, by_folder), first_row=first_row)
        first_row += file.row_count
        files.append(file)
    return files


def _open(
    name: str, path: str, options: Options, filesystem: Any, by_folder: FolderColumns
) -> TableFile:
    with reading(name, path, options, lambda: describe_file(filesystem, path)):
        fragment = ds.ParquetFileFormat().make_fragment(path, filesystem=filesystem)
        fragment.ensure_complete_metadata()
        schema = fragment.physical_schema
        _read_names(schema)
        if (guarantee := by_folder.guarantee(schema)) is not None:
            fragment = ds.ParquetFileFormat().make_fragment(
                path, filesystem=filesystem, partition_expression=guarantee
            )
            fragment.ensure_complete_metadata()
        schema = by_folder.added_to(schema)
        return TableFile(name, schema, 1, path, options, filesystem, fragment, by_folder)


def _read_names(fields: Iterable[pa.Field]) -> None:
    """Read every name, including nested ones: in a damaged file one may not be UTF-8."""
    for one in fields:
        _ = one.name
        _read_names(one.type.field(at) for at in range(one.type.num_fields))


def filesystem_of(source: str, options: Options | None) -> tuple[Any, str]:
    """Return Arrow's file system of a path or URL, and the path in it. Raises ConfigError."""
    if not source.strip():
        raise ConfigError("the prompt table has no name; give a Parquet file, a folder or a URL")
    if database := database_of(source):
        raise ConfigError(
            f"{redact.location(source)} is a database ({database}); give a function as the prompt "
            "table, such as krea_dagster.SqlTable(uri, query)"
        )
    if "://" not in source:
        return fs.LocalFileSystem(), str(Path(source).expanduser().absolute())
    try:
        filesystem, path = open_url(source, options)
    except ImportError as missing:
        # Without the fsspec package for this kind of URL, Arrow may have its own.
        try:
            return tuple(fs.FileSystem.from_uri(_impatient(source)))
        except (pa.ArrowException, OSError, ValueError):
            extra = _EXTRAS.get(file_kind(source))
            advice = f" (pip install 'krea-dagster[{extra}]')" if extra else ""
            raise ConfigError(
                f"{redact.location(source)} cannot be opened: "
                f"{redact.text(str(missing), source)}{advice}"
            ) from redact.safe_cause(missing, source)
    except ConfigError:
        raise
    except Exception as error:  # noqa: BLE001 - each file system has errors of its own
        reason = redact.text(first_line(error), source)
        raise ConfigError(
            f"{redact.location(source)} cannot be opened: {reason}; "
            "give a Parquet file, a folder, or a URL of a kind that fsspec supports"
        ) from redact.safe_cause(error, source)
    return fs.PyFileSystem(fs.FSSpecHandler(filesystem)), path


def _impatient(url: str) -> str:
    """Return a URL with which Arrow's client of Google does not try for a quarter of an hour."""
    if file_kind(url) != "gs" or "retry_limit_seconds" in url:
        return url
    return f"{url}{'&' if '?' in url else '?'}retry_limit_seconds={_GCS_RETRY_S}"


def _listing(
    source: str, options: Options, filesystem: Any, root: str, *, is_alone: bool
) -> list[tuple[str, str]]:
    shown = redact.location(source)
    with reading(shown, source, options):
        info = filesystem.get_file_info(root)
        if not is_alone and (around := table_around(filesystem, root)):
            raise ConfigError(
                f"{shown} is a part of {around[0]}, {around[1]}: name the table, because its files "
                "alone may hold rows that were deleted"
            )
        if info.type == fs.FileType.File:
            return [(shown, root)]
        if info.type == fs.FileType.Directory:
            below = filesystem.get_file_info(fs.FileSelector(root, recursive=True))
            prefix = root.rstrip("/") + "/"
            types = {entry.path.removeprefix(prefix): entry.type for entry in below}
            if isinstance(filesystem, fs.LocalFileSystem):
                types = _dangling_links(root) | types
            found = sorted(
                name
                for name, kind in types.items()
                if kind != fs.FileType.Directory and _is_table(name)
            )
            if within := table_within(types):
                raise ConfigError(
                    f"{shown}/{within[0]} is {within[1]}: its Parquet files alone may hold "
                    "rows that were deleted; name a table that can be read"
                )
            base = shown.rstrip("/")
            for name in found:
                if types[name] == fs.FileType.Unknown:
                    raise ConfigError(f"{base}/{name} is neither a file nor a folder")
            if not found:
                raise ConfigError(
                    f"{shown} is a folder without a Parquet file; add files that end in "
                    f"{' or '.join(PARQUET_ENDINGS)}, or name another folder, or one CSV file"
                )
            return [(f"{base}/{name}", f"{prefix}{name}") for name in found]
    if info.type == fs.FileType.NotFound:
        raise ConfigError(
            f"{shown} does not exist; the prompt table (`prompts`, KREA_PROMPTS) must be a "
            "Parquet, CSV or JSONL file, a folder of Parquet files, a Delta or Iceberg table, or "
            "a URL"
        )
    raise ConfigError(f"{shown} is neither a file nor a folder")


def _dangling_links(root: str) -> dict[str, Any]:
    """Return the dangling links, which Arrow skips, so that their rows would be missing."""
    return {
        path.relative_to(root).as_posix(): fs.FileType.NotFound
        for path in Path(root).rglob("*")
        if path.is_symlink() and not path.exists()
    }


def _is_table(name: str) -> bool:
    is_hidden = any(part[:1] in {".", "_"} for part in name.split("/"))
    return name.lower().endswith(PARQUET_ENDINGS) and not is_hidden


@contextmanager
def reading(
    name: str, path: str, options: Options, described: Callable[[], str] = lambda: ""
) -> Iterator[None]:
    """Raise errors of Arrow and file systems as a ConfigError that names the file.

    ``path`` and ``options`` may hold credentials, which ``name`` does not. A store that does not
    answer or refuses access is said to do so. ``described`` says what a file is, if that is known.
    """
    try:
        yield
    except KreaError:
        raise
    except Exception as error:  # noqa: BLE001 - Arrow and file systems raise errors of any type
        if is_of_client(error) and (
            said := store_error(error, name, options, called="the prompt table")
        ):
            raise ConfigError(redact.text(str(said), path)) from None
        reason = redact.text(first_line(error), path)
        if "crypt" in reason.lower():
            advice = "it is encrypted; write it without encryption"
        elif isinstance(error, PermissionError):
            advice = "allow this user to read it"
        elif found := described():
            advice = f"it is not a Parquet file but {found}; or write it again"
        else:
            advice = "it may be cut short, damaged, or not a Parquet file; write it again"
        cause = redact.safe_cause(error, path)
        raise ConfigError(f"{name} cannot be read: {advice} ({reason})") from cause


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, short and printable."""
    text = str(error).strip()
    line = text.splitlines()[0] if text else type(error).__name__
    return line[:200].encode("unicode_escape").decode() if not line.isprintable() else line[:200]

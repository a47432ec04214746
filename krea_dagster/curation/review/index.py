"""The index of a review: every row of the manifests, joined with what is known of its image.

It is an Arrow table in memory. Rows of earlier attempts are added to the manifests', and columns
for measures, clusters of near-duplicates and acceptance, where those tables exist. An index is
immutable; when files change, a new one is built.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array, united
from krea_dagster.curation.review.measured_rows import find_similar, with_cached_measures
from krea_dagster.curation.review.selection import OPERATORS, kind_of
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, SUCCESSOR, earlier_images
from krea_dagster.parquet_files import open_parquet

#: The folders whose files are in an index.
_FOLDERS: Final = ("manifest", "earlier", "measures", "near_duplicates", "accepted")

#: Columns of ``near_duplicates``, and their names in the index.
_DUPLICATE_COLUMNS: Final = {"cluster": "cluster", "kind": "duplicate", "keep": "duplicate_to_keep"}

#: Columns that the index adds, and that a prompt table may also have.
_ADDED: Final = frozenset(
    {"earlier", "accepted", SUCCESSOR, *_DUPLICATE_COLUMNS.values()}
    | {"tags", "note", "reason", "reviewer", "reviewed_at"}  # of the verdicts
)

#: Columns with more values than this get no list of values.
_MOST_VALUES: Final = 200

#: Columns whose values differ from row to row, so that a list of them is useless.
_SINGLE: Final = frozenset(
    {"prompt", "prompt_id", "request_key", "task_id", "image_path", "image_sha256", "cluster"}
)

#: The columns of the grid.
GRID: Final = (
    "prompt_id", "sample", "attempt", "prompt", "status", "image_sha256", "width", "height",
    "partition_key", "request_key", "earlier", SUCCESSOR, "size", "quality", "error_code",
)  # fmt: skip
#: Characters of a prompt in the grid.
_PROMPT_START: Final = 200


def files_version(storage: Storage) -> str:
    """Return a version of the files that an index is built from: it changes with any of them."""
    hashed = hashlib.sha256()
    for folder in _FOLDERS:
        for name in _parquet_files(storage, folder):
            written = storage.modified_at(name)
            hashed.update(f"{name}\0{storage.size_bytes(name)}\0{written}\n".encode())
    return hashed.hexdigest()[:16]


class ReviewIndex:
    """The rows by number. ``sha_codes`` is the number of each row's image, -1 for none.

    ``generation`` is the version of the files, equal in every process with the same files.
    """

    def __init__(self, table: pa.Table, generation: str) -> None:
        self.table = table.combine_chunks()
        self.generation = generation
        encoded = self.table["image_sha256"].combine_chunks().dictionary_encode()
        self.sha_codes: npt.NDArray[np.int32] = (
            encoded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int32)
        )
        self._shas: list[str] = encoded.dictionary.to_pylist()
        self.codes_by_sha: Mapping[str, int] = {sha: at for at, sha in enumerate(self._shas)}
        # The first row of each image that has its file name, or the first: its file was pruned.
        self._first = np.full(len(self._shas), -1, np.int64)
        named = np.asarray(as_array(pc.is_valid(self.table["image_path"])))
        for mask in (self.sha_codes >= 0, (self.sha_codes >= 0) & named):
            places = np.flatnonzero(mask)[::-1]
            self._first[self.sha_codes[places]] = places
        partitions = self.table["partition_key"].combine_chunks().dictionary_encode()
        self.partitions: list[str] = partitions.dictionary.to_pylist()
        self.partition_codes: npt.NDArray[np.int64] = (
            partitions.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        )
        now = self.table["earlier"].combine_chunks().to_numpy(zero_copy_only=False)
        #: The rows to review: those with an image that are the current attempt.
        self.to_review: npt.NDArray[np.bool_] = (self.sha_codes >= 0) & ~now.astype(bool)
        self._grid = self.table.select(GRID).set_column(
            GRID.index("prompt"),
            "prompt",
            pc.utf8_slice_codeunits(self.table["prompt"], 0, _PROMPT_START),
        )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def file_of(self, sha256: str) -> tuple[str, str, int | None] | None:
        """Return path, format and size of an image, or None where no row has it."""
        code = self.codes_by_sha.get(sha256)
        if code is None:
            return None
        row = int(self._first[code])
        names = ("image_path", "image_format", "image_bytes")
        path, kind, size = (self.table[name][row].as_py() for name in names)
        return None if path is None else (path, kind or "", size)

    def grid_rows(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Return the grid's columns of these rows, with their number as ``row``."""
        numbers = np.fromiter(rows, np.int64)
        found: list[dict[str, Any]] = self._grid.take(pa.array(numbers)).to_pylist()
        return [{"row": int(at), **one} for at, one in zip(numbers, found, strict=True)]

    def whole_row(self, row: int) -> dict[str, Any]:
        """Return all columns of a row."""
        found: dict[str, Any] = self.table.slice(row, 1).to_pylist()[0]
        return found

    def of_prompt(self, row: int) -> list[int]:
        """Return the rows of the same prompt, and the images they replaced, by sample and time."""
        here = self.whole_row(row)
        present = here[SUCCESSOR] or here["request_key"]
        same = pc.equal(self.table["prompt_id"], here["prompt_id"] or None)
        for name in ("request_key", SUCCESSOR):
            same = pc.or_kleene(same, pc.equal(self.table[name], present))
        return self._sorted(same, ("sample", "attempt", "stored_at"))

    def of_cluster(self, row: int) -> list[int]:
        """Return the rows of the same cluster of near-duplicates, or only this row."""
        if "cluster" not in self.table.column_names or self.table["cluster"][row].as_py() is None:
            return [row]
        same = pc.equal(self.table["cluster"], self.table["cluster"][row])
        return self._sorted(same, ("prompt_id", "sample", "attempt"))

    def _sorted(self, mask: pa.ChunkedArray, order: Sequence[str]) -> list[int]:
        rows = np.flatnonzero(mask.fill_null(False).to_numpy(zero_copy_only=False))
        keys = [(name, "ascending") for name in order]
        sorted_ = pc.sort_indices(self.table.select(order).take(pa.array(rows)), sort_keys=keys)
        return [int(at) for at in rows[sorted_.to_numpy()]]

    def columns(self) -> list[dict[str, Any]]:
        """Return name, kind, operators, and values or range of each column."""
        return [describe_column(name, self.table[name]) for name in self.table.column_names]


def describe_column(name: str, column: pa.ChunkedArray) -> dict[str, Any]:
    """Return name, kind, operators, and values or range of a column."""
    kind = kind_of(column.type)
    described: dict[str, Any] = {"name": name, "kind": kind, "operators": OPERATORS[kind]}
    if kind == "list":
        column = pc.list_flatten(column)
    if name not in _SINGLE and pa.types.is_string(column.type):
        counts = pc.value_counts(column)
        if 0 < len(counts) <= _MOST_VALUES:
            found = ((one["values"].as_py(), one["counts"].as_py()) for one in counts)
            described["values"] = sorted(one for one in found if one[0] is not None)
    elif kind == "number":
        bounds = pc.min_max(column).as_py()
        described["range"] = [None if bounds[one] is None else float(bounds[one]) for one in bounds]
    return described


def build_index(storage: Storage, journal: Journal) -> ReviewIndex:
    """Build an index, with the images that are no longer in the manifests.

    Raises ConfigError for a file that cannot be read, and JournalError.
    """
    generation = files_version(storage)
    tables = [MANIFEST_SCHEMA.empty_table(), *_tables(storage, "manifest")]
    table = _with_unique_names(_concatenate(tables, "manifest"))
    table = table.append_column("earlier", pa.array(np.zeros(table.num_rows, bool)))
    table = _with_earlier(table, earlier_images(storage, journal))
    table, cached = with_cached_measures(_join(table, "measures", storage), storage)
    if _has_current_duplicates(storage):
        table = _join(table, "near_duplicates", storage)
    else:
        judged = journal.verdicts.current().items()
        similar = find_similar(table, cached, {sha256: one.verdict for sha256, one in judged})
        table = _with_columns_of(table, "near_duplicates", [similar])
    return ReviewIndex(_join(table, "accepted", storage), generation)


def _has_current_duplicates(storage: Storage) -> bool:
    """Whether there is a table of near-duplicates that is not older than a manifest."""
    made, manifests = (
        [at for name in _parquet_files(storage, folder) if (at := storage.modified_at(name))]
        for folder in ("near_duplicates", "manifest")
    )
    return bool(made) and min(made) >= max(manifests, default=min(made))


# -- files ------------------------------------------------------------------------------------


def _parquet_files(storage: Storage, folder: str) -> list[str]:
    names = storage.names(folder)
    return sorted(name for name in names if name.endswith(".parquet") and "/_" not in name)


def _tables(storage: Storage, folder: str) -> Iterator[pa.Table]:
    for name in _parquet_files(storage, folder):
        try:
            with storage.open(name) as file:
                yield open_parquet(file).read()
        except FileNotFoundError:  # removed just now: the version changes, and the index is rebuilt
            continue
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{name} cannot be read: {error}. Materialize it again.") from error


def _concatenate(tables: Sequence[pa.Table], folder: str) -> pa.Table:
    """Concatenate the files of a folder; a column with incompatible types becomes text."""
    table = united(tables)
    own = (one for one in MANIFEST_SCHEMA if one.name in table.column_names)
    if broken := [one.name for one in own if table.schema.field(one.name).type != one.type]:
        raise ConfigError(
            f"the files of {folder} have incompatible column types: {', '.join(broken)}. "
            "Materialize them again."
        )
    return table


def _with_unique_names(table: pa.Table) -> pa.Table:
    """Rename columns of the prompt table that have the name of a column of the index."""
    names = [f"{name} (table)" if name in _ADDED else name for name in table.column_names]
    table = table.rename_columns(names)
    for at, field in enumerate(table.schema):
        if pa.types.is_float16(field.type):  # Arrow has few functions for it
            table = table.set_column(at, field.name, table[field.name].cast(pa.float32()))
    return table


def _with_earlier(table: pa.Table, earlier: pa.Table) -> pa.Table:
    """Add the rows of earlier images; a column that theirs do not have is that of the successor."""
    if not earlier.num_rows:
        return table.append_column(SUCCESSOR, pa.nulls(table.num_rows, pa.string()))
    successor = as_array(earlier[SUCCESSOR])
    earlier = _with_unique_names(earlier.drop_columns([SUCCESSOR]))
    at = pc.index_in(successor, value_set=as_array(table["request_key"]), skip_nulls=True)
    for name in table.column_names:
        if name not in MANIFEST_SCHEMA.names and name != "earlier":
            values = as_array(table[name]).take(at)
            if name not in earlier.column_names:
                earlier = earlier.append_column(name, values)
            elif earlier.schema.field(name).type == values.type:
                own = pc.coalesce(as_array(earlier[name]), values)
                earlier = earlier.set_column(earlier.column_names.index(name), name, own)
    earlier = earlier.append_column("earlier", pa.array(np.ones(earlier.num_rows, bool)))
    earlier = earlier.append_column(SUCCESSOR, successor)
    return united([table, earlier])


# -- joined tables ----------------------------------------------------------------------------


def _join(table: pa.Table, folder: str, storage: Storage) -> pa.Table:
    """Add the columns of a folder's files to the rows with the same image."""
    return _with_columns_of(table, folder, list(_tables(storage, folder)))


def _with_columns_of(table: pa.Table, folder: str, tables: Sequence[pa.Table]) -> pa.Table:
    tables = [one for one in tables if "image_sha256" in one.column_names]
    if not tables:
        return table
    further = _concatenate(tables, folder)
    shas = as_array(further["image_sha256"])
    if folder == "accepted":
        return table.append_column("accepted", pc.is_in(table["image_sha256"], value_set=shas))
    names, by = {name: name for name in further.column_names}, "image_sha256"
    if folder == "near_duplicates":
        # Where one file was bought twice, one purchase is to be kept and the other is not.
        by = "request_key" if "request_key" in names else by
        names = {name: shown for name, shown in _DUPLICATE_COLUMNS.items() if name in names}
    place = pc.index_in(table[by], value_set=as_array(further[by]))
    for name, shown in names.items():
        kind = further.schema.field(name).type
        plain = kind_of(kind) != "text" or pa.types.is_string(kind)
        if shown not in table.column_names and plain:
            table = table.append_column(shown, as_array(further[name]).take(place))
    return table

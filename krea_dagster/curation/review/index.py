"""The index of a review: every row of the manifests, what is known of its picture, in memory.

Beside the manifests' rows stand the pictures of their earlier attempts, the measures, the clusters
of likeness, and whether a picture was accepted, each where it is there. The columns are Arrow's.
An index is never changed; where files have changed, another is made.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.curation.review.selection import OPERATORS, as_text, kind_of
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import Verdict
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, credits_charged
from krea_dagster.models import credits_from_units
from krea_dagster.spend.tables.prompt_rows import load_listed

#: The folders whose files an index is made of.
_FOLDERS: Final = ("manifest", "measures", "near_duplicates", "accepted")

#: What likeness says of a picture, and what it is called here.
_LIKENESS: Final = {"cluster": "cluster", "kind": "duplicate", "keep": "duplicate_to_keep"}

#: Columns that the index adds, and a prompt table may have as well.
_OWN: Final = frozenset({"earlier", "accepted", *_LIKENESS.values()})

#: More values than this are not offered as a list.
_MOST_VALUES: Final = 200

#: Columns whose values differ from row to row.
_SINGLE: Final = frozenset(
    {"prompt", "prompt_id", "request_key", "task_id", "image_path", "image_sha256", "cluster"}
)

#: What one row of the grid shows.
GRID: Final = (
    "prompt_id", "sample", "attempt", "prompt", "status", "image_sha256", "width", "height",
    "partition_key", "request_key", "earlier", "error_code",
)  # fmt: skip
#: The characters of a prompt that the grid shows.
_PROMPT_START: Final = 200


@dataclass(frozen=True)
class Stamp:
    """The files that an index was made of, as one text that changes with any of them."""

    text: str

    @classmethod
    def of(cls, storage: Storage) -> Stamp:
        """The stamp of the files as they are now."""
        seen = hashlib.sha256()
        for name in _files(storage):
            written = storage.modified_at(name)
            seen.update(f"{name}\0{storage.size_bytes(name)}\0{written}\n".encode())
        return cls(seen.hexdigest()[:16])


class ReviewIndex:
    """The rows, by their numbers. ``sha_codes`` says which picture each row has; -1 none.

    ``generation`` names the files' state: it is the same in another process over the same files.
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
        # The first row of each picture, where its file's name is taken from.
        self._first = np.full(len(self._shas), -1, np.int64)
        places = np.flatnonzero(self.sha_codes >= 0)[::-1]
        self._first[self.sha_codes[places]] = places
        partitions = self.table["partition_key"].combine_chunks().dictionary_encode()
        self.partitions: list[str] = partitions.dictionary.to_pylist()
        self.partition_codes: npt.NDArray[np.int64] = (
            partitions.indices.fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64)
        )
        now = self.table["earlier"].combine_chunks().to_numpy(zero_copy_only=False)
        #: The rows that have a picture and are the present attempt: what is to be reviewed.
        self.to_review: npt.NDArray[np.bool_] = (self.sha_codes >= 0) & ~now.astype(bool)
        self._grid = self.table.select(GRID).set_column(
            GRID.index("prompt"),
            "prompt",
            pc.utf8_slice_codeunits(self.table["prompt"], 0, _PROMPT_START),
        )

    def __len__(self) -> int:
        return int(self.table.num_rows)

    def file_of(self, sha256: str) -> tuple[str, str, int | None] | None:
        """The path, the format and the bytes of a picture, or None where no row has it."""
        code = self.codes_by_sha.get(sha256)
        if code is None:
            return None
        row = int(self._first[code])
        names = ("image_path", "image_format", "image_bytes")
        path, kind, size = (self.table[name][row].as_py() for name in names)
        return None if path is None else (path, kind or "", size)

    def grid_rows(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """What the grid shows of these rows; ``row`` is the number."""
        numbers = np.fromiter(rows, np.int64)
        found: list[dict[str, Any]] = self._grid.take(pa.array(numbers)).to_pylist()
        return [{"row": int(at), **one} for at, one in zip(numbers, found, strict=True)]

    def whole_row(self, row: int) -> dict[str, Any]:
        """Every column of a row."""
        found: dict[str, Any] = self.table.slice(row, 1).to_pylist()[0]
        return found

    def of_prompt(self, row: int) -> list[int]:
        """The rows of the same prompt: samples and attempts, in that order."""
        return self._like(row, "prompt_id", ("sample", "attempt"))

    def of_cluster(self, row: int) -> list[int]:
        """The rows whose picture is like this one's; the row alone where none is."""
        if "cluster" not in self.table.column_names or self.table["cluster"][row].as_py() is None:
            return [row]
        return self._like(row, "cluster", ("prompt_id", "sample", "attempt"))

    def _like(self, row: int, column: str, order: Sequence[str]) -> list[int]:
        alike = pc.equal(self.table[column], self.table[column][row]).fill_null(False)
        rows = np.flatnonzero(alike.to_numpy(zero_copy_only=False))
        keys = [(name, "ascending") for name in order]
        sorted_ = pc.sort_indices(self.table.select(order).take(pa.array(rows)), sort_keys=keys)
        return [int(at) for at in rows[sorted_.to_numpy()]]

    def columns(self) -> list[dict[str, Any]]:
        """The columns: name, kind, what may be asked of them, and their values or range."""
        return [_column(name, self.table[name]) for name in self.table.column_names]


def _column(name: str, column: pa.ChunkedArray) -> dict[str, Any]:
    kind = kind_of(column.type)
    said: dict[str, Any] = {"name": name, "kind": kind, "operators": OPERATORS[kind]}
    if kind == "text" and name not in _SINGLE and pa.types.is_string(column.type):
        counts = pc.value_counts(column)
        if 0 < len(counts) <= _MOST_VALUES:
            found = ((one["values"].as_py(), one["counts"].as_py()) for one in counts)
            said["values"] = sorted(one for one in found if one[0] is not None)
    elif kind == "number":
        bounds = pc.min_max(column).as_py()
        said["range"] = [None if bounds[one] is None else float(bounds[one]) for one in bounds]
    return said


def build_index(
    storage: Storage, journal: Journal, verdicts: Iterable[Verdict] = ()
) -> ReviewIndex:
    """Read all that is on file. ``verdicts`` name pictures that manifests do not list any more.

    Raises ConfigError for a file that cannot be read, and JournalError.
    """
    stamp = Stamp.of(storage)
    tables = [MANIFEST_SCHEMA.empty_table(), *_tables(storage, "manifest")]
    table = _plainly_named(_together(tables, "manifest"))
    table = table.append_column("earlier", pa.array(np.zeros(table.num_rows, bool)))
    earlier = _earlier(storage, journal, table, verdicts)
    if earlier is not None:
        table = pa.concat_tables([table, earlier], promote_options="permissive")
    for folder in ("measures", "near_duplicates", "accepted"):
        table = _beside(table, folder, list(_tables(storage, folder)))
    return ReviewIndex(table, stamp.text)


# -- files ------------------------------------------------------------------------------------


def _files(storage: Storage) -> Iterator[str]:
    for folder in _FOLDERS:
        for name in sorted(storage.names(folder)):
            if name.endswith(".parquet"):
                yield name


def _tables(storage: Storage, folder: str) -> Iterator[pa.Table]:
    for name in sorted(storage.names(folder)):
        if not name.endswith(".parquet"):
            continue
        try:
            with storage.open(name) as file:
                yield pq.read_table(file)
        except FileNotFoundError:  # replaced or removed just now: the next stamp differs
            continue
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(f"{name} cannot be read: {error}. Materialize it again.") from error


def _together(tables: Sequence[pa.Table], folder: str) -> pa.Table:
    """Put the files of a folder together; a column whose types do not agree becomes text."""
    clashing = {
        name
        for name in {name for one in tables for name in one.column_names}
        if not _agree({one.schema.field(name).type for one in tables if name in one.column_names})
    }
    if own := clashing.intersection(MANIFEST_SCHEMA.names):
        raise ConfigError(
            f"the files of {folder} have columns of types that do not agree: {', '.join(own)}. "
            "Materialize them again."
        )
    return pa.concat_tables(
        [_with_texts(one, clashing) for one in tables], promote_options="permissive"
    )


def _agree(types: Iterable[pa.DataType]) -> bool:
    schemas = [pa.schema([("column", one)]) for one in types]
    try:
        pa.unify_schemas(schemas, promote_options="permissive")
    except pa.ArrowException:
        return False
    return True


def _with_texts(table: pa.Table, names: Collection[str]) -> pa.Table:
    for at, name in enumerate(table.column_names):
        if name in names:
            table = table.set_column(at, name, as_text(table[name]))
    return table


def _plainly_named(table: pa.Table) -> pa.Table:
    """Return manifests whose further columns have no name of the index's own."""
    names = [f"{name} (table)" if name in _OWN else name for name in table.column_names]
    table = table.rename_columns(names)
    for at, field in enumerate(table.schema):
        if pa.types.is_float16(field.type):  # of which Arrow can compute little
            table = table.set_column(at, field.name, table[field.name].cast(pa.float32()))
    return table


# -- what stands beside the manifest ----------------------------------------------------------


def _beside(table: pa.Table, folder: str, tables: Sequence[pa.Table]) -> pa.Table:
    """Append a folder's columns to the rows with the same picture; nothing where it is empty."""
    tables = [one for one in tables if "image_sha256" in one.column_names]
    if not tables:
        return table
    further = _together(tables, folder)
    shas = further["image_sha256"].combine_chunks()
    if folder == "accepted":
        return table.append_column("accepted", pc.is_in(table["image_sha256"], value_set=shas))
    names, by = {name: name for name in further.column_names}, "image_sha256"
    if folder == "near_duplicates":
        # Of one file that was bought twice, one purchase is to be kept and the other is not.
        by = "request_key" if "request_key" in names else by
        names = {name: shown for name, shown in _LIKENESS.items() if name in names}
    place = pc.index_in(table[by], value_set=further[by].combine_chunks())
    for name, shown in names.items():
        kind = further.schema.field(name).type
        plain = kind_of(kind) != "text" or pa.types.is_string(kind)
        if shown not in table.column_names and plain:
            table = table.append_column(shown, further[name].combine_chunks().take(place))
    return table


def _earlier(
    storage: Storage, journal: Journal, table: pa.Table, verdicts: Iterable[Verdict]
) -> pa.Table | None:
    """The rows of pictures that a later attempt has replaced, as far as the journal has them.

    They have the further columns of the present row.
    """
    present = set(table["request_key"].to_pylist()) if table.num_rows else set()
    asked = {
        one.request_key: (one.prompt_id, one.sample)
        for one in verdicts
        if one.request_key not in present
    }
    if table.num_rows and pc.any(pc.greater(table["attempt"], 0)).as_py():
        with duckdb.connect() as duck, journal.reading() as connection:
            load_listed(duck, storage, connection)
            found = duck.execute("SELECT request_key, prompt_id, sample FROM listed").fetchall()
        asked |= {key: (prompt, sample) for key, prompt, sample in found if key not in present}
    records = {
        key: one for key, one in journal.records(sorted(asked)).items() if one.image is not None
    }
    if not records:
        return None
    rows: dict[tuple[str, int], int] = {}
    wanted = {asked[key] for key in records}
    names = (table[name].to_pylist() for name in ("prompt_id", "sample"))
    for at, row in enumerate(zip(*names, strict=True)):
        if row in wanted:
            rows.setdefault(row, at)
    # The manifest's own columns are the record's; the further ones are the present row's.
    own = [*MANIFEST_SCHEMA.names, "earlier"]
    further = [name for name in table.column_names if name not in own]
    order = sorted(records, key=lambda key: (*asked[key], records[key].request.attempt))
    values = [_row(records[key], asked[key], storage) for key in order]
    schema = pa.schema([*MANIFEST_SCHEMA, pa.field("earlier", pa.bool_())])
    made = pa.Table.from_pylist(values, schema=schema)
    places = pa.array([rows.get(asked[key]) for key in order], pa.int64())
    for name in further:
        made = made.append_column(name, table[name].combine_chunks().take(places))
    return made


def _row(record: Record, listed: tuple[str, int], storage: Storage) -> dict[str, Any]:
    """A record as a row of the manifest."""
    image, request = record.image, record.request
    reserved = record.reserved_units
    row: dict[str, Any] = {
        "prompt_id": listed[0],
        "sample": listed[1],
        "partition_key": record.partition_key,
        "status": record.state.value,
        "credits_charged": credits_charged(record),
        "credits_reserved": None if reserved is None else credits_from_units(reserved),
        "reused": True,
        "earlier": True,
    }
    for name in ("prompt", "model", "size", "quality", "seed", "nsfw_check", "attempt"):
        row[name] = getattr(request, name)
    for name in (
        "task_id", "billing_rule", "user_group", "submitted_at", "completed_at", "stored_at",
        "run_id", "error_code", "error_message",
    ):  # fmt: skip
        row[name] = getattr(record, name)
    row["request_key"] = request.request_key
    if image is not None:
        row |= {
            "image_path": storage.locate(image.path),
            "image_sha256": image.sha256,
            "image_bytes": image.bytes,
            "image_format": image.format,
            "width": image.width,
            "height": image.height,
        }
    return row

"""Selects the rows of an export, and keeps them on disk during the export.

They come from ``accepted/<partition>.parquet``, or from the manifests for all stored images.
Selected rows are written to a temporary file and memory-mapped, so their number is not limited by
memory.
"""

from __future__ import annotations

import hashlib
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.column_filter import ColumnFilter, matching
from krea_dagster.curation.export.exported_types import ExportedTypes
from krea_dagster.curation.export.image_content import ADDED_NAMES
from krea_dagster.curation.export.image_edits import ImageEdits
from krea_dagster.curation.export.json_rows import records, to_json
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.export.table_batches import EarlierTable, JudgedTable, PartitionTable
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import no_column, table_name, table_names
from krea_dagster.parquet_files import open_parquet

#: Columns that are only meaningful in the storage root, and are exported only if they are named.
LEFT_OUT: Final = ("status", "image_path", "reused", "error_code", "error_message")

#: Columns that an export needs, also if they are not exported.
_NEEDED: Final = (
    "prompt_id",
    "sample",
    "prompt",
    "model",
    "size",
    "quality",
    "seed",
    "request_key",
    "image_path",
    "image_sha256",
    "image_bytes",
    "image_format",
    "credits_charged",
    "stored_at",
)
#: Columns that the card uses if they are there.
_USED: Final = ("verdict",)


#: Column names reserved by a format.
_RESERVED: Final = {
    "parquet": ("image",),
    "imagefolder": ("image", "file_name"),
    "jsonl": ("file_name",),
    "csv": ("file_name",),
    "webdataset": (),
}

Numbers = npt.NDArray[np.int64]


class SelectedRows:
    """The selected rows, sorted by their keys.

    ``keys`` are 24 hexadecimal digits, from the request, the prompt_id and the sample: the
    permanent name of an image in exports. ``edits`` is what happens to their files. ``digests`` are
    the sha256 of all that is written for a row. ``sizes`` are the bytes of the images.
    ``with_nulls`` are the exported columns that have a null. ``left_by_filter`` and ``repeated``
    count rows that were read and left out.
    """

    def __init__(
        self,
        file: _RowFile,
        columns: Sequence[str],
        exported: Sequence[str],
        edits: ImageEdits,
        left_by_filter: int,
    ) -> None:
        self._file = file
        self.columns = tuple(columns)
        self._exported = tuple(exported)
        self.edits = edits
        self.left_by_filter = left_by_filter
        keys: list[bytes] = []
        digests: list[bytes] = []
        sizes: list[int] = []
        nulls: set[str] = set()
        names = list(zip(exported, columns, strict=True))
        for batch in self._file.batches():
            table = pa.Table.from_batches([batch])
            keys += _keys(table)
            images = table["image_sha256"].to_pylist()
            digests += map(_digest, records(table.select(self.columns)), images)
            sizes += table["image_bytes"].fill_null(0).to_pylist()
            nulls.update(one for one, name in names if table[name].null_count)
        self.with_nulls = frozenset(nulls)
        self.keys, first = np.unique(np.array(keys, "S24"), return_index=True)
        self._places: Numbers = first.astype(np.int64)
        self.digests = np.frombuffer(b"".join(digests), np.uint8).reshape(-1, 32)[first]
        self.sizes: Numbers = np.array(sizes, np.int64)[first]
        self.repeated = len(keys) - len(first)

    def __len__(self) -> int:
        return len(self.keys)

    @property
    def has_verdicts(self) -> bool:
        """Whether the rows have verdicts of people."""
        return "verdict" in self._file.schema.names

    @property
    def schema(self) -> pa.Schema:
        """Return the exported columns, under their exported names."""
        fields = (self._file.schema.field(name) for name in self.columns)
        return pa.schema(
            [one.with_name(name) for one, name in zip(fields, self._exported, strict=True)]
        )

    def exported(self, table: pa.Table) -> pa.Table:
        """Return the exported columns of some rows, under their exported names."""
        table = self.edits.described(table.select(self.columns))
        return table.rename_columns(list(self._exported))

    def take(self, rows: Numbers, columns: Sequence[str] | None = None) -> pa.Table:
        """Return these rows in this order, with all columns or some."""
        return self._file.take(self._places[rows], columns)

    def column(self, name: str) -> pa.ChunkedArray:
        """Return a column of all rows."""
        return self.take(np.arange(len(self)), [name])[name]


@contextmanager
def select_rows(
    storage: Storage,
    spec: ExportSpec,
    folders: Sequence[str] = (),
    *,
    origin: str = "",
    earlier: pa.Table | None = None,
    verdicts: pa.Table | None = None,
) -> Iterator[SelectedRows]:
    """Yield the selected rows of an export, whose temporary file exists until the end.

    ``origin`` is where the images come from. ``earlier`` images are exported with those of the
    tables. ``verdicts`` are columns (see ``JudgedTable``).

    Raises ConfigError where there are none, for a partition without a file, and for columns that
    are in no file or have a reserved name.
    """
    names = _names(storage, spec, folders)
    types = ExportedTypes.of(spec.form)
    tables = _tables(storage, names, earlier, verdicts)
    try:
        schema = pa.unify_schemas(
            [table.schema(types) for table in tables], promote_options="permissive"
        )
    except pa.ArrowException as error:
        raise ConfigError(
            f"a column has different types in different partitions: {error}. Give it one type in "
            "the prompt table, and materialize the partitions again; nothing was published"
        ) from None
    known = schema.names
    columns = [*(spec.columns or (name for name in known if name not in LEFT_OUT))]
    filters = spec.filters
    if spec.kept:
        filters = (*filters, ColumnFilter("verdict", ("keep",)))
    for name in [*columns, *_NEEDED, *(one.column for one in filters)]:
        if name not in known:
            raise no_column(name, known)
    edits = ImageEdits.of(spec, origin)
    exported = _exported_names(spec, columns, edits)
    wanted = dict.fromkeys([*columns, *_NEEDED, *(name for name in _USED if name in known)])
    kept = pa.schema([(name, types.type_of(schema.field(name).type)) for name in wanted])
    filtered = [one.column for one in filters]
    with closing(_RowFile(kept, types)) as file:
        left = 0
        chosen = pa.array(sorted(spec.prompt_ids or ()), pa.string())
        for table in tables:
            for batch in table.batches([*kept.names, *filtered, "prompt_id"]):
                mask = matching(batch, filters)
                if spec.prompt_ids is not None:
                    mask = pc.and_(mask, pc.is_in(batch.column("prompt_id"), value_set=chosen))
                left += batch.num_rows - int(pc.sum(mask).as_py() or 0)
                file.write(batch.filter(mask))
        rows = SelectedRows(file, columns, exported, edits, left)
        if not len(rows):
            raise ConfigError(_no_rows(storage, spec, left))
        yield rows


def _tables(
    storage: Storage, names: Sequence[str], earlier: pa.Table | None, verdicts: pa.Table | None
) -> Sequence[PartitionTable | EarlierTable | JudgedTable]:
    found: list[PartitionTable | EarlierTable] = [PartitionTable(storage, one) for one in names]
    found += [] if earlier is None else [EarlierTable(earlier)]
    return found if verdicts is None else [JudgedTable(one, verdicts) for one in found]


def left_out_partitions(
    storage: Storage, spec: ExportSpec, folders: Sequence[str] = ()
) -> list[str]:
    """Return the partitions with images that have no accepted ones, so that none is exported.

    None are left out where partitions were chosen.
    """
    if spec.everything or spec.partitions is not None:
        return []
    accepted = {_stem(name) for name in table_names(storage, "accepted", folders)}
    missing = [
        name for name in table_names(storage, "manifest", folders) if _stem(name) not in accepted
    ]
    return sorted(_stem(name) for name in missing if _has_image(storage, name))


def _stem(name: str) -> str:
    return name.rpartition("/")[2].removesuffix(".parquet")


def _has_image(storage: Storage, name: str) -> bool:
    with storage.open(name) as file:
        images = open_parquet(file).read(["image_sha256"])["image_sha256"]
    return bool(images.null_count < len(images))


def _exported_names(spec: ExportSpec, columns: Sequence[str], edits: ImageEdits) -> list[str]:
    """Return the name of each column in the export. Raises ConfigError."""
    names = [spec.names.get(name, name) for name in columns]
    reserved = [*_RESERVED[spec.form], *(ADDED_NAMES if edits.changes_files else ())]
    if taken := [name for name in names if name in reserved]:
        raise ConfigError(
            f"the column {taken[0]!r} would be exported, a name that is reserved in {spec.form}; "
            f"export it under another name (--column {taken[0]}=NAME), or select the columns"
        )
    if twice := [name for name in names if names.count(name) > 1]:
        raise ConfigError(f"two columns would be exported as {twice[0]!r}; rename one of them")
    return names


# -- files -----------------------------------------------------------------------------------


def _names(storage: Storage, spec: ExportSpec, folders: Sequence[str]) -> list[str]:
    kind = "manifest" if spec.everything else "accepted"
    if spec.partitions is None:
        if names := sorted(table_names(storage, kind, folders)):
            return names
        raise ConfigError(
            f"there is no table below {storage.locate('/'.join([kind, *folders]))} yet. "
            + (
                "Materialize image_manifest first"
                if spec.everything
                else "Materialize accepted_images first, or export all stored images (--all)"
            )
        )
    found = {key: table_name(kind, key, folders) for key in spec.partitions}
    for key, name in found.items():
        if storage.size_bytes(name) is None:
            raise ConfigError(f"the partition {key!r} has no table at {storage.locate(name)}")
    return list(found.values())


def _no_rows(storage: Storage, spec: ExportSpec, left: int) -> str:
    kind = "stored" if spec.everything else "accepted"
    if left:
        return f"no {kind} image matches the filters, which left out {left}"
    return f"there is no {kind} image in the tables of {storage.locate('')}"


# -- keys and digests ------------------------------------------------------------------------


def _keys(table: pa.Table) -> list[bytes]:
    parts = zip(
        table["request_key"].to_pylist(),
        table["prompt_id"].to_pylist(),
        table["sample"].to_pylist(),
        strict=True,
    )
    return [
        hashlib.sha256(f"krea-dagster/1/export\x1f{key}\x1f{sample}\x1f{prompt_id}".encode())
        .hexdigest()[:24]
        .encode()
        for key, prompt_id, sample in parts
    ]


def _digest(record: dict[str, Any], image_sha256: str) -> bytes:
    return hashlib.sha256(f"{to_json(record)}\x1f{image_sha256}".encode()).digest()


# -- the temporary file ----------------------------------------------------------------------


class _RowFile:
    """A temporary Arrow file of rows: first written, then memory-mapped."""

    def __init__(self, schema: pa.Schema, types: ExportedTypes) -> None:
        self.schema = schema
        self._types = types
        self._folder = tempfile.TemporaryDirectory(prefix="krea-export-")
        self._path = Path(self._folder.name) / "rows.arrow"
        self._writer: Any = pa.ipc.new_file(str(self._path), schema)
        self._starts = [0]
        self._map: Any = None
        self._file: Any = None
        self._lock = threading.Lock()

    def write(self, batch: pa.RecordBatch) -> None:
        if not batch.num_rows:
            return
        has = set(batch.schema.names)
        columns = [
            self._types.convert(batch.column(field.name)).cast(field.type)
            if field.name in has
            else pa.nulls(batch.num_rows, field.type)
            for field in self.schema
        ]
        self._writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=self.schema))
        self._starts.append(self._starts[-1] + batch.num_rows)

    def batches(self) -> Iterator[pa.RecordBatch]:
        opened = self._open()
        for number in range(opened.num_record_batches):
            yield opened.get_batch(number)

    def take(self, rows: Numbers, columns: Sequence[str] | None = None) -> pa.Table:
        names = self.schema.names if columns is None else list(columns)
        opened = self._open()
        order = np.argsort(rows, kind="stable")
        ordered = rows[order]
        of = np.searchsorted(self._starts, ordered, side="right") - 1
        found = []
        for number in np.unique(of):
            local = ordered[of == number] - self._starts[number]
            with self._lock:
                batch = opened.get_batch(int(number))
            found.append(batch.select(names).take(pa.array(local)))
        schema = pa.schema([self.schema.field(name) for name in names])
        back = np.empty(len(order), np.int64)
        back[order] = np.arange(len(order))
        gathered = pa.Table.from_batches(found, schema).combine_chunks()
        return gathered.take(pa.array(back))

    def close(self) -> None:
        self._writer.close()
        if self._map is not None:
            self._map.close()
        self._folder.cleanup()

    def _open(self) -> Any:
        if self._file is None:
            self._writer.close()
            self._map = pa.memory_map(str(self._path))
            self._file = pa.ipc.open_file(self._map)
        return self._file

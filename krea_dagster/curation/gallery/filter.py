"""Selects the manifest rows of a gallery by partition, status, verdict and column values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.column_filter import ColumnFilter, matching
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import NONE, Verdict
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import manifest_name, manifest_names, no_column
from krea_dagster.parquet_files import open_parquet

#: The columns of a row.
COLUMNS: Final = (
    "prompt_id", "sample", "prompt", "size", "quality", "seed", "attempt", "request_key",
    "partition_key", "status", "image_path", "image_sha256", "width", "height",
    "credits_charged", "error_code", "error_message",
)  # fmt: skip

#: For images without a verdict.
NO_VERDICT: Final = NONE
VERDICTS: Final = ("keep", "reject", "flag", NO_VERDICT)

#: Rows per batch read.
_ROWS: Final = 10_000


@dataclass(frozen=True)
class GalleryFilter:
    """Which rows are shown: those that match all conditions; an empty sequence matches any row.

    ``where`` holds columns and values, as text. An empty value matches null and empty text. A
    column given several times matches any of its values. ``verdicts`` may contain ``none``.
    ``earlier`` also shows the images of rows that were changed or removed. ``by`` is the column
    whose values are the page's sections.
    """

    partitions: Sequence[str] = ()
    where: Sequence[ColumnFilter] = ()
    statuses: Sequence[str] = (State.STORED.value,)
    verdicts: Sequence[str] = ()
    limit: int = 500
    earlier: bool = False
    by: str = "partition_key"

    def __post_init__(self) -> None:
        known = {state.value for state in State}
        for status in self.statuses:
            if status not in known:
                raise ConfigError(f"unknown status {status!r}; use one of {_list(known)}")
        for verdict in self.verdicts:
            if verdict not in VERDICTS:
                raise ConfigError(f"unknown verdict {verdict!r}; use one of {_list(VERDICTS)}")
        if self.limit < 1:
            raise ConfigError(f"the limit of a gallery must be 1 or more, not {self.limit}")

    def words(self) -> str:
        """Return the filter as a line for the page; empty for all stored rows."""
        conditions = []
        if self.partitions:
            conditions.append(f"partition {' or '.join(self.partitions)}")
        for one in self.where:
            values = " or ".join(value or "nothing" for value in one.values)
            conditions.append(f"{one.column} is {values}")
        if self.statuses and tuple(self.statuses) != (State.STORED.value,):
            conditions.append(f"status {' or '.join(self.statuses)}")
        if self.verdicts:
            conditions.append(f"verdict {' or '.join(self.verdicts)}")
        if self.earlier:
            conditions.append("with earlier images")
        return ", ".join(conditions)


@dataclass
class GalleryRows:
    """The selected rows in the order of the partitions and the prompt table.

    ``matched`` counts all matching rows; ``rows`` are the first of them, up to the limit.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    matched: int = 0


def select_rows(
    storage: Storage,
    filters: GalleryFilter,
    verdicts: Mapping[str, Verdict],
    folders: Sequence[str] = (),
    earlier: pa.Table | None = None,
) -> GalleryRows:
    """Select rows of the manifests. ``verdicts`` say what was said last of an image, by sha256.

    Each row has ``COLUMNS``, the column of ``filters.by`` as ``section``, ``said`` (its verdict
    with reason, tags and note, or None) and ``earlier``: the rows of that table follow those of the
    manifests. Raises ConfigError for an unknown partition or column, for an invalid value, and
    where there is no manifest.
    """
    known: dict[str, None] = {}
    reviewed = pa.array(verdicts, pa.string())
    given = pa.array((one.verdict for one in verdicts.values()), pa.string())
    found = GalleryRows()
    wanted = list(dict.fromkeys([*COLUMNS, filters.by, *(one.column for one in filters.where)]))

    def add(batches: Iterable[pa.RecordBatch], *, earlier: bool) -> None:
        for batch in batches:
            images = batch.column("image_sha256")
            verdict = given.take(pc.index_in(images, value_set=reviewed))
            rows = _matching(batch, filters, verdict)
            found.matched += rows.num_rows
            room = filters.limit - len(found.rows)
            for row in rows.slice(0, room).to_pylist():
                said = verdicts.get(row["image_sha256"])
                section = row.get(filters.by)
                found.rows.append({**row, "said": said, "section": section, "earlier": earlier})

    for name in _names(storage, filters, folders):
        with storage.open(name) as opened:
            file = open_parquet(opened)
            known |= dict.fromkeys(file.schema_arrow.names)
            present = [one for one in wanted if one in file.schema_arrow.names]
            add(file.iter_batches(_ROWS, columns=present), earlier=False)
    if earlier is not None:
        known |= dict.fromkeys(earlier.column_names)
        if filters.partitions:
            wished = pa.array(filters.partitions, pa.string())
            earlier = earlier.filter(pc.is_in(earlier["partition_key"], value_set=wished))
        present = [one for one in wanted if one in earlier.column_names]
        add(earlier.select(present).to_batches(), earlier=True)
    for column in (filters.by, *(one.column for one in filters.where)):
        if column not in known:
            raise no_column(column, known)
    return found


def _names(storage: Storage, filters: GalleryFilter, folders: Sequence[str]) -> Iterator[str]:
    if not filters.partitions:
        names = sorted(manifest_names(storage, folders))
        if not names:
            raise ConfigError(
                f"there is no manifest under {storage.locate('')} yet; materialize image_manifest, "
                "or check that KREA_STORAGE is the storage root of the runs"
            )
        yield from names
        return
    for key in dict.fromkeys(filters.partitions):
        name = manifest_name(key, folders)
        if storage.size_bytes(name) is None:
            raise ConfigError(f"there is no manifest of partition {key!r}: {storage.locate(name)}")
        yield name


def _matching(batch: pa.RecordBatch, filters: GalleryFilter, verdict: pa.Array) -> pa.Table:
    """Return the matching rows of a batch, with their verdicts."""
    mask = matching(batch, filters.where)
    if filters.statuses:
        mask = pc.and_(mask, pc.is_in(batch.column("status"), value_set=pa.array(filters.statuses)))
    if filters.verdicts:
        shown = verdict.fill_null(NO_VERDICT)
        mask = pc.and_(mask, pc.is_in(shown, value_set=pa.array(filters.verdicts)))
    return pa.Table.from_batches([batch]).filter(mask)


def _list(words: Sequence[str] | set[str]) -> str:
    return ", ".join(sorted(words))

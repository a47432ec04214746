"""Measures the stored images of partitions: takes what is known, and reads only other files.

What has been measured is kept as it goes, so that a killed run is gone on with where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.measures.cache import DIGEST, KEY, MeasureCache, MeasureWriter, digests
from krea_dagster.curation.measures.custom import Measure, checked
from krea_dagster.curation.measures.decoding import ImageFile, MeasureFailure, measure_files
from krea_dagster.curation.measures.measures_table import (
    BUILTIN,
    measures_schema,
    read_valid_measures,
    write_measures,
)
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import read_manifests

_COLUMNS: Final = (
    "image_sha256", "width", "height", "image_path", "prompt_id", "sample", "status",
)  # fmt: skip

#: Images that are looked up in the cache at once: each time, all of it is read.
_GROUP_IMAGES: Final = 200_000

#: Rows that are turned from Arrow into Python at once.
_BATCH: Final = 1_000

#: Seconds that figures wait, at most, before they are written: a model's work is dear.
_WAIT_S: Final = 10.0

_Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class MeasuredPartition:
    """A partition whose measures are written; ``table`` holds them.

    ``images`` counts distinct files; ``read`` of them had to be decoded, for the others all was
    known. ``troubles`` names those that have no row, or lack a user's value.
    """

    partition_key: str
    path: str
    table: pa.Table
    images: int
    read: int
    troubles: Sequence[MeasureFailure]


def measure_partitions(
    storage: Storage,
    partition_keys: Sequence[str],
    *,
    folders: Sequence[str] = (),
    further: Iterable[Measure] = (),
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _read, _of: None,
) -> Iterator[MeasuredPartition]:
    """Measure the stored images of some partitions, by their manifests; yield each when written.

    ``folders`` are those of the manifests. ``threads`` decode at once, by default one for each
    core. ``on_progress`` is told how many of the files that are to be read have been.

    A file that is missing, damaged or another than the manifest says gets no row; a picture that
    a user's function fails on gets no value. Both are named, and tried again next time. Raises
    ConfigError where a function fails on one picture after the other, and StorageError.
    """
    own = {one.name: one for one in checked(further)}
    group: list[_Partition] = []
    for key in partition_keys:
        group.append(_Partition.read(storage, key, folders))
        if sum(len(one.sha256) for one in group) >= _GROUP_IMAGES:
            yield from _measured(
                storage, group, folders, own, threads=threads, on_progress=on_progress
            )
            group = []
    if group:
        yield from _measured(storage, group, folders, own, threads=threads, on_progress=on_progress)


@dataclass(frozen=True)
class _Partition:
    """The distinct stored images of a manifest in its order, and their hashes as bytes."""

    key: str
    rows: pa.Table
    sha256: pa.Array

    @classmethod
    def read(cls, storage: Storage, key: str, folders: Sequence[str]) -> _Partition:
        rows = read_manifests(storage, [key], _COLUMNS, folders)
        if not len(rows):  # of a manifest that is not there, not even the columns are known
            return cls(key, rows, pa.array([], DIGEST))
        stored = pc.equal(rows["status"], State.STORED.value)
        hashed = pc.match_substring_regex(rows["image_sha256"], "^[0-9a-f]{64}$").fill_null(False)
        rows = rows.filter(pc.and_(stored, hashed))
        sha256 = digests(rows["image_sha256"])
        codes = sha256.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        _, first = np.unique(codes, return_index=True)
        first.sort()
        return cls(key, rows.take(first), sha256.take(first))


@dataclass(frozen=True)
class _Known:
    """The figures of one kind that are known, and the images that lack them."""

    table: pa.Table
    lacking: pa.Array

    @classmethod
    def find(cls, cache: MeasureCache, before: pa.Table, wanted: pa.Array) -> _Known:
        """Take them from the partition's earlier files first, then from the cache."""
        table = before
        lacking = wanted.filter(pc.invert(_among(wanted, table)))
        if len(lacking):
            found = cache.find(lacking)
            table = pa.concat_tables([table, found])
            lacking = lacking.filter(pc.invert(_among(lacking, found)))
        return cls(table, lacking)


def _measured(
    storage: Storage,
    group: Sequence[_Partition],
    folders: Sequence[str],
    own: Mapping[str, Measure],
    *,
    threads: int | None,
    on_progress: Callable[[int, int], None],
) -> Iterator[MeasuredPartition]:
    versions = {name: one.version for name, one in own.items()}
    before = [read_valid_measures(storage, one.key, versions, folders) for one in group]
    caches = {BUILTIN: MeasureCache.builtin(storage)} | {
        name: MeasureCache.custom(storage, name, version) for name, version in versions.items()
    }
    wanted = pc.unique(pa.chunked_array([one.sha256 for one in group], DIGEST))
    known = {
        kind: _Known.find(cache, _earlier(cache, kind, before), wanted)
        for kind, cache in caches.items()
    }
    to_read = pc.unique(pa.chunked_array([one.lacking for one in known.values()], DIGEST))
    read = 0

    def on_read() -> None:
        nonlocal read
        read += 1
        on_progress(read, len(to_read))

    with ExitStack() as stack:
        notes = {
            kind: stack.enter_context(MeasureWriter(cache, wait_s=_WAIT_S, keep=True))
            for kind, cache in caches.items()
        }
        files = _files(group, known)
        troubles = measure_files(storage, files, own, notes, threads=threads, on_read=on_read)
    tables = {
        kind: pa.concat_tables([one.table, *notes[kind].written]) for kind, one in known.items()
    }
    for partition in group:
        table = _table(partition, tables)
        path = write_measures(storage, partition.key, table, versions, folders)
        here = set(partition.rows["image_sha256"].to_pylist()) if troubles else set()
        yield MeasuredPartition(
            partition.key,
            path,
            table,
            images=len(partition.sha256),
            read=int(np.count_nonzero(_mask(pc.is_in(partition.sha256, value_set=to_read)))),
            troubles=[one for one in troubles if one.file.sha256 in here],
        )


def _earlier(cache: MeasureCache, kind: str, before: Sequence[pa.Table]) -> pa.Table:
    """The rows of one kind in partitions' earlier files."""
    tables = [cache.schema.empty_table()]
    for table in before:
        if kind == BUILTIN:
            columns = [table[name] for name in cache.schema.names[1:]]
        elif kind in table.column_names:
            # Where there is no value, the cache knows whether that is the function's answer.
            table = table.filter(pc.is_valid(table[kind]))  # noqa: PLW2901 - the same, less
            columns = [table[kind]]
        else:
            continue
        key = digests(table["image_sha256"])
        tables.append(pa.Table.from_arrays([key, *columns], schema=cache.schema))
    return pa.concat_tables(tables)


def _files(group: Sequence[_Partition], known: Mapping[str, _Known]) -> Iterator[ImageFile]:
    """The files that lack something, each once."""
    seen: set[str] = set()
    for partition in group:
        lacks = {
            kind: _mask(pc.is_in(partition.sha256, value_set=one.lacking))
            for kind, one in known.items()
        }
        chosen = np.flatnonzero(np.logical_or.reduce(list(lacks.values())))
        for start in range(0, len(chosen), _BATCH):
            places = chosen[start : start + _BATCH]
            for at, row in zip(places, partition.rows.take(places).to_pylist(), strict=True):
                if row["image_sha256"] not in seen:
                    seen.add(row["image_sha256"])
                    yield ImageFile(
                        sha256=row["image_sha256"],
                        path=row["image_path"],
                        pixels=(row["width"], row["height"]),
                        prompt_id=row["prompt_id"],
                        sample=row["sample"],
                        lacking=[kind for kind, mask in lacks.items() if mask[at]],
                    )


def _table(partition: _Partition, known: Mapping[str, pa.Table]) -> pa.Table:
    """The measures of a partition: a row for each image whose own figures are known."""
    own = [kind for kind in known if kind != BUILTIN]
    schema = measures_schema(own)
    if not len(partition.sha256):
        return schema.empty_table()
    places = _places(partition.sha256, known[BUILTIN])
    there = pc.is_valid(places)
    rows, sha256 = partition.rows.filter(there), partition.sha256.filter(there)
    figures = known[BUILTIN].take(places.drop_null())
    columns = {
        "image_sha256": rows["image_sha256"],
        "partition_key": pa.repeat(pa.scalar(partition.key, pa.string()), len(rows)),
        "width": rows["width"],
        "height": rows["height"],
        **{name: figures[name] for name in figures.column_names},
        **{name: known[name]["value"].take(_places(sha256, known[name])) for name in own},
    }
    arrays = [columns[field.name].cast(field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema).combine_chunks()


def _places(sha256: pa.Array, table: pa.Table) -> pa.Array:
    """Where in a table the rows of these images are; null where it has none."""
    return pc.index_in(sha256, value_set=table[KEY].combine_chunks())


def _among(sha256: pa.Array, table: pa.Table) -> pa.Array:
    return pc.is_in(sha256, value_set=table[KEY].combine_chunks())


def _mask(mask: pa.Array) -> _Mask:
    return np.asarray(mask.to_numpy(zero_copy_only=False), np.bool_)

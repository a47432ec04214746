"""Measures the stored images of partitions; reads only the files that were not measured yet.

Measures are written as they are computed, so a killed run resumes where it stopped.
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

from krea_dagster.arrow import as_array
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

#: Images that are looked up in the cache together: each lookup reads the whole cache.
_GROUP_IMAGES: Final = 200_000

#: Rows that are converted from Arrow to Python together.
_BATCH: Final = 1_000

#: The most seconds before measures are written: a model's work is expensive.
_WAIT_S: Final = 10.0


@dataclass(frozen=True)
class MeasuredPartition:
    """A partition whose measures were written to ``path``; ``table`` holds them.

    ``images`` counts distinct files, of which ``read`` had to be decoded. ``failures`` are the
    images without a row, or without the value of a custom measure.
    """

    partition_key: str
    path: str
    table: pa.Table
    images: int
    read: int
    failures: Sequence[MeasureFailure]


def measure_partitions(
    storage: Storage,
    partition_keys: Sequence[str],
    *,
    folders: Sequence[str] = (),
    custom: Iterable[Measure] = (),
    threads: int | None = None,
    on_progress: Callable[[int, int], None] = lambda _read, _of: None,
) -> Iterator[MeasuredPartition]:
    """Measure the stored images of partitions by their manifests; yield each once it is written.

    ``folders`` are those of the manifests. ``threads`` is the number of decoding threads, by
    default one per core. ``on_progress`` gets the files read and the files to read.

    A file that is missing, damaged or not the one in the manifest gets no row, and an image on
    which a custom function fails gets no value. Both are reported and tried again next time. Raises
    ConfigError where a function fails on many images in a row, and StorageError.
    """
    measures = {one.name: one for one in checked(custom)}
    group: list[_Partition] = []
    for number, key in enumerate(partition_keys, start=1):
        group.append(_Partition.read(storage, key, folders))
        full = sum(len(one.sha256) for one in group) >= _GROUP_IMAGES
        if full or number == len(partition_keys):
            yield from _measure_group(
                storage, group, folders, measures, threads=threads, on_progress=on_progress
            )
            group = []


@dataclass(frozen=True)
class _Partition:
    """The distinct stored images of a manifest in its order, and their hashes as bytes."""

    key: str
    rows: pa.Table
    sha256: pa.Array

    @classmethod
    def read(cls, storage: Storage, key: str, folders: Sequence[str]) -> _Partition:
        rows = read_manifests(storage, [key], _COLUMNS, folders)
        if not len(rows):  # a missing manifest has no columns either
            return cls(key, rows, pa.array([], DIGEST))
        stored = pc.equal(rows["status"], State.STORED.value)
        hashed = pc.match_substring_regex(rows["image_sha256"], "^[0-9a-f]{64}$").fill_null(False)
        has_file = pc.is_valid(rows["image_path"])  # it was not pruned
        rows = rows.filter(pc.and_(pc.and_(stored, hashed), has_file))
        sha256 = digests(rows["image_sha256"])
        codes = sha256.dictionary_encode().indices.to_numpy(zero_copy_only=False)
        _, first = np.unique(codes, return_index=True)
        first.sort()
        return cls(key, rows.take(first), sha256.take(first))


@dataclass(frozen=True)
class _Known:
    """The known measures of one kind, and the images without."""

    table: pa.Table
    missing: pa.Array

    @classmethod
    def find(cls, cache: MeasureCache, earlier: pa.Table, wanted: pa.Array) -> _Known:
        """Look in the partitions' earlier files first, then in the cache."""
        table = earlier
        missing = wanted.filter(pc.invert(_contained(wanted, table)))
        if len(missing):
            found = cache.find(missing)
            table = pa.concat_tables([table, found])
            missing = missing.filter(pc.invert(_contained(missing, found)))
        return cls(table, missing)


def _measure_group(
    storage: Storage,
    group: Sequence[_Partition],
    folders: Sequence[str],
    custom: Mapping[str, Measure],
    *,
    threads: int | None,
    on_progress: Callable[[int, int], None],
) -> Iterator[MeasuredPartition]:
    versions = {name: one.version for name, one in custom.items()}
    earlier = [read_valid_measures(storage, one.key, versions, folders) for one in group]
    caches = {BUILTIN: MeasureCache.builtin(storage)} | {
        name: MeasureCache.custom(storage, name, version) for name, version in versions.items()
    }
    wanted = pc.unique(pa.chunked_array([one.sha256 for one in group], DIGEST))
    known = {
        kind: _Known.find(cache, _earlier_rows(cache, kind, earlier), wanted)
        for kind, cache in caches.items()
    }
    to_read = pc.unique(pa.chunked_array([one.missing for one in known.values()], DIGEST))
    read = 0

    def on_read() -> None:
        nonlocal read
        read += 1
        on_progress(read, len(to_read))

    with ExitStack() as stack:
        writers = {
            kind: stack.enter_context(MeasureWriter(cache, wait_s=_WAIT_S, keep=True))
            for kind, cache in caches.items()
        }
        files = _files(group, known)
        failures = measure_files(storage, files, custom, writers, threads=threads, on_read=on_read)
    tables = {
        kind: pa.concat_tables([one.table, *writers[kind].written]) for kind, one in known.items()
    }
    for partition in group:
        table = _table(partition, tables)
        path = write_measures(storage, partition.key, table, versions, folders)
        here = set(partition.rows["image_sha256"].to_pylist()) if failures else set()
        yield MeasuredPartition(
            partition.key,
            path,
            table,
            images=len(partition.sha256),
            read=pc.sum(pc.is_in(partition.sha256, value_set=to_read)).as_py() or 0,
            failures=[one for one in failures if one.file.sha256 in here],
        )


def _earlier_rows(cache: MeasureCache, kind: str, earlier: Sequence[pa.Table]) -> pa.Table:
    """Return the rows of one kind in the partitions' earlier files."""
    tables = [cache.schema.empty_table()]
    for table in earlier:
        if kind == BUILTIN:
            rows, columns = table, [table[name] for name in cache.schema.names[1:]]
        elif kind in table.column_names:
            # The cache knows whether a missing value is the function's result.
            rows = table.filter(pc.is_valid(table[kind]))
            columns = [rows[kind]]
        else:
            continue
        key = digests(rows["image_sha256"])
        tables.append(pa.Table.from_arrays([key, *columns], schema=cache.schema))
    return pa.concat_tables(tables)


def _files(group: Sequence[_Partition], known: Mapping[str, _Known]) -> Iterator[ImageFile]:
    """Yield the files that lack a measure, each once."""
    seen: set[str] = set()
    for partition in group:
        lacks = {
            kind: _mask(pc.is_in(partition.sha256, value_set=one.missing))
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
                        missing=[kind for kind, mask in lacks.items() if mask[at]],
                    )


def _table(partition: _Partition, known: Mapping[str, pa.Table]) -> pa.Table:
    """Return a row for each image of a partition whose built-in measures are known."""
    custom = [kind for kind in known if kind != BUILTIN]
    schema = measures_schema(custom)
    if not len(partition.sha256):
        return schema.empty_table()
    places = _places(partition.sha256, known[BUILTIN])
    measured = pc.is_valid(places)
    rows, sha256 = partition.rows.filter(measured), partition.sha256.filter(measured)
    builtin = known[BUILTIN].take(places.drop_null())
    columns = {
        "image_sha256": rows["image_sha256"],
        "partition_key": pa.repeat(pa.scalar(partition.key, pa.string()), len(rows)),
        "width": rows["width"],
        "height": rows["height"],
        **{name: builtin[name] for name in builtin.column_names},
        **{name: known[name]["value"].take(_places(sha256, known[name])) for name in custom},
    }
    arrays = [columns[field.name].cast(field.type) for field in schema]
    return pa.Table.from_arrays(arrays, schema=schema).combine_chunks()


def _places(sha256: pa.Array, table: pa.Table) -> pa.Array:
    """Return the row of each image in a table, null where it has none."""
    return pc.index_in(sha256, value_set=as_array(table[KEY]))


def _contained(sha256: pa.Array, table: pa.Table) -> pa.Array:
    return pc.is_in(sha256, value_set=as_array(table[KEY]))


def _mask(mask: pa.Array) -> npt.NDArray[np.bool_]:
    return np.asarray(mask.to_numpy(zero_copy_only=False), np.bool_)

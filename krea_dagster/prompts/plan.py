"""The plan: one row per image that some partitions request, with its seed and request key.

It is made and kept in Arrow columns. Memory does not grow with the table, except by 32 bytes per
image.
"""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Digests, hex_from_digests
from krea_dagster.errors import Problem
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.identity import image_seeds, partition_version, request_digests
from krea_dagster.prompts.requests import SEPARATOR, PlannedImage
from krea_dagster.prompts.scan import Chunk
from krea_dagster.prompts.spool import Keys, Spool

#: The columns of a plan, one row per image: the row's ``prompt_id`` and which of its images it is
#: (``sample``, from 0), the request (``prompt`` to ``attempt``), the request's identity, and the
#: partition. Each is also a column of the manifest. The passthrough columns of the table follow.
PLAN_SCHEMA: Final = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("sample", pa.int32()),
        ("prompt", pa.string()),
        ("size", pa.string()),
        ("quality", pa.string()),
        ("seed", pa.int32()),
        ("nsfw_check", pa.bool_()),
        ("attempt", pa.int32()),
        ("request_key", pa.string()),
        ("partition_key", pa.string()),
    ]
)

_KEY: Final = PLAN_SCHEMA.get_field_index("request_key")

#: What is kept of each image on disk, after the number of its row. The request keys are in memory,
#: and do not compress.
_KEPT: Final = [
    pa.field("row", pa.int64()),
    *(field for field in PLAN_SCHEMA if field.name != "request_key"),
]

Mask = npt.NDArray[np.bool_]

#: How often another image of ``(prompt_id, sample)`` was requested; 0 for those not named.
Attempts = Mapping[tuple[str, int], int]

#: Images of one batch: a row may request a hundred.
_BATCH_IMAGES: Final = 16_384


@dataclass(frozen=True)
class Plan:
    """The images that the rows of some partitions request, in the table's order. To be closed.

    Several may share a request, which is bought once.

    Args:
        keys: The partitions, sorted: those that were named, and those that have images.
        passthrough: Schema of the table's columns that are not recognised.
        warnings: The first rows whose prompt is longer than the model may read.
        warning_count: Number of all such rows.
        notes: What is not a problem of the table, and perhaps not expected.
        all_digests: Request keys as bytes, shape (images, 32), partition by partition.
    """

    keys: Sequence[str]
    passthrough: pa.Schema
    warnings: tuple[Problem, ...]
    warning_count: int
    all_digests: Digests = field(repr=False)
    _places: Mapping[str, slice] = field(repr=False)
    _spool: Spool | None = field(repr=False)
    notes: tuple[str, ...] = ()

    def part(self, keys: Sequence[str]) -> Plan:
        """Return the plan of some of its partitions, for another user, who closes it too."""
        if self._spool is not None:
            self._spool.users += 1
        wanted = sorted(keys)
        if wanted == list(self.keys):
            return self
        parts = [self.digests(key) for key in wanted]
        ends = np.cumsum([0, *map(len, parts)]).tolist()
        return replace(
            self,
            keys=wanted,
            all_digests=np.concatenate([self.all_digests[:0], *parts]),
            _places={key: slice(*place) for key, place in zip(wanted, pairwise(ends), strict=True)},
        )

    def same_images(self, other: Plan) -> bool:
        """Return whether another plan of the same table has the same images."""
        same_keys = list(self.keys) == list(other.keys)
        return same_keys and np.array_equal(self.all_digests, other.all_digests)

    def close(self) -> None:
        """Free memory and disk, if no other user is left."""
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self, key: str) -> Iterator[pa.RecordBatch]:
        """Yield the images of a partition: ``PLAN_SCHEMA``, then the passthrough columns."""
        for _, batch in self.numbered_batches(key):
            yield batch

    def numbered_batches(self, key: str) -> Iterator[tuple[npt.NDArray[np.int64], pa.RecordBatch]]:
        """Yield ``batches``, each with the numbers of the rows that request its images."""
        if self._spool is None:
            return
        digests, start = self.digests(key), 0
        for batch in self._spool.batches(key):
            end = start + batch.num_rows
            columns = batch.columns[1:]
            columns.insert(_KEY, hex_from_digests(digests[start:end]))
            fields = list(batch.schema)[1:]
            fields.insert(_KEY, PLAN_SCHEMA.field(_KEY))
            found = pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
            yield np.asarray(batch.column(0).to_numpy(), np.int64), found
            start = end

    def digests(self, key: str) -> Digests:
        """Return the request keys of a partition's images as bytes: shape (images, 32)."""
        return self.all_digests[self.place(key)]

    def place(self, key: str) -> slice:
        """Return the place of a partition's images in ``all_digests``."""
        return self._places.get(key, slice(0, 0))

    def versions(self) -> dict[str, str]:
        """Return the data version of each partition."""
        return dict(self._versions)

    @cached_property
    def _versions(self) -> Mapping[str, str]:
        return {key: partition_version(self.digests(key)) for key in self.keys}

    def requests(self, masks: Mapping[str, Mask]) -> Iterator[tuple[ImageRequest, str]]:
        """Yield the request and the partition of each masked image.

        ``masks`` holds a mask of the images of each partition, by its key.
        """
        for key in self.keys:
            mask, start = masks[key], 0
            for batch in self.batches(key) if mask.any() else ():
                chosen = pa.array(mask[start : start + batch.num_rows])
                start += batch.num_rows
                for request in image_requests(batch.filter(chosen)):
                    yield request, key

    def named(self, names: Collection[str]) -> Iterator[PlannedImage]:
        """Yield the images whose prompt_id or request key is one of these."""
        wanted = pa.array(sorted(set(names)), pa.string())
        for key in self.keys if names else ():
            for batch in self.batches(key):
                ids, keys = batch.column("prompt_id"), batch.column("request_key")
                mask = pc.or_(pc.is_in(ids, value_set=wanted), pc.is_in(keys, value_set=wanted))
                found = batch.filter(mask)
                rows = zip(
                    found.column("prompt_id").to_pylist(),
                    found.column("sample").to_pylist(),
                    image_requests(found),
                    strict=True,
                )
                for prompt_id, sample, request in rows:
                    yield PlannedImage(prompt_id, sample, key, request)


@dataclass(frozen=True)
class PlannedBatch:
    """The images of some rows: their partitions, request keys (as bytes) and other columns."""

    keys: pa.Array
    digests: Digests
    images: pa.RecordBatch | None


class Planner:
    """Makes a plan from chunks of rows. With ``keep`` false only the request keys are kept."""

    def __init__(
        self,
        passthrough: pa.Schema,
        attempts: Attempts,
        drawn: Collection[tuple[str, int]] = (),
        *,
        keep: bool,
    ) -> None:
        self._passthrough = passthrough
        self._attempts = _Attempts(attempts, drawn)
        self._keys = Keys()
        self._spool = Spool(self._keys) if keep else None
        self._numbers: list[npt.NDArray[np.int32]] = []
        # Until they are in order: in memory they would be there twice.
        self._digests = tempfile.TemporaryFile()  # noqa: SIM115 - closed by ``plan`` or ``close``
        self._counts = np.zeros(0, np.int64)

    def close(self) -> None:
        """Free memory and disk."""
        self._digests.close()
        if self._spool is not None:
            self._spool.close()

    def planned(self, chunk: Chunk) -> list[PlannedBatch]:
        """Return the images of some rows. Threads may call it at once."""
        counts = np.asarray(chunk.rows.column("num_images").to_numpy())
        ends = counts.cumsum()
        found: list[PlannedBatch] = []
        start = 0
        while start < len(counts):
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + _BATCH_IMAGES, side="right"))
            length = max(end, start + 1) - start
            rows, passthrough = (
                batch.slice(start, length) for batch in (chunk.rows, chunk.passthrough)
            )
            found.append(self._planned(rows, passthrough))
            start += length
        return found

    def add(self, found: Iterable[PlannedBatch]) -> None:
        """Keep planned images. To be called in the order of the rows."""
        for part in found:
            numbers = self._keys.numbers(part.keys)
            self._numbers.append(numbers.astype(np.int32))
            self._digests.write(part.digests.tobytes())
            counts = np.bincount(numbers, minlength=len(self._counts))
            counts[: len(self._counts)] += self._counts
            self._counts = counts
            if self._spool is not None and part.images is not None:
                self._spool.add(part.images, numbers)

    def plan(
        self,
        named: Iterable[str],
        warnings: tuple[Problem, ...],
        warning_count: int,
        notes: tuple[str, ...] = (),
    ) -> Plan:
        """Return the plan of all rows. Nothing can be added afterwards."""
        keys = self._keys.in_order()
        ends = np.cumsum(self._counts[: len(keys)][np.argsort(self._keys.ranks())])
        digests = self._in_order(ends)
        return Plan(
            keys=sorted({*named, *keys}),
            passthrough=self._passthrough,
            warnings=warnings,
            warning_count=warning_count,
            all_digests=digests,
            _places={
                key: slice(start, end)
                for key, start, end in zip(keys, [0, *ends.tolist()], ends.tolist(), strict=False)
            },
            _spool=self._spool,
            notes=notes,
        )

    def _in_order(self, ends: npt.NDArray[np.int64]) -> Digests:
        """Return the request keys by partition."""
        digests = np.empty((int(ends[-1]) if len(ends) else 0, 32), np.uint8)
        ranks_of = self._keys.ranks()
        free = np.concatenate([np.zeros(1, np.int64), ends])  # each partition's next place
        with self._digests as file:
            file.seek(0)
            for numbers in self._numbers:
                part = np.frombuffer(file.read(32 * len(numbers)), np.uint8).reshape(-1, 32)
                ranks = ranks_of[numbers]
                order = np.argsort(ranks, kind="stable")
                ranks = ranks[order]
                begins = np.searchsorted(ranks, ranks)
                digests[free[ranks] + np.arange(len(ranks)) - begins] = part[order]
                free[:-1] += np.bincount(ranks, minlength=len(ends))
        return digests

    def _planned(self, rows: pa.RecordBatch, passthrough: pa.RecordBatch) -> PlannedBatch:
        counts = np.asarray(rows.column("num_images").to_numpy())
        if (counts == 1).all():
            samples = np.zeros(len(counts), np.int64)
        else:
            parents = pa.array(np.repeat(np.arange(len(counts)), counts))
            samples = np.arange(len(parents)) - np.repeat(counts.cumsum() - counts, counts)
            rows, passthrough = rows.take(parents), passthrough.take(parents)
        columns = self._columns_of(rows, pa.array(samples))
        digests = request_digests(columns)
        images = None
        if self._spool is not None:
            images = pa.RecordBatch.from_arrays(
                [*(columns[one.name].cast(one.type) for one in _KEPT), *passthrough.columns],
                schema=pa.schema([*_KEPT, *passthrough.schema]),
            )
        return PlannedBatch(columns["partition_key"], digests, images)

    def _columns_of(self, rows: pa.RecordBatch, samples: pa.Array) -> dict[str, pa.Array]:
        columns = {name: rows.column(name) for name in rows.schema.names}
        columns["sample"] = samples
        columns["attempt"] = self._attempts.of(columns["prompt_id"], samples)
        columns["seed"] = image_seeds({**columns, "seed": self._attempts.seeds(columns)})
        return columns


class _Attempts:
    """How often another image was requested, for whole columns."""

    def __init__(self, attempts: Attempts, drawn: Collection[tuple[str, int]]) -> None:
        self._drawn = pa.array([_slot(*names) for names in drawn], pa.string())
        self._ids = pa.array({prompt_id for prompt_id, _ in attempts}, pa.string())
        self._slots = pa.array([_slot(*names) for names in attempts], pa.string())
        self._values = pa.array(attempts.values(), pa.int64())

    def of(self, ids: pa.Array, samples: pa.Array) -> pa.Array:
        if not pc.any(pc.is_in(ids, value_set=self._ids)).as_py():
            return pa.array(np.zeros(len(ids), np.int64))
        found = pc.index_in(_slots(ids, samples), value_set=self._slots)
        return self._values.take(found).fill_null(0)

    def seeds(self, rows: Mapping[str, pa.Array]) -> pa.Array:
        """Return the rows' seeds, null for those that are drawn for another image."""
        seeds = rows["seed"]
        if not len(self._drawn):
            return seeds
        drawn = pc.is_in(_slots(rows["prompt_id"], rows["sample"]), value_set=self._drawn)
        drawn = pc.and_(drawn, pc.greater(rows["attempt"], 0))
        return pc.if_else(drawn, pa.scalar(None, seeds.type), seeds)


def _slot(prompt_id: str, sample: int) -> str:
    return f"{sample}{SEPARATOR}{prompt_id}"


def _slots(ids: pa.Array, samples: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(samples.cast(pa.string()), ids, SEPARATOR)


def image_requests(images: pa.RecordBatch) -> Iterator[ImageRequest]:
    """Yield the request of each image of a plan's batch."""
    names = ("request_key", "prompt", "size", "quality", "seed", "nsfw_check", "attempt")
    columns = [images.column(name).to_pylist() for name in names]
    for values in zip(*columns, strict=True):
        yield ImageRequest(*values)

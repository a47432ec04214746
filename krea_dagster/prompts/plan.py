"""What the rows of some partitions ask for: one row per image, with its seed and request key.

Made and kept in Arrow columns, in memory that does not grow with the table but for 32 bytes an
image. ``requests`` defines what a row asks for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Digests, digests_from_hex, hex_from_digests
from krea_dagster.errors import Problem
from krea_dagster.models import ImageRequest
from krea_dagster.prompts.identity import Hasher, partition_version, request_keys, seeds_for
from krea_dagster.prompts.requests import Attempts, PlannedImage
from krea_dagster.prompts.scan import Chunk
from krea_dagster.prompts.spool import Keys, Spool

#: The columns of a plan; the table's further columns follow them.
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

Mask = npt.NDArray[np.bool_]

#: Images of one batch: a row may ask for a hundred.
_BATCH_IMAGES: Final = 16_384


def _no_digests() -> Digests:
    return np.empty((0, 32), np.uint8)


@dataclass(frozen=True)
class Plan:
    """The images that the rows of some partitions ask for, in the table's order.

    Two may share a request, which is bought once. ``keys`` are the partitions, sorted: those
    that were named, and those that have images. ``rows`` and ``images`` count. ``warnings`` are
    as in ``PromptRows``. ``carried`` is the schema of the table's further columns. Must be
    closed.
    """

    keys: Sequence[str]
    rows: int
    images: int
    carried: pa.Schema
    warnings: tuple[Problem, ...] = ()
    warning_count: int = 0
    all_digests: Digests = field(default_factory=_no_digests, repr=False)
    _places: Mapping[str, slice] = field(default_factory=dict, repr=False)
    _spool: Spool | None = field(default=None, repr=False)

    def close(self) -> None:
        """Give back memory and disk."""
        if self._spool is not None:
            self._spool.close()

    def __enter__(self) -> Plan:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def batches(self, key: str) -> Iterator[pa.RecordBatch]:
        """Yield the images of a partition: ``PLAN_SCHEMA``, then the further columns."""
        if self._spool is None:
            return
        digests, start = self.digests(key), 0
        for batch in self._spool.batches(key):
            # The request keys are in memory anyway, and hardly anything makes them smaller.
            end = start + batch.num_rows
            columns = batch.columns
            columns.insert(_KEY, hex_from_digests(digests[start:end]))
            fields = list(batch.schema)
            fields.insert(_KEY, PLAN_SCHEMA.field(_KEY))
            yield pa.RecordBatch.from_arrays(columns, schema=pa.schema(fields))
            start = end

    def digests(self, key: str) -> Digests:
        """Return the request keys of a partition's images as bytes: shape (images, 32)."""
        return self.all_digests[self.place(key)]

    def place(self, key: str) -> slice:
        """Return where the images of a partition are among all, which are in ``keys``' order."""
        return self._places.get(key, slice(0, 0))

    def versions(self) -> dict[str, str]:
        """Return the data version of each partition (``requests.partition_version``)."""
        return {key: partition_version(self.digests(key)) for key in self.keys}

    def requests(self, masks: Mapping[str, Mask]) -> Iterator[tuple[ImageRequest, str]]:
        """Yield the request and the partition of each image that is masked.

        ``masks`` holds for each partition which of its images, in their order.
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
                ids, keys = _own(batch, "prompt_id"), _own(batch, "request_key")
                mask = pc.or_(pc.is_in(ids, value_set=wanted), pc.is_in(keys, value_set=wanted))
                found = batch.filter(mask)
                rows = zip(
                    _own(found, "prompt_id").to_pylist(),
                    _own(found, "sample").to_pylist(),
                    image_requests(found),
                    strict=True,
                )
                for prompt_id, sample, request in rows:
                    yield PlannedImage(prompt_id, sample, key, request)


@dataclass(frozen=True)
class Planned:
    """Images of some rows: of how many, their partitions and request keys, and other columns."""

    rows: int
    keys: pa.Array
    digests: Digests
    images: pa.RecordBatch | None


class Planner:
    """Makes a plan from rows that come chunk by chunk.

    With ``keep`` false only the request keys are kept.
    """

    def __init__(
        self,
        carried: pa.Schema,
        attempts: Attempts | None,
        hasher: Hasher,
        *,
        drawn: Collection[tuple[str, int]] = (),
        keep: bool,
    ) -> None:
        self._carried = carried
        self._attempts = _Attempts(attempts, drawn)
        self._hasher = hasher
        self._keys = Keys()
        self._spool = Spool(self._keys) if keep else None
        self._numbers: list[npt.NDArray[np.int32]] = []
        self._digests: list[Digests] = []
        self._rows = 0

    def close(self) -> None:
        """Give back memory and disk."""
        if self._spool is not None:
            self._spool.close()

    def planned(self, chunk: Chunk) -> list[Planned]:
        """Return the images of some rows. May be called in several threads at once."""
        counts = np.asarray(chunk.rows.column("num_images").to_numpy())
        ends = counts.cumsum()
        found: list[Planned] = []
        start = 0
        while start < len(counts):
            before = ends[start - 1] if start else 0
            end = int(np.searchsorted(ends, before + _BATCH_IMAGES, side="right"))
            length = max(end, start + 1) - start
            found.append(
                self._planned(chunk.rows.slice(start, length), chunk.carried.slice(start, length))
            )
            start += length
        return found

    def add(self, found: Iterable[Planned]) -> None:
        """Keep what was planned. To be called in the order of the rows."""
        for part in found:
            self._rows += part.rows
            numbers = self._keys.numbers(part.keys)
            self._numbers.append(numbers.astype(np.int32))
            self._digests.append(part.digests)
            if self._spool is not None and part.images is not None:
                self._spool.add(part.images, numbers)

    def plan(self, named: Iterable[str], warnings: tuple[Problem, ...], warning_count: int) -> Plan:
        """Return the plan of all rows; nothing can be added any more."""
        keys = self._keys.in_order()
        ranks = self._keys.ranks()[np.concatenate([np.empty(0, np.int32), *self._numbers])]
        digests = self._in_order(ranks)
        ends = np.bincount(ranks, minlength=len(keys)).cumsum().tolist()
        return Plan(
            keys=sorted({*named, *keys}),
            rows=self._rows,
            images=len(digests),
            carried=self._carried,
            warnings=warnings,
            warning_count=warning_count,
            all_digests=digests,
            _places={
                key: slice(start, end)
                for key, start, end in zip(keys, [0, *ends], ends, strict=False)
            },
            _spool=self._spool,
        )

    def _in_order(self, ranks: npt.NDArray[np.int64]) -> Digests:
        """Return the request keys by partition, and have none of them in memory twice."""
        places = np.empty(len(ranks), np.int64)
        places[np.argsort(ranks, kind="stable")] = np.arange(len(ranks))
        digests = np.empty((len(ranks), 32), np.uint8)
        end = len(ranks)
        while self._digests:
            part = self._digests.pop()
            digests[places[end - len(part) : end]] = part
            end -= len(part)
        return digests

    def _planned(self, rows: pa.RecordBatch, carried: pa.RecordBatch) -> Planned:
        counts = np.asarray(rows.column("num_images").to_numpy())
        asked = rows.num_rows
        if (counts == 1).all():
            samples = np.zeros(len(counts), np.int64)
        else:
            parents = pa.array(np.repeat(np.arange(len(counts)), counts))
            samples = np.arange(len(parents)) - np.repeat(counts.cumsum() - counts, counts)
            rows, carried = rows.take(parents), carried.take(parents)
        images = self._images_of(rows, pa.array(samples))
        whole = None
        if self._spool is not None:
            columns, fields = images.columns, list(images.schema)
            del columns[_KEY], fields[_KEY]
            whole = pa.RecordBatch.from_arrays(
                [*columns, *carried.columns], schema=pa.schema([*fields, *carried.schema])
            )
        keys = images.column("request_key")
        return Planned(asked, images.column("partition_key"), digests_from_hex(keys), whole)

    def _images_of(self, rows: pa.RecordBatch, samples: pa.Array) -> pa.RecordBatch:
        ids = rows.column("prompt_id")
        attempts = self._attempts.of(ids, samples)
        seeds = seeds_for(
            self._hasher,
            seeds=self._attempts.seeds(rows.column("seed"), ids, samples, attempts),
            prompt_ids=ids,
            samples=samples,
            attempts=attempts,
        )
        given = ("prompt_id", "prompt", "size", "quality", "nsfw_check", "partition_key")
        columns = {
            **{name: rows.column(name) for name in given},
            "sample": samples.cast(pa.int32()),
            "seed": seeds,
            "attempt": attempts.cast(pa.int32()),
        }
        columns["request_key"] = request_keys(
            self._hasher,
            prompts=columns["prompt"],
            sizes=columns["size"],
            qualities=columns["quality"],
            seeds=seeds,
            nsfw_checks=columns["nsfw_check"],
            attempts=attempts,
        )
        return pa.RecordBatch.from_arrays(
            [columns[name] for name in PLAN_SCHEMA.names], schema=PLAN_SCHEMA
        )


class _Attempts:
    """How often a person asked for another picture, for whole columns."""

    def __init__(self, attempts: Attempts | None, drawn: Collection[tuple[str, int]] = ()) -> None:
        self._drawn = pa.array([f"{sample}\x1f{id_}" for id_, sample in drawn], pa.string())
        self._function = attempts if callable(attempts) else None
        table = {} if attempts is None or callable(attempts) else attempts
        self._ids = pa.array({prompt_id for prompt_id, _ in table}, pa.string())
        self._names = pa.array([f"{sample}\x1f{id_}" for id_, sample in table], pa.string())
        self._values = pa.array(table.values(), pa.int64())

    def of(self, ids: pa.Array, samples: pa.Array) -> pa.Array:
        if self._function is not None:
            pairs = zip(ids.to_pylist(), samples.to_pylist(), strict=True)
            return pa.array([self._function(id_, sample) for id_, sample in pairs], pa.int64())
        if not len(self._names) or not pc.any(pc.is_in(ids, value_set=self._ids)).as_py():
            return pa.array(np.zeros(len(ids), np.int64))
        found = pc.index_in(_slots(ids, samples), value_set=self._names)
        return self._values.take(found).fill_null(0)

    def seeds(
        self, seeds: pa.Array, ids: pa.Array, samples: pa.Array, attempts: pa.Array
    ) -> pa.Array:
        """The rows' seeds, but for those that are drawn for another image."""
        if not len(self._drawn):
            return seeds
        drawn = pc.is_in(_slots(ids, samples), value_set=self._drawn)
        drawn = pc.and_(drawn, pc.greater(attempts, 0))
        return pc.if_else(drawn, pa.scalar(None, seeds.type), seeds)


def _slots(ids: pa.Array, samples: pa.Array) -> pa.Array:
    return pc.binary_join_element_wise(samples.cast(pa.string()), ids, "\x1f")


def image_requests(images: pa.RecordBatch) -> Iterator[ImageRequest]:
    """Yield the request of each image of a plan's batch."""
    names = ("request_key", "prompt", "size", "quality", "seed", "nsfw_check", "attempt")
    columns = [_own(images, name).to_pylist() for name in names]
    for values in zip(*columns, strict=True):
        yield ImageRequest(*values)


def _own(images: pa.RecordBatch, name: str) -> pa.Array:
    """Return a column of the plan's own: by its place, as the table may have any names beside."""
    return images.column(PLAN_SCHEMA.get_field_index(name))

"""The plan of an export: the split and shard of each image.

It is made before anything is written, and deterministic: a killed export computes the same plan
again and resumes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.curation.export.image_content import FACTS, ShardContent, ending_of
from krea_dagster.curation.export.selected_rows import SelectedRows
from krea_dagster.curation.export.shard_assignment import place
from krea_dagster.curation.export.spec import ONE_FILE, ExportSpec
from krea_dagster.curation.export.splits import leaking, split_numbers
from krea_dagster.curation.export.target import FORMAT_VERSION

#: Increased when the same rows would be written as other bytes.
_WRITER: Final = 3

_ENDINGS: Final = {"webdataset": ".tar", "parquet": ".parquet"}

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Shard:
    """Some images of a split. ``rows`` are row numbers; ``name`` is below the version.

    Shards with equal fingerprints hold the same.
    """

    split: str
    number: int
    name: str
    rows: Numbers
    fingerprint: str


@dataclass(frozen=True)
class ExportPlan:
    """The shards in order, and what was left out.

    ``leaked`` counts by split the images left out because a later split has a similar one; without
    ``near_duplicates_known``, only equal files count as similar. ``endings`` are the extensions of
    the files.
    """

    shards: tuple[Shard, ...]
    leaked: Mapping[str, int]
    near_duplicates_known: bool
    endings: tuple[str, ...]

    @property
    def images(self) -> int:
        """Return the number of images."""
        return sum(len(one.rows) for one in self.shards)

    def of(self, split: str) -> list[Shard]:
        """Return the shards of a split."""
        return [one for one in self.shards if one.split == split]

    def rows(self) -> Numbers:
        """Return the rows of all shards, in order."""
        return np.concatenate([one.rows for one in self.shards] or [np.zeros(0, np.int64)])

    def version(self, card: str) -> str:
        """Return the version's name: 16 hexadecimal digits, a hash of its content."""
        hashed = hashlib.sha256(f"krea-dagster/{FORMAT_VERSION}/version\x1f{card}".encode())
        for one in self.shards:
            hashed.update(f"\x1f{one.name}\x1f{one.fingerprint}".encode())
        return hashed.hexdigest()[:16]


def make_plan(
    rows: SelectedRows, spec: ExportSpec, similar: pa.Table | None, index: pa.Table | None
) -> ExportPlan:
    """Return the plan.

    ``similar`` has ``image_sha256`` and ``cluster`` of near-duplicates, None where they are
    unknown. ``index`` is that of the previous version, if it had the same layout.
    """
    splits = split_numbers(rows.column("prompt"), spec.splits)
    dropped = np.zeros(len(rows), np.bool_)
    if len(spec.splits) > 1 and not spec.leaks:
        dropped = leaking(splits, _similar_groups(rows.column("image_sha256"), similar))
    shards: list[Shard] = []
    for number, split in enumerate(spec.splits):
        members = np.flatnonzero((splits == number) & ~dropped)
        old, lost = _previous_shards(rows.keys[members], split.name, index)
        placed = place(
            old,
            rows.sizes[members],
            lost,
            most_images=spec.shard_images,
            most_bytes=spec.shard_bytes,
        )
        order = np.argsort(placed, kind="stable")
        ends = np.bincount(placed).cumsum().tolist()
        for shard, end in enumerate(ends):
            begin = 0 if shard == 0 else ends[shard - 1]
            found = members[order[begin:end]]
            shards.append(
                Shard(
                    split.name,
                    shard,
                    shard_name(spec, split.name, shard),
                    found,
                    _fingerprint(rows, spec, found),
                )
            )
    counts = Counter(spec.splits[number].name for number in splits[dropped].tolist())
    paths = rows.column("image_path")
    names = pc.unique(pc.replace_substring_regex(paths, r"^.*\.", ""))
    endings = {rows.edits.ending(ending_of(f".{name}")) for name in names.to_pylist()}
    return ExportPlan(tuple(shards), dict(counts), similar is not None, tuple(sorted(endings)))


def shard_name(spec: ExportSpec, split: str, number: int) -> str:
    """Return the name of a shard below its version: a file, or a folder."""
    if spec.form in ONE_FILE:
        return f"data/{split}-{number:05d}{_ENDINGS[spec.form]}"
    return f"{split}/{number:05d}"


def shard_layout(spec: ExportSpec) -> dict[str, Any]:
    """Return what must be equal for a later version to keep its images in the same shards."""
    return {
        "form": spec.form,
        "splits": [str(one) for one in spec.splits],
        "shard_images": spec.shard_images,
        "shard_bytes": spec.shard_bytes,
    }


def content_of(rows: SelectedRows, shard: Shard) -> ShardContent:
    """Return the rows of a shard."""
    needed = list(dict.fromkeys([*rows.columns, *FACTS]))
    table = rows.take(shard.rows, needed)
    keys = [key.decode() for key in rows.keys[shard.rows].tolist()]
    return ShardContent(rows.exported(table), table.select(FACTS), keys, rows.edits)


def _fingerprint(rows: SelectedRows, spec: ExportSpec, members: Numbers) -> str:
    form = [
        _WRITER,
        spec.form,
        rows.edits.settings(),
        spec.sidecars,
        spec.captions,
        str(rows.schema),
    ]
    hashed = hashlib.sha256(json.dumps(form).encode())
    hashed.update(b"".join(rows.keys[members].tolist()))
    hashed.update(rows.digests[members].tobytes())
    return hashed.hexdigest()


def _similar_groups(images: pa.ChunkedArray, similar: pa.Table | None) -> Numbers:
    """Return the number of each image's group: its cluster, or images with the same hash."""
    groups = images
    if similar is not None and len(similar):
        known = as_array(similar["image_sha256"])
        clusters = similar["cluster"].take(pc.index_in(images, value_set=known))
        groups = pc.coalesce(clusters, images)
    texts = groups.cast(pa.large_string()).combine_chunks().dictionary_encode()
    return np.asarray(texts.indices.to_numpy(), np.int64)


def _previous_shards(
    keys: npt.NDArray[np.bytes_], split: str, index: pa.Table | None
) -> tuple[Numbers, frozenset[int]]:
    """Return the previous shard of each key, -1 for none, and the shards that have lost some."""
    if index is None:
        return np.full(len(keys), -1, np.int64), frozenset()
    found = index.filter(pc.equal(index["split"], split))
    known = np.array(found["key"].to_pylist(), "S24")
    numbers = np.array(found["shard"].to_pylist(), np.int64)
    order = np.argsort(known)
    known, numbers = known[order], numbers[order]
    if not len(known):
        return np.full(len(keys), -1, np.int64), frozenset()
    places = np.minimum(np.searchsorted(known, keys), len(known) - 1)
    here = known[places] == keys
    still = np.zeros(len(known), np.bool_)
    still[places[here]] = True
    old = np.where(here, numbers[places], -1)
    return old, frozenset(np.unique(numbers[~still]).tolist())

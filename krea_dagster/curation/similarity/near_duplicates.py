"""The table of near-duplicates, built from the manifests and measures in storage.

One row per manifest row whose image is in a cluster of two or more purchases. It is rebuilt
completely each time: a million images take about a minute of CPU.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from krea_dagster.curation.measures.pdq import LEAST_QUALITY, NEAR_BITS
from krea_dagster.curation.similarity.clusters import (
    NEVER,
    ImageClusters,
    ImageHashes,
    Purchases,
    find_clusters,
)
from krea_dagster.curation.similarity.multi_index_hash import MOST_BITS
from krea_dagster.digests import digests_from_hex, hex_from_digests
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import manifest_names
from krea_dagster.models import UNITS_PER_CREDIT, credits_from_units
from krea_dagster.parquet_files import open_parquet
from krea_dagster.prompts import safe_name

_COLUMNS: Final[tuple[tuple[str, pa.DataType, str], ...]] = (
    ("image_sha256", pa.string(), "Hash of the file's bytes"),
    ("partition_key", pa.string(), "Dagster partition of the row"),
    ("prompt_id", pa.string(), "Identity of the prompt"),
    ("sample", pa.int32(), "Which of the row's num_images this is, from 0"),
    ("request_key", pa.string(), "The purchase; rows that share one were paid for once"),
    ("cluster", pa.string(), "The cluster: the smallest sha256 of its images"),
    ("kind", pa.string(), "exact: the same file as the kept one; near: a similar image"),
    ("keep", pa.bool_(), "Whether this purchase is the one of the cluster to keep"),
    ("distance", pa.int32(), "Bits of the perceptual hash that differ from the kept one's"),
    ("credits_charged", pa.float64(), "Credits charged for the purchase; null while unknown"),
)

NEAR_DUPLICATES_SCHEMA: Final = pa.schema([pa.field(name, kind) for name, kind, _ in _COLUMNS])

#: The description of each column.
NEAR_DUPLICATES_DESCRIPTIONS: Final = {name: text for name, _, text in _COLUMNS}

#: The columns that are the manifest's.
_OF_MANIFEST: Final = ("partition_key", "prompt_id", "sample", "request_key", "credits_charged")

_ORDER: Final = [
    ("cluster", "ascending"),
    ("keep", "descending"),
    ("distance", "ascending"),
    ("request_key", "ascending"),
    ("partition_key", "ascending"),
    ("prompt_id", "ascending"),
    ("sample", "ascending"),
]

#: Rows per batch read, and per row group written.
_ROWS: Final = 50_000
_ROW_GROUP: Final = 10_000


@dataclass(frozen=True)
class DuplicateCounts:
    """Counts of a table. Purchases are distinct request keys.

    ``exact`` and ``near`` count the purchases that are not the ones to keep, ``units`` is their
    cost without the ``unpriced``, whose cost is unknown. ``by_distance`` counts the near ones by
    differing bits; ``largest`` is the number of purchases of the largest cluster.
    """

    clusters: int
    largest: int
    exact: int
    near: int
    units: int
    unpriced: int
    by_distance: Mapping[int, int]

    @property
    def count(self) -> int:
        """Return the number of purchases that are not the ones to keep."""
        return self.exact + self.near

    @property
    def credits(self) -> float:
        """Return their cost in credits."""
        return credits_from_units(self.units)


@dataclass(frozen=True)
class NearDuplicateSummary:
    """What was compared and found. Images are distinct files."""

    images: int
    purchases: int
    not_measured: int
    low_quality: int
    pairs_compared: int
    most_bits: int
    copies: DuplicateCounts


def near_duplicates_name(folders: Sequence[str] = ()) -> str:
    """Return the name of the table's file; ``folders`` as for the manifests."""
    return "/".join(["near_duplicates", *map(safe_name, folders), "clusters.parquet"])


def read_near_duplicates(
    storage: Storage, folders: Sequence[str] = (), columns: Sequence[str] | None = None
) -> pa.Table | None:
    """Read the table, or these columns of it; None where it does not exist."""
    try:
        with storage.open(near_duplicates_name(folders)) as file:
            return open_parquet(file).read(None if columns is None else list(columns))
    except FileNotFoundError:
        return None


def update_near_duplicates(
    storage: Storage,
    folders: Sequence[str] = (),
    *,
    verdicts: Mapping[str, str] | None = None,
    most_bits: int = NEAR_BITS,
    least_quality: int = LEAST_QUALITY,
    threads: int | None = None,
) -> NearDuplicateSummary:
    """Build the table from all manifests and measures below ``folders`` and write it atomically.

    ``verdicts`` are the present ones, by sha256. Images without measures are compared by sha256
    only. Equal inputs give equal bytes in any order of rows. Raises ConfigError where
    ``most_bits`` is out of range, and OSError or pyarrow.ArrowException for unreadable files.
    """
    if not 0 <= most_bits <= MOST_BITS:
        raise ConfigError(f"most_bits must be 0 to {MOST_BITS} bits of 256, not {most_bits}")
    names = list(manifest_names(storage, folders))
    found = find_clusters(
        _purchases(storage, names),
        _hashes(storage, names),
        verdicts or {},
        most_bits=most_bits,
        least_quality=least_quality,
        threads=threads,
    )
    table = _table(storage, names, found)
    storage.write(
        near_duplicates_name(folders),
        lambda file: pq.write_table(table, file, row_group_size=_ROW_GROUP),
    )
    pa.default_memory_pool().release_unused()
    return NearDuplicateSummary(
        images=len(found.sha256),
        purchases=int(found.purchases.sum()),
        not_measured=int((~found.measured).sum()),
        low_quality=int((found.measured & ~found.compared).sum()),
        pairs_compared=found.pairs,
        most_bits=most_bits,
        copies=count_duplicates(table),
    )


def _purchases(storage: Storage, names: Sequence[str]) -> Iterator[Purchases]:
    for batch in _stored(storage, names, ["request_key", "image_sha256", "stored_at"]):
        yield _purchases_in(batch)
    # Arrow would keep the memory of what it has read, while the search needs it.
    pa.default_memory_pool().release_unused()


def _purchases_in(batch: pa.RecordBatch) -> Purchases:
    stored_at = batch.column("stored_at").cast(pa.timestamp("us", tz="UTC")).cast(pa.int64())
    return Purchases(
        digests_from_hex(batch.column("image_sha256")),
        digests_from_hex(batch.column("request_key")),
        stored_at.fill_null(NEVER).to_numpy(zero_copy_only=False),
    )


def _hashes(storage: Storage, manifests: Sequence[str]) -> Iterator[ImageHashes]:
    """Read the measures of the partitions that have both a manifest and measures."""
    columns = ["image_sha256", "perceptual_hash", "perceptual_hash_quality", "sharpness"]
    for manifest in manifests:
        # The files of the measures are named as the manifests are.
        name = f"measures{manifest.removeprefix('manifest')}"
        if storage.size_bytes(name) is None:
            continue
        yield from map(_hashes_in, _batches(storage, name, columns))
    pa.default_memory_pool().release_unused()


def _hashes_in(batch: pa.RecordBatch) -> ImageHashes:
    hashed = pc.and_(
        pc.is_valid(batch.column("perceptual_hash")),
        pc.is_valid(batch.column("perceptual_hash_quality")),
    )
    rows = batch.filter(pc.and_(hashed, _is_hash(batch.column("image_sha256"))))
    quality = rows.column("perceptual_hash_quality").cast(pa.int32())
    sharpness = rows.column("sharpness").cast(pa.float64()).fill_null(float("nan"))
    return ImageHashes(
        digests_from_hex(rows.column("image_sha256")),
        _fixed(rows.column("perceptual_hash")),
        quality.to_numpy(zero_copy_only=False),
        sharpness.to_numpy(zero_copy_only=False),
    )


def _table(storage: Storage, names: Sequence[str], found: ImageClusters) -> pa.Table:
    """Read the manifests once more and return the rows of the clusters."""
    batches = _stored(storage, names, [*_OF_MANIFEST, "image_sha256"])
    return pa.concat_tables(
        [NEAR_DUPLICATES_SCHEMA.empty_table(), *(_clustered(one, found) for one in batches)]
    ).sort_by(_ORDER)


def _clustered(batch: pa.RecordBatch, found: ImageClusters) -> pa.Table:
    """Return the rows of a batch whose image is in a cluster."""
    places = found.find(digests_from_hex(batch.column("image_sha256")))
    here = found.clustered[places] & (places >= 0)
    rows, places = batch.filter(pa.array(here)), places[here]
    centre = found.centre[places]
    keys = digests_from_hex(rows.column("request_key"))
    keep = (places == centre) & (keys == found.best_key[centre]).all(axis=1)
    # The kept one is exact where its file was bought again.
    exact = np.where(keep, found.purchases[centre] > 1, places == centre)
    values: dict[str, Any] = {
        **{name: rows.column(name) for name in (*_OF_MANIFEST, "image_sha256")},
        "cluster": hex_from_digests(found.sha256[found.name[places]]),
        "kind": pa.array(np.where(exact, "exact", "near"), pa.string()),
        "keep": pa.array(keep, pa.bool_()),
        "distance": pa.array(found.distance[places]),
    }
    arrays = [values[field.name].cast(field.type) for field in NEAR_DUPLICATES_SCHEMA]
    return pa.Table.from_arrays(arrays, schema=NEAR_DUPLICATES_SCHEMA)


def near_duplicates_of(rows: pa.Table, hashes: pa.Table, verdicts: Mapping[str, str]) -> pa.Table:
    """Return the table for some rows of manifests, without reading or writing a file.

    ``hashes`` has ``image_sha256`` and the measures of images.
    """
    hashed = pc.and_(_is_hash(rows["image_sha256"]), _is_hash(rows["request_key"]))
    columns = [*_OF_MANIFEST, "image_sha256", "stored_at"]
    batches = rows.filter(hashed).select(columns).combine_chunks().to_batches()
    found = find_clusters(
        map(_purchases_in, batches),
        map(_hashes_in, hashes.combine_chunks().to_batches()),
        verdicts,
        most_bits=NEAR_BITS,
        least_quality=LEAST_QUALITY,
    )
    return pa.concat_tables(
        [NEAR_DUPLICATES_SCHEMA.empty_table(), *(_clustered(one, found) for one in batches)]
    )


def count_duplicates(table: pa.Table) -> DuplicateCounts:
    """Count the duplicates of a table."""
    purchases = _purchases_of(table)
    copies = purchases.filter(pc.invert(purchases["keep"]))
    near = copies.filter(pc.equal(copies["kind"], "near"))
    sizes = purchases.group_by("cluster").aggregate([("request_key", "count")])
    units = pc.round(pc.multiply(copies["credits_charged"], float(UNITS_PER_CREDIT)))
    return DuplicateCounts(
        clusters=len(sizes),
        largest=pc.max(sizes["request_key_count"]).as_py() or 0,
        exact=len(copies) - len(near),
        near=len(near),
        units=pc.sum(units.cast(pa.int64())).as_py() or 0,
        unpriced=units.null_count,
        by_distance=dict(sorted(Counter(near["distance"].to_pylist()).items())),
    )


def largest_clusters(table: pa.Table, most: int) -> list[dict[str, Any]]:
    """Return the ``most`` clusters with the most purchases, ties by name.

    Each has ``cluster``, ``purchases``, ``copies_credits`` (known cost of those not to keep), and
    of the kept one ``prompt_id``, ``sample`` and ``partition_key``.
    """
    purchases = _purchases_of(table)
    sizes = purchases.group_by("cluster").aggregate([("request_key", "count")])
    order = [("request_key_count", "descending"), ("cluster", "ascending")]
    first = sizes.sort_by(order).slice(0, most)
    kept: dict[str, dict[str, Any]] = {}
    these = pc.and_(pc.is_in(table["cluster"], value_set=first["cluster"]), table["keep"])
    for row in table.filter(these).to_pylist():
        kept.setdefault(row["cluster"], row)
    these = pc.and_(
        pc.is_in(purchases["cluster"], value_set=first["cluster"]), pc.invert(purchases["keep"])
    )
    copies = purchases.filter(these).group_by("cluster").aggregate([("credits_charged", "sum")])
    credits = dict(
        zip(*copies.select(["cluster", "credits_charged_sum"]).to_pydict().values(), strict=True)
    )
    return [
        {
            "cluster": row["cluster"],
            "purchases": row["request_key_count"],
            "copies_credits": round(credits.get(row["cluster"]) or 0.0, 4),
            **{key: kept[row["cluster"]][key] for key in ("prompt_id", "sample", "partition_key")},
        }
        for row in first.to_pylist()
    ]


def _purchases_of(table: pa.Table) -> pa.Table:
    """Return one row per purchase; rows of one request key agree."""
    columns = ["keep", "distance", "kind", "credits_charged"]
    found = table.group_by(["cluster", "request_key"]).aggregate([(one, "max") for one in columns])
    return found.rename_columns(["cluster", "request_key", *columns])


# -- reading --------------------------------------------------------------------------------------


def _stored(
    storage: Storage, names: Sequence[str], columns: Sequence[str]
) -> Iterator[pa.RecordBatch]:
    """Yield the manifest rows with an image."""
    for name in names:
        for batch in _batches(storage, name, [*columns, "status"]):
            stored = pc.equal(batch.column("status"), State.STORED.value).fill_null(False)
            for column in ("image_sha256", "request_key"):
                stored = pc.and_(stored, _is_hash(batch.column(column)))
            yield batch.filter(stored)


def _batches(storage: Storage, name: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    with storage.open(name) as file:
        yield from open_parquet(file).iter_batches(_ROWS, columns=list(columns))


def _is_hash(texts: pa.Array) -> pa.Array:
    return pc.match_substring_regex(texts, "^[0-9a-f]{64}$").fill_null(False)


def _fixed(hashes: pa.Array) -> npt.NDArray[np.uint8]:
    """Return binary hashes as n × 32 bytes."""
    fixed = hashes.cast(pa.binary(32))
    buffer = fixed.buffers()[1]
    flat = np.frombuffer(buffer, np.uint8, 32 * len(fixed), 32 * fixed.offset)
    return flat.reshape(-1, 32)

"""Measures and clusters of a review's rows, also where no table of them was made yet.

A run measures each image while it verifies it, and keeps that in a cache. So a review has measures
from the first run on, and finds the near-duplicates itself: of 100,000 images in seconds.
"""

from __future__ import annotations

from collections.abc import Mapping

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.curation.measures.builtin import NAMES
from krea_dagster.curation.measures.cache import KEY, MeasureCache, digests
from krea_dagster.curation.measures.pdq import LEAST_QUALITY
from krea_dagster.curation.similarity.near_duplicates import near_duplicates_of
from krea_dagster.engine.storage.storage import Storage

_HASH = "perceptual_hash"
_QUALITY = "perceptual_hash_quality"


def with_cached_measures(table: pa.Table, storage: Storage) -> tuple[pa.Table, pa.Table]:
    """Fill in the measures that only the cache has; return the rows, and the cached measures.

    The cached ones have the image's hash as text in ``image_sha256``.
    """
    shas = as_array(table["image_sha256"])
    hashed = pc.match_substring_regex(shas, "^[0-9a-f]{64}$").fill_null(False)
    known = shas.filter(hashed).unique()
    found = MeasureCache.builtin(storage).find(digests(known))
    names = known.take(pc.index_in(found[KEY], value_set=digests(known)))
    cached = found.append_column("image_sha256", names)
    places = pc.index_in(shas, value_set=as_array(cached["image_sha256"]))
    for name in NAMES if len(cached) else ():
        column = as_array(cached[name]).take(places)
        if name in table.column_names:
            at = table.column_names.index(name)
            column = pc.coalesce(as_array(table[name]), column.cast(table.schema.field(name).type))
            table = table.set_column(at, name, column)
        elif name != _HASH:  # of 32 bytes, for no reader
            table = table.append_column(name, column)
    return table, cached


def find_similar(table: pa.Table, cached: pa.Table, verdicts: Mapping[str, str]) -> pa.Table:
    """Return near-duplicates of the rows, by their cached measures."""
    present = table.filter(pc.and_(pc.is_valid(table["image_sha256"]), pc.invert(table["earlier"])))
    return near_duplicates_of(present, cached, verdicts)


def words_on_similar(row: Mapping[str, object], count: int) -> str:
    """Say what is known of the near-duplicates of a row; ``count`` includes the row itself."""
    if count > 1:
        return "Images that are nearly the same (colour is not compared)"
    if row["image_sha256"] is None:
        return "There is no image."
    quality = row.get(_QUALITY)
    if not isinstance(quality, int):
        return "Not compared yet: this image was not measured. Run krea-dagster curate."
    if quality < LEAST_QUALITY:
        return "Not compared: this image has too little structure."
    return "No image is nearly the same as this one (colour is not compared)."

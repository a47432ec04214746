"""Columns of a review that come from the verdicts: who judged, when and why, tags and notes.

They change with every verdict, so they are not part of the index.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import numpy as np
import pyarrow as pa

from krea_dagster.curation.review.index import ReviewIndex, describe_column
from krea_dagster.engine.verdict import NONE, Verdict

_TYPES: Final[Mapping[str, pa.DataType]] = {
    "tags": pa.list_(pa.string()),
    "note": pa.string(),
    "reason": pa.string(),
    "reviewer": pa.string(),
    "reviewed_at": pa.timestamp("us", tz="UTC"),
}
#: The names of the columns.
VERDICT_COLUMNS: Final = tuple(_TYPES)


def with_verdict_columns(index: ReviewIndex, verdicts: Mapping[str, Verdict]) -> pa.Table:
    """Return the rows of an index with the columns of what was said last of each image."""
    table = index.table
    for name, column in _columns(index, verdicts).items():
        table = table.append_column(name, column)
    return table


def describe_verdict_columns(
    index: ReviewIndex, verdicts: Mapping[str, Verdict]
) -> list[dict[str, Any]]:
    """Describe the columns for the page's filter, as ``ReviewIndex.columns`` does."""
    return [
        describe_column(name, pa.chunked_array([column]))
        for name, column in _columns(index, verdicts).items()
    ]


def _columns(index: ReviewIndex, verdicts: Mapping[str, Verdict]) -> dict[str, pa.Array]:
    count = len(index.codes_by_sha)
    values: dict[str, list[Any]] = {name: [None] * (count + 1) for name in VERDICT_COLUMNS}
    for sha256, one in verdicts.items():
        place = index.codes_by_sha.get(sha256)
        if place is None:
            continue
        values["tags"][place] = one.tags or None
        values["note"][place] = one.note
        if one.verdict != NONE:
            values["reason"][place] = one.reason
            values["reviewer"][place] = one.reviewer
            values["reviewed_at"][place] = one.at
    # A row without an image has the code -1: the last entry, which belongs to no image.
    rows = pa.array(np.where(index.sha_codes < 0, count, index.sha_codes))
    return {name: pa.array(values[name], kind).take(rows) for name, kind in _TYPES.items()}

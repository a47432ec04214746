"""The requests of a row's earlier attempts, which follow from the row by the formulas.

A manifest or a plan lists the present attempt of a row. With its earlier requests, an image that a
later one has replaced is still found by its row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.digests import hex_from_digests
from krea_dagster.prompts.identity import image_seeds, request_digests

_Rows: TypeAlias = pa.RecordBatch | pa.Table


def seeds_drawn(rows: _Rows) -> pa.BooleanArray:
    """Return which rows have a drawn seed, which another attempt would change.

    ``rows`` hold ``prompt_id``, ``sample``, ``attempt`` and ``seed``. A seed of the table that
    happens to be the one that would have been drawn (one in a million) counts as drawn.
    """
    columns = _columns(rows)
    return pc.equal(columns["seed"], _drawn_seeds(columns))


def earlier_attempts(rows: _Rows) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
    """Yield the rows that had an attempt 0, 1, … before the present one, each at that attempt.

    ``rows`` hold the columns of ``PLAN_SCHEMA`` (the partition is not needed), and any others. Each
    batch has all of them, with ``attempt``, ``seed`` and ``request_key`` of then; with it comes the
    place of each of its rows in ``rows``.
    """
    columns = _columns(rows)
    present = np.asarray(columns["attempt"].to_numpy(zero_copy_only=False), np.int64)
    if not present.any():
        return
    drawn = seeds_drawn(rows)
    for attempt in range(int(present.max())):
        places = pa.array(np.flatnonzero(present > attempt))
        then = {name: column.take(places) for name, column in columns.items()}
        then["attempt"] = pa.array(np.full(len(places), attempt, np.int32))
        then["seed"] = pc.if_else(drawn.take(places), _drawn_seeds(then), then["seed"])
        then["request_key"] = hex_from_digests(request_digests(then))
        yield pa.RecordBatch.from_pydict(then), places


def _drawn_seeds(columns: dict[str, pa.Array]) -> pa.Array:
    nothing = pa.nulls(len(columns["prompt_id"]), pa.int32())
    return image_seeds({**columns, "seed": nothing})


def _columns(rows: _Rows) -> dict[str, pa.Array]:
    return {name: as_array(rows.column(name)) for name in rows.schema.names}

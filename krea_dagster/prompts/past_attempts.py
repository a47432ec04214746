"""The requests of a row's earlier attempts, which follow from the row by the formulas of prompts.

A manifest, or a plan, lists the present attempt of a row. What was asked for before is found by
these, so that a picture that a later one has replaced is still known by its row.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts.identity import Hasher, request_keys, seeds_for


def seeds_drawn(hasher: Hasher, rows: pa.RecordBatch | pa.Table) -> pa.BooleanArray:
    """Return of which rows the seed was drawn, and so would be another at another attempt.

    ``rows`` hold ``prompt_id``, ``sample``, ``attempt`` and ``seed``. A seed of the table's own
    that is by chance the one that would have been drawn (one in a million) counts as drawn.
    """
    drawn = _seeds(hasher, rows, rows["attempt"], pa.nulls(rows.num_rows, pa.int32()))
    return pc.equal(_one(rows, "seed"), drawn)


def earlier_attempts(
    hasher: Hasher, rows: pa.RecordBatch | pa.Table
) -> Iterator[tuple[pa.RecordBatch, pa.Array]]:
    """Yield the rows that had an attempt 0, 1, … before the present one, each at that attempt.

    ``rows`` hold the columns of a plan (``prompts.plan.PLAN_SCHEMA``, without the partition), and
    any others. Each batch has all of them, with ``attempt`` and ``request_key`` of then; beside it
    comes the place of each of its rows in ``rows``.
    """
    present = np.asarray(_one(rows, "attempt").to_numpy(zero_copy_only=False), np.int64)
    if not present.any():
        return
    drawn = seeds_drawn(hasher, rows)
    for attempt in range(int(present.max())):
        places = pa.array(np.flatnonzero(present > attempt))
        chosen, was_drawn = rows.take(places), drawn.take(places)
        attempts = pa.array(np.full(chosen.num_rows, attempt, np.int32))
        nothing = pa.nulls(chosen.num_rows, pa.int32())
        seeds = pc.if_else(
            was_drawn, _seeds(hasher, chosen, attempts, nothing), _one(chosen, "seed")
        )
        keys = request_keys(
            hasher,
            prompts=_one(chosen, "prompt"),
            sizes=_one(chosen, "size"),
            qualities=_one(chosen, "quality"),
            seeds=seeds,
            nsfw_checks=_one(chosen, "nsfw_check"),
            attempts=attempts,
        )
        values = {name: _one(chosen, name) for name in chosen.schema.names}
        values |= {"request_key": keys, "attempt": attempts, "seed": seeds}
        yield pa.RecordBatch.from_pydict(values), places


def _seeds(
    hasher: Hasher, rows: pa.RecordBatch | pa.Table, attempts: pa.Array, given: pa.Array
) -> pa.Array:
    if isinstance(attempts, pa.ChunkedArray):
        attempts = _whole(attempts)
    return seeds_for(
        hasher,
        seeds=given,
        prompt_ids=_one(rows, "prompt_id"),
        samples=_one(rows, "sample"),
        attempts=attempts,
    )


def _one(rows: pa.RecordBatch | pa.Table, name: str) -> pa.Array:
    column = rows.column(name)
    return _whole(column) if isinstance(column, pa.ChunkedArray) else column


def _whole(column: pa.ChunkedArray) -> pa.Array:
    found = column.combine_chunks()
    return found if isinstance(found, pa.Array) else pa.concat_arrays(found.chunks)

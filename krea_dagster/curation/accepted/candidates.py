"""Reads slots: what a table's rows ask for, how the journal has it, and what it cost so far.

From batches of a plan or of a manifest, some ten thousand rows at a time; only what a decision
needs is kept (``wanted.SLOT_SCHEMA``).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.curation.accepted.quota import SLOT_SCHEMA
from krea_dagster.engine.budget import expected_units
from krea_dagster.engine.journal.bulk_reads import record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PLAN_SCHEMA
from krea_dagster.prompts.identity import Hasher
from krea_dagster.prompts.past_attempts import earlier_attempts, seeds_drawn

#: States in which a purchase has given a picture, or was paid, or may have been.
_BOUGHT: Final = pa.array(sorted(state.value for state in (*AT_STAKE, State.STORED, State.EXPIRED)))
_SPENT: Final = ("state", "charged_units", "reserved_units")


def read_slots(
    batches: Iterable[pa.RecordBatch],
    journal: Journal,
    *,
    column: str = "",
    prices: Mapping[str, int],
) -> pa.Table:
    """Return the slots of these rows, in their order.

    ``batches`` hold ``PLAN_SCHEMA`` and the table's further columns; those of a manifest say
    themselves how each stands, for a plan's the journal is asked. ``column`` is what images are
    counted by, beside prompts. ``prices`` are the highest that were seen, by quality, in units.
    Raises ConfigError for a column that is not there, and JournalError.
    """
    tables = [SLOT_SCHEMA.empty_table()]
    with closing(Hasher()) as hasher:
        for batch in batches:
            tables.append(_slots(batch, journal, hasher, column, prices))  # noqa: PERF401 - clearer
    return pa.concat_tables(tables).combine_chunks()


def bought(
    rows: pa.RecordBatch, journal: Journal, hasher: Hasher, prices: Mapping[str, int]
) -> tuple[pa.Array, pa.Array]:
    """Return of each row how many images were bought for it at all its attempts, and the units.

    What may have been charged counts as charged. ``rows`` hold ``PLAN_SCHEMA``. Raises
    JournalError.
    """
    images = np.zeros(rows.num_rows, np.int64)
    units = np.zeros(rows.num_rows, np.int64)
    parts = [(rows, pa.array(np.arange(rows.num_rows))), *earlier_attempts(hasher, rows)]
    for part, places in parts:
        found = record_columns(journal, part.column("request_key"), _SPENT)
        state = found["state"].combine_chunks()
        counts = np.asarray(pc.is_in(state, value_set=_BOUGHT))
        likely = pc.if_else(
            pa.array(counts),
            pc.coalesce(found["reserved_units"].combine_chunks(), price_of(part, prices)),
            0,
        )
        cost = pc.coalesce(found["charged_units"].combine_chunks(), likely)
        at = np.asarray(places)
        images[at] += counts
        units[at] += np.asarray(cost)
    return pa.array(images, pa.int32()), pa.array(units)


def price_of(rows: pa.RecordBatch, prices: Mapping[str, int]) -> pa.Array:
    """Return what each row's picture is expected to cost at most, in units."""
    qualities = rows.column("quality").dictionary_encode()
    units = [expected_units(quality, prices) for quality in qualities.dictionary.to_pylist()]
    return pa.array(units, pa.int64()).take(qualities.indices)


def _slots(
    batch: pa.RecordBatch,
    journal: Journal,
    hasher: Hasher,
    column: str,
    prices: Mapping[str, int],
) -> pa.Table:
    names = batch.schema.names
    # The first of a name is ours: the table may have any beside.
    own = pa.RecordBatch.from_arrays(
        [batch.column(names.index(field.name)).cast(field.type) for field in PLAN_SCHEMA],
        schema=PLAN_SCHEMA,
    )
    values = {name: own.column(name) for name in PLAN_SCHEMA.names}
    if column and column not in names:
        raise ConfigError(
            f"images are wanted per value of the column {column!r}, and the prompt table has none "
            f"of that name; it has {', '.join(names)}. Nothing was bought."
        )
    value = batch.column(names.index(column)).cast(pa.string()) if column else None
    values["value"] = pa.nulls(batch.num_rows, pa.string()) if value is None else value
    said = ("image_sha256", "error_code")
    if "status" in names:
        states = {name: batch.column(names.index(name)) for name in ("status", *said)}
    else:
        found = record_columns(journal, own.column("request_key"), ("state", *said))
        states = {
            name: found["state" if name == "status" else name].combine_chunks()
            for name in ("status", *said)
        }
    values |= states
    values["drawn"] = seeds_drawn(hasher, own)
    values["price_units"] = price_of(own, prices)
    values["bought_images"], values["bought_units"] = bought(own, journal, hasher, prices)
    return pa.table([values[field.name] for field in SLOT_SCHEMA], schema=SLOT_SCHEMA)

"""Reads slots: the requests of a table's rows, their state in the journal, and their cost so far.

From batches of a plan or a manifest, about ten thousand rows at a time; only the columns of
``quota.SLOT_SCHEMA`` are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.arrow import as_array
from krea_dagster.curation.accepted.quota import SLOT_SCHEMA
from krea_dagster.engine.budget import expected_units
from krea_dagster.engine.journal.bulk_reads import record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.states import AT_STAKE, State
from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PLAN_SCHEMA
from krea_dagster.prompts.past_attempts import earlier_attempts, seeds_drawn

#: States in which a purchase gave an image, or was paid, or may have been.
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

    ``batches`` hold ``PLAN_SCHEMA`` and the table's other columns. A manifest's rows have their
    state; for a plan's rows it is read from the journal. ``column`` is the one whose values are
    counted, empty for prompts. ``prices`` are the highest prices seen, by quality, in units. Raises
    ConfigError for a missing column, and JournalError.
    """
    tables = [_slots(batch, journal, column, prices) for batch in batches]
    return pa.concat_tables([SLOT_SCHEMA.empty_table(), *tables]).combine_chunks()


def bought(
    rows: pa.RecordBatch, journal: Journal, prices: Mapping[str, int]
) -> tuple[pa.Array, pa.Array]:
    """Return the number and the cost in units of each row's purchases at all attempts.

    A possible charge counts as a charge. ``rows`` hold ``PLAN_SCHEMA``. Raises JournalError.
    """
    images = np.zeros(rows.num_rows, np.int64)
    units = np.zeros(rows.num_rows, np.int64)
    parts = [(rows, pa.array(np.arange(rows.num_rows))), *earlier_attempts(rows)]
    for part, places in parts:
        found = record_columns(journal, part.column("request_key"), _SPENT)
        state = as_array(found["state"])
        counts = np.asarray(pc.is_in(state, value_set=_BOUGHT))
        likely = pc.if_else(
            pa.array(counts),
            pc.coalesce(as_array(found["reserved_units"]), price_of(part, prices)),
            0,
        )
        cost = pc.coalesce(as_array(found["charged_units"]), likely)
        at = np.asarray(places)
        images[at] += counts
        units[at] += np.asarray(cost)
    return pa.array(images, pa.int32()), pa.array(units)


def price_of(rows: pa.RecordBatch, prices: Mapping[str, int]) -> pa.Array:
    """Return the highest expected cost of each row's image, in units."""
    qualities = rows.column("quality").dictionary_encode()
    units = [expected_units(quality, prices) for quality in qualities.dictionary.to_pylist()]
    return pa.array(units, pa.int64()).take(qualities.indices)


def _slots(
    batch: pa.RecordBatch,
    journal: Journal,
    column: str,
    prices: Mapping[str, int],
) -> pa.Table:
    names = batch.schema.names
    # The table may have a column of the same name; the first one is the plan's.
    plan = pa.RecordBatch.from_arrays(
        [batch.column(names.index(field.name)).cast(field.type) for field in PLAN_SCHEMA],
        schema=PLAN_SCHEMA,
    )
    values = {name: plan.column(name) for name in PLAN_SCHEMA.names}
    if column and column not in names:
        raise ConfigError(
            f"images are wanted per value of the column {column!r}, which the prompt table does "
            f"not have; it has {', '.join(names)}. Nothing was bought."
        )
    values["value"] = (
        batch.column(names.index(column)).cast(pa.string())
        if column
        else pa.nulls(batch.num_rows, pa.string())
    )
    if "status" in names:
        for name in ("status", "image_sha256", "error_code"):
            values[name] = batch.column(names.index(name))
    else:
        record = ("state", "image_sha256", "error_code")
        found = record_columns(journal, plan.column("request_key"), record)
        for name in record:
            values["status" if name == "state" else name] = as_array(found[name])
    values["drawn"] = seeds_drawn(plan)
    values["price_units"] = price_of(plan, prices)
    values["bought_images"], values["bought_units"] = bought(plan, journal, prices)
    return pa.table([values[field.name] for field in SLOT_SCHEMA], schema=SLOT_SCHEMA)

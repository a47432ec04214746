"""Build the manifest from the journal and a plan, column by column, in batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.engine.journal.bulk_reads import record_columns
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.manifest.schema import MANIFEST_SCHEMA
from krea_dagster.models import MODEL, UNITS_PER_CREDIT, credits_from_units
from krea_dagster.prompts import PLAN_SCHEMA, Plan

#: States in which a request certainly costs nothing.
_FREE: Final = frozenset({State.PLANNED, State.DEFERRED, State.REFUSED})
_FREE_NAMES: Final = pa.array(sorted(state.value for state in _FREE), pa.string())


def manifest_schema(plan: Plan) -> pa.Schema:
    """Return the manifest's columns, and the table's passthrough columns."""
    return pa.schema([*MANIFEST_SCHEMA, *plan.passthrough])


def manifest_parts(
    plan: Plan, key: str, journal: Journal, *, locate: Callable[[str], str], run_id: str
) -> Iterator[pa.Table]:
    """Yield the manifest of a partition, some ten thousand rows at a time.

    There is one row per requested image, in the table's order, with the journal's present state.
    ``locate`` turns a name under the storage root into a path or URL. Images that another run than
    ``run_id`` bought are ``reused``. Raises JournalError.
    """
    for images in plan.batches(key):
        records = record_columns(journal, images.column(_KEY))
        yield manifest_table(images, records, locate=locate, run_id=run_id)


def manifest_table(
    images: pa.RecordBatch, records: pa.Table, *, locate: Callable[[str], str], run_id: str
) -> pa.Table:
    """Return the manifest of some images of a plan, with the journal's records of them. Pure."""
    planned = {name: images.column(at) for at, name in enumerate(PLAN_SCHEMA.names)}
    found = {name: records[name].combine_chunks() for name in records.column_names}
    known = pc.is_valid(found["state"])
    bought = pc.is_valid(found["task_id"])
    free = pc.and_(known, pc.is_in(found["state"], value_set=_FREE_NAMES))
    unknown = pc.equal(found["state"], State.UNKNOWN.value).fill_null(False)
    by_another = pc.not_equal(found["run_id"], run_id).fill_null(True)
    values: dict[str, Any] = {
        **found,
        **planned,
        "model": pa.repeat(pa.scalar(MODEL, pa.string()), images.num_rows),
        "status": found["state"].fill_null(State.PLANNED.value),
        "image_path": _located(found["image_path"], locate),
        "credits_reserved": _credits(found["reserved_units"]),
        "credits_charged": pc.if_else(free, 0.0, _credits(found["charged_units"])),
        "reused": pc.and_(bought, by_another),
        "run_id": pc.if_else(pc.or_(bought, unknown), found["run_id"], None),
    }
    columns = [values[field.name].cast(field.type) for field in MANIFEST_SCHEMA]
    further = list(images.schema)[len(PLAN_SCHEMA) :]
    return pa.Table.from_arrays(
        [*columns, *images.columns[len(PLAN_SCHEMA) :]],
        schema=pa.schema([*MANIFEST_SCHEMA, *further]),
    )


def credits_charged(record: Record) -> float | None:
    """Return a request's cost in credits: 0 where it certainly cost nothing, None if not known."""
    units = 0 if record.state in _FREE else record.charged_units
    return None if units is None else credits_from_units(units)


_KEY: Final = PLAN_SCHEMA.get_field_index("request_key")


def _credits(units: pa.Array) -> pa.Array:
    return pc.divide(units.cast(pa.float64()), float(UNITS_PER_CREDIT))


def _located(names: pa.Array, locate: Callable[[str], str]) -> pa.Array:
    """Return the paths of files. All are under one root, which is located once."""
    root = locate("images").removesuffix("images")
    return pc.binary_join_element_wise(root, names, "")

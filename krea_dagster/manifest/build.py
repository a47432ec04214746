"""Journal and prompt rows to the manifest table. Pure: no file, no network, no clock."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pyarrow as pa

from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.manifest.schema import MANIFEST_SCHEMA
from krea_dagster.models import credits_from_units
from krea_dagster.prompts import PlannedImage, PromptRows

#: States in which a request certainly costs nothing.
_FREE = frozenset({State.PLANNED, State.DEFERRED, State.REFUSED})


def manifest_table(
    images: Iterable[PlannedImage],
    rows: PromptRows,
    records: Mapping[str, Record],
    *,
    locate: Callable[[str], str],
    run_id: str,
) -> pa.Table:
    """One row per image asked for, in the table's order, then the table's further columns.

    ``images`` are those planned from ``rows``; ``records`` is what the journal knows, by
    request key. ``locate`` turns a name under the storage root into the path or URL that is
    shown. ``run_id`` is the run that asks: what another run bought is ``reused``.
    """
    columns: dict[str, list[Any]] = {name: [] for name in MANIFEST_SCHEMA.names}
    position = {row.row: number for number, row in enumerate(rows.rows)}
    carried_at: list[int] = []
    for image in images:
        carried_at.append(position[image.row])
        values = _row(image, records.get(image.request.request_key), locate, run_id)
        for name, column in columns.items():
            column.append(values.get(name))
    table = pa.table(columns, schema=MANIFEST_SCHEMA)
    carried = rows.carried.take(pa.array(carried_at, pa.int64()))
    for field, column in zip(carried.schema, carried.columns, strict=True):
        table = table.append_column(field, column)
    return table


def _row(
    image: PlannedImage, record: Record | None, locate: Callable[[str], str], run_id: str
) -> dict[str, Any]:
    request = image.request
    values: dict[str, Any] = {
        "prompt_id": image.prompt_id,
        "sample": image.sample,
        "prompt": request.prompt,
        "model": request.model,
        "size": request.size,
        "quality": request.quality,
        "seed": request.seed,
        "nsfw_check": request.nsfw_check,
        "attempt": request.attempt,
        "request_key": request.request_key,
        "partition_key": image.partition_key,
        "status": State.PLANNED.value,
        "reused": False,
    }
    if record is None:
        return values
    stored = record.image
    bought = record.task_id is not None
    values.update(
        status=record.state.value,
        task_id=record.task_id,
        credits_reserved=_credits(record.reserved_units),
        credits_charged=credits_charged(record),
        billing_rule=record.billing_rule,
        user_group=record.user_group,
        submitted_at=record.submitted_at,
        completed_at=record.completed_at,
        stored_at=record.stored_at,
        reused=bought and record.run_id != run_id,
        run_id=record.run_id if bought or record.state is State.UNKNOWN else None,
        error_code=record.error_code,
        error_message=record.error_message,
    )
    if stored is not None:
        values.update(
            image_path=locate(stored.path),
            image_sha256=stored.sha256,
            image_bytes=stored.bytes,
            image_format=stored.format,
            width=stored.width,
            height=stored.height,
        )
    return values


def credits_charged(record: Record) -> float | None:
    """What a request cost, as its row says it: 0 where certainly nothing, None while not known."""
    return _credits(0 if record.state in _FREE else record.charged_units)


def _credits(units: int | None) -> float | None:
    return None if units is None else credits_from_units(units)

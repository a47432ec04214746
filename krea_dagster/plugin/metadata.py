"""Metadata of materializations: counts, credits, pace, schema and a sheet of thumbnails.

Numbers are plain, so that Dagster plots them over time.
"""

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final, TypeVar

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from PIL import Image

from krea_dagster import redact
from krea_dagster.application.manifest_summary import ManifestSummary, StoredFile
from krea_dagster.application.quota import QuotaState
from krea_dagster.curation.accepted.quota import GroupResult, quota_totals
from krea_dagster.curation.thumbnails import NoThumbnail, Thumbnails, decoded
from krea_dagster.engine.states import State
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import StorageUnavailable
from krea_dagster.manifest import DESCRIPTIONS
from krea_dagster.models import credits_from_units
from krea_dagster.spend.quote import QuoteLine

#: Thumbnails in a row of a sheet, their longest side in pixels, and the space between them.
_COLUMNS: Final = 6
_THUMBNAIL: Final = 128
_GAP: Final = 6

#: Maximum bytes of a sheet's JPEG: the UI becomes slow if a materialization has over 100 KB.
SHEET_BYTES: Final = 45_000

#: Maximum bytes of a table, a schema and a lineage, as Dagster writes them to its database.
TABLE_BYTES: Final = 15_000
SCHEMA_BYTES: Final = 45_000
LINEAGE_BYTES: Final = 30_000

#: Maximum number of groups in the table of those that stay short.
_MOST_SHORT: Final = 50

#: Bytes that Dagster adds to a row and to a column.
_ROW_BYTES: Final = 60
_COLUMN_BYTES: Final = 200

#: The manifest's columns that are derived from columns of the prompt table.
_FROM_PROMPTS: Final[Mapping[str, str]] = {
    **{name: name for name in ("prompt_id", "prompt", "size", "quality", "seed", "nsfw_check")},
    "sample": "num_images",
}

#: The prefix of this package's entries.
PREFIX: Final = "krea/"

Metadata = Mapping[str, Any]

_Entry = TypeVar("_Entry")


def krea_metadata(values: Metadata) -> Metadata:
    """Return these entries under ``krea/``, except those of Dagster."""
    return {name if "/" in name else f"{PREFIX}{name}": value for name, value in values.items()}


def krea_entry(metadata: Mapping[str, _Entry], name: str) -> _Entry | None:
    """Return an entry of a materialization. Before they had a prefix, it was stored without."""
    return metadata.get(f"{PREFIX}{name}", metadata.get(name))


def images_metadata(figures: ManifestSummary, storage: Storage, *, seconds: float) -> Metadata:
    """Return the metadata of one partition of ``images``, from the summary of its manifest.

    What a person looks for comes first. ``seconds`` is the duration of the run, for all its
    partitions together.
    """
    values = {**usage_metadata(figures, storage)}
    latencies_s = figures.latencies_s()
    if len(latencies_s):
        values["latency_p50_s"] = round(_quantile(latencies_s, 0.5), 3)
        values["latency_p95_s"] = round(_quantile(latencies_s, 0.95), 3)
    if figures.bought and seconds > 0:
        values["images_per_second"] = round(figures.bought / seconds, 3)
    values["dagster/partition_row_count"] = figures.rows
    return values


def usage_metadata(figures: ManifestSummary, storage: Storage) -> Metadata:
    """Return what rows of a manifest got and cost, with thumbnails, for any asset."""
    return {
        **thumbnails_metadata(figures, storage),
        "images_bought": figures.bought,
        "images_reused": figures.reused,
        **count_metadata(figures),
        **({"newest_failures": failures_table(figures)} if figures.failures else {}),
        "storage": location_value(storage.locate("")),
    }


def thumbnails_metadata(figures: ManifestSummary, storage: Storage) -> Metadata:
    """Return a sheet of the first images; nothing if none can be read."""
    if (sheet := contact_sheet(figures.shown, storage)) is None:
        return {}
    encoded = base64.b64encode(sheet).decode()
    return {"thumbnails": dg.MetadataValue.md(f"![images](data:image/jpeg;base64,{encoded})")}


def count_metadata(figures: ManifestSummary) -> Metadata:
    """Return the credits and the rows by status of one partition; what is usually 0, if not 0."""
    statuses = figures.statuses
    at_stake = sum(
        statuses.get(state.value, 0) for state in (State.UNKNOWN, State.SUBMITTED, State.COMPLETED)
    )
    charged, reserved = round(figures.charged, 4), round(figures.reserved, 4)
    return {
        # Of this run; of the rows, for all runs; and of reused images.
        "credits_spent_by_run": round(figures.spent, 4),
        "credits_charged": charged,
        **({"credits_reserved": reserved} if reserved != charged else {}),
        **({"credits_saved_by_reuse": round(figures.saved, 4)} if figures.saved else {}),
        "rows": figures.rows,
        **{f"rows_{state}": count for state, count in sorted(statuses.items())},
        **({"rows_at_stake": at_stake} if at_stake else {}),
    }


def manifest_metadata(figures: ManifestSummary, path: str) -> Metadata:
    """Return the metadata of one partition of ``image_manifest``."""
    return {
        "path": location_value(path),
        **count_metadata(figures),
        "dagster/partition_row_count": figures.rows,
    }


def quote_metadata(line: QuoteLine | None) -> Metadata:
    """Return a partition's quote before the run, if there was something to buy."""
    if line is None or not line.to_buy:
        return {}
    return {"quoted_to_buy": line.to_buy, "quoted_credits": credits_from_units(line.units)}


def table_schema(
    schema: pa.Schema, descriptions: Mapping[str, str] = DESCRIPTIONS
) -> dg.TableSchema:
    """Return the first columns of a table as Dagster shows them, and the number of others."""
    columns: list[dg.TableColumn] = []
    left = SCHEMA_BYTES
    for field in schema:
        described = descriptions.get(field.name, "Passed through from the prompt table")
        column = dg.TableColumn(field.name, _short(str(field.type)), description=described)
        left -= _COLUMN_BYTES + _written(column.name, column.type, described)
        if left < 0:
            break
        columns.append(column)
    more = len(schema) - len(columns)
    rest = dg.TableConstraints(other=[f"and {more} more columns"]) if more else None
    return dg.TableSchema(columns, rest)


def prompts_lineage(schema: pa.Schema, prompts: dg.AssetKey) -> dg.TableColumnLineage:
    """Return the ``dagster/column_lineage`` from the prompt table's columns to a manifest's.

    Columns from EvoLink or the journal have none.
    """
    sources = {
        name: source
        for name in schema.names
        if (source := _FROM_PROMPTS.get(name, None if name in DESCRIPTIONS else name))
    }
    return column_lineage(sources, prompts)


def column_lineage(sources: Mapping[str, str], upstream: dg.AssetKey) -> dg.TableColumnLineage:
    """Return the ``dagster/column_lineage`` of columns from those of another asset, by name."""
    found: dict[str, list[dg.TableColumnDep]] = {}
    left = LINEAGE_BYTES
    for name, source in sources.items():
        left -= _COLUMN_BYTES + _written(name, source, *upstream.path)
        if left < 0:
            break
        found[name] = [dg.TableColumnDep(upstream, source)]
    return dg.TableColumnLineage(found)


def quota_metadata(quota: QuotaState, partition_key: str) -> Metadata:
    """Return the quota's metadata of a partition; of a column's values, all groups of the table."""
    if not quota.outcomes:
        return {}
    outcomes = [
        one
        for one in quota.outcomes
        if not quota.homes or quota.homes.get(one.name) == partition_key
    ]
    return {
        **outcomes_metadata(outcomes),
        "slots_asked_again": quota.again.get(partition_key, 0),
        "slots_held_back": quota.held.get(partition_key, 0),
    }


def outcomes_metadata(outcomes: Sequence[GroupResult]) -> Metadata:
    """Return counts over groups, and a table of the groups that stay short."""
    values: dict[str, Any] = {
        f"wanted_{key}": count for key, count in quota_totals(outcomes).items()
    }
    values["wanted_images"] = values.pop("wanted_wanted")
    short = [one for one in outcomes if one.short]
    if short:
        values["stay_short"] = small_table(
            {
                "of": one.name,
                "wanted": one.wanted,
                "accepted": one.accepted,
                "undecided": one.undecided,
                "candidates": one.images,
                "credits": credits_from_units(one.units),
                "why": one.why,
            }
            for one in short[:_MOST_SHORT]
        )
    return values


def missing_table(figures: ManifestSummary) -> dg.TableMetadataValue:
    """Return the first rows without an image as a table for the UI."""
    return small_table(figures.missing)


def failures_table(figures: ManifestSummary) -> dg.TableMetadataValue:
    """Return the newest failures; ``at`` is when EvoLink accepted the request, or null."""
    return small_table(
        [
            {
                "prompt_id": row["prompt_id"],
                "sample": row["sample"],
                "status": row["status"],
                "error_code": row["error_code"],
                "message": row["error_message"],
                "at": None if row["submitted_at"] is None else f"{row['submitted_at']:%F %T} UTC",
            }
            for row in figures.failures
        ]
    )


def small_table(
    rows: Iterable[Mapping[str, Any]],
    schema: dg.TableSchema | None = None,
    *,
    most_bytes: int = TABLE_BYTES,
) -> dg.TableMetadataValue:
    """Return a table for the UI: long cells are cut, and rows that do not fit are left out."""
    records: list[dg.TableRecord] = []
    for row in rows:
        cells = {name: _short(value) for name, value in row.items()}
        most_bytes -= _ROW_BYTES + _written(cells)
        if most_bytes < 0 and records:
            break
        records.append(dg.TableRecord(cells))
    return dg.MetadataValue.table(records, schema)


def location_value(location: str) -> dg.MetadataValue[Any]:
    """Return a path or URL as metadata without credentials: a link if a browser can follow it."""
    shown = redact.location(location)
    if shown.startswith(("http://", "https://")):
        return dg.MetadataValue.url(shown)
    return dg.MetadataValue.path(shown)


def contact_sheet(
    files: Sequence[StoredFile], storage: Storage, *, columns: int = _COLUMNS
) -> bytes | None:
    """Return a JPEG of images, None if none can be read."""
    kept = Thumbnails(storage)
    thumbnails = [one for file in files if (one := _thumbnail(storage, kept, file))]
    if not thumbnails:
        return None
    rows = -(-len(thumbnails) // columns)
    cell = _THUMBNAIL + _GAP
    width = min(columns, len(thumbnails)) * cell + _GAP
    sheet = Image.new("RGB", (width, rows * cell + _GAP), "white")
    for number, thumbnail in enumerate(thumbnails):
        row, column = divmod(number, columns)
        left = _GAP + column * cell + (_THUMBNAIL - thumbnail.width) // 2
        top = _GAP + row * cell + (_THUMBNAIL - thumbnail.height) // 2
        sheet.paste(thumbnail, (left, top))
    return _jpeg(sheet)


def _thumbnail(storage: Storage, kept: Thumbnails, file: StoredFile) -> Image.Image | None:
    name, sha256 = storage.name_of(file.location), file.sha256 or ""
    try:
        if storage.size_bytes(name) is None:
            return None
        try:
            small = decoded(kept.get(sha256, name), _THUMBNAIL)
        except NoThumbnail:  # the kept one is damaged
            small = decoded(kept.make(sha256, name), _THUMBNAIL)
    except (NoThumbnail, StorageUnavailable, OSError):
        return None
    small.thumbnail((_THUMBNAIL, _THUMBNAIL), reducing_gap=2.0)
    return small


def _jpeg(sheet: Image.Image) -> bytes:
    data = b""
    for quality in (80, 65, 50, 35, 20):
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= SHEET_BYTES:
            break
    return data


def _quantile(ordered: npt.NDArray[np.float64], share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def _short(value: Any) -> Any:
    return value if not isinstance(value, str) or len(value) <= 200 else f"{value[:199]}…"


def _written(*values: object) -> int:
    """Return the size in Dagster's database, which escapes all but ASCII."""
    return len(json.dumps(values))

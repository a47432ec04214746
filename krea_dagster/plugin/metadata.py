"""What a materialization shows: counts, credits, pace, schema and a sheet of thumbnails.

The metadata keys of this package live here and nowhere else. Numbers are plain, so that
Dagster plots them over time.
"""

import base64
import io
from collections import Counter
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Final

import dagster as dg
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from krea_dagster.engine.images import DAMAGED
from krea_dagster.engine.states import State
from krea_dagster.engine.storage import Storage
from krea_dagster.manifest import DESCRIPTIONS
from krea_dagster.models import credits_from_units
from krea_dagster.spend.quote import Line

#: Thumbnails on a partition's sheet, and their longest side in pixels.
SHEET_IMAGES: Final = 12
_COLUMNS: Final = 6
_THUMBNAIL: Final = 128
_GAP: Final = 6

#: Bytes of a sheet's JPEG: the materialization must stay well under 100 KB, above which the
#: UI becomes slow.
SHEET_BYTES: Final = 45_000

#: Rows of a table of what is missing.
MISSING_ROWS: Final = 50

Metadata = Mapping[str, Any]


def images_metadata(table: pa.Table, storage: Storage, *, seconds: float) -> Metadata:
    """The metadata of one partition of ``images``, from its manifest rows.

    ``seconds`` is how long the run worked, for all its partitions together.
    """
    bought = table.filter(pc.and_(pc.invert(table["reused"]), pc.is_valid(table["stored_at"])))
    latencies_s = sorted(
        (done - sent) / timedelta(seconds=1)
        for sent, done in zip(
            bought["submitted_at"].to_pylist(), bought["completed_at"].to_pylist(), strict=True
        )
        if sent is not None and done is not None
    )
    values: dict[str, Any] = {
        **count_metadata(table),
        "images_bought": bought.num_rows,
        "images_reused": pc.sum(table["reused"]).as_py() or 0,
        "images_per_second": round(bought.num_rows / seconds, 3) if seconds > 0 else 0.0,
    }
    if latencies_s:
        values["latency_p50_s"] = round(_quantile(latencies_s, 0.5), 3)
        values["latency_p95_s"] = round(_quantile(latencies_s, 0.95), 3)
    if (sheet := contact_sheet(table, storage)) is not None:
        picture = base64.b64encode(sheet).decode()
        values["thumbnails"] = dg.MetadataValue.md(f"![images](data:image/jpeg;base64,{picture})")
    return values


def count_metadata(table: pa.Table) -> Metadata:
    """Rows by status, and credits, of one partition's manifest rows."""
    statuses = Counter(table["status"].to_pylist())
    at_stake = sum(
        statuses.get(state.value, 0) for state in (State.UNKNOWN, State.SUBMITTED, State.COMPLETED)
    )
    # Rows that ask for the same thing share one purchase.
    money = [("credits_reserved", "max"), ("credits_charged", "max")]
    bought_once = table.group_by("request_key").aggregate(money)
    return {
        "rows": table.num_rows,
        **{f"rows_{state}": count for state, count in sorted(statuses.items())},
        "credits_reserved": _total(bought_once["credits_reserved_max"]),
        "credits_charged": _total(bought_once["credits_charged_max"]),
        "rows_at_stake": at_stake,
    }


def manifest_metadata(table: pa.Table, path: str) -> Metadata:
    """The metadata of one partition of ``image_manifest``."""
    return {
        **count_metadata(table),
        "dagster/partition_row_count": table.num_rows,
        "path": dg.MetadataValue.path(path),
    }


def quote_metadata(line: Line | None) -> Metadata:
    """What was said before a partition's run: rows to buy, and at most how many credits."""
    return {
        "quoted_to_buy": 0 if line is None else line.to_buy,
        "quoted_credits": 0.0 if line is None else credits_from_units(line.units),
    }


def table_schema(schema: pa.Schema) -> dg.TableSchema:
    """A manifest's columns as Dagster shows them."""
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                field.name,
                str(field.type),
                description=DESCRIPTIONS.get(field.name, "Carried from the prompt table"),
            )
            for field in schema
        ]
    )


def missing_table(table: pa.Table) -> dg.TableMetadataValue:
    """The rows without an image, as a table for the UI; the first 50."""
    names = ("partition_key", "prompt_id", "sample", "status", "error_code", "error_message")
    rows = missing_rows(table).select(names).slice(0, MISSING_ROWS).to_pylist()
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord({name: _short(value) for name, value in row.items()}) for row in rows
        ]
    )


def missing_rows(table: pa.Table) -> pa.Table:
    """The rows of a manifest that have no image."""
    return table.filter(pc.not_equal(table["status"], State.STORED.value))


def contact_sheet(
    table: pa.Table, storage: Storage, *, most: int = SHEET_IMAGES, columns: int = _COLUMNS
) -> bytes | None:
    """A JPEG of the first images of a manifest, or None where there is none.

    A file that cannot be read is left out: the run that finds it missing fetches it again.
    """
    stored = table.filter(pc.is_valid(table["image_path"])).slice(0, most)
    names = [storage.name_of(location) for location in stored["image_path"].to_pylist()]
    thumbnails = [thumbnail for name in names if (thumbnail := _thumbnail(storage, name))]
    if not thumbnails:
        return None
    rows = -(-len(thumbnails) // columns)
    cell = _THUMBNAIL + _GAP
    width = min(columns, len(thumbnails)) * cell + _GAP
    sheet = Image.new("RGB", (width, rows * cell + _GAP), "white")
    for number, picture in enumerate(thumbnails):
        row, column = divmod(number, columns)
        left = _GAP + column * cell + (_THUMBNAIL - picture.width) // 2
        top = _GAP + row * cell + (_THUMBNAIL - picture.height) // 2
        sheet.paste(picture, (left, top))
    return _jpeg(sheet)


def _thumbnail(storage: Storage, name: str) -> Image.Image | None:
    try:
        with storage.open(name) as file, Image.open(file) as image:
            image.draft("RGB", (_THUMBNAIL, _THUMBNAIL))
            picture: Image.Image = image.convert("RGB")
    except DAMAGED:
        return None
    picture.thumbnail((_THUMBNAIL, _THUMBNAIL), reducing_gap=2.0)
    return picture


def _jpeg(sheet: Image.Image) -> bytes:
    data = b""
    for quality in (80, 65, 50, 35, 20):
        file = io.BytesIO()
        sheet.save(file, "JPEG", quality=quality, optimize=True)
        data = file.getvalue()
        if len(data) <= SHEET_BYTES:
            break
    return data


def _total(column: pa.ChunkedArray) -> float:
    return round(pc.sum(column).as_py() or 0.0, 4)


def _quantile(ordered: list[float], share: float) -> float:
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _short(value: str | int | None) -> str | int | None:
    return value if not isinstance(value, str) or len(value) <= 200 else f"{value[:199]}…"

"""What a materialization shows: counts, credits, pace, schema and a sheet of thumbnails.

The metadata keys of this package live here and nowhere else. Numbers are plain, so that
Dagster plots them over time.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any, Final

import dagster as dg
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image

from krea_dagster.engine.images import DAMAGED
from krea_dagster.engine.states import State
from krea_dagster.engine.storage import Storage
from krea_dagster.manifest import DESCRIPTIONS
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.figures import SHEET_IMAGES, Figures
from krea_dagster.spend.quote import Line

#: Thumbnails in a row of a sheet, their longest side in pixels, and the space between them.
_COLUMNS: Final = 6
_THUMBNAIL: Final = 128
_GAP: Final = 6

#: Bytes of a sheet's JPEG: the materialization must stay well under 100 KB, above which the
#: UI becomes slow.
SHEET_BYTES: Final = 45_000

Metadata = Mapping[str, Any]


def images_metadata(figures: Figures, storage: Storage, *, seconds: float) -> Metadata:
    """The metadata of one partition of ``images``, from the figures of its manifest.

    ``seconds`` is how long the run worked, for all its partitions together.
    """
    latencies_s = figures.latencies_s()
    values: dict[str, Any] = {
        **count_metadata(figures),
        "images_bought": figures.bought,
        "images_reused": figures.reused,
        "images_per_second": round(figures.bought / seconds, 3) if seconds > 0 else 0.0,
    }
    if len(latencies_s):
        values["latency_p50_s"] = round(_quantile(latencies_s, 0.5), 3)
        values["latency_p95_s"] = round(_quantile(latencies_s, 0.95), 3)
    if (sheet := _sheet(figures.shown[:SHEET_IMAGES], storage, _COLUMNS)) is not None:
        picture = base64.b64encode(sheet).decode()
        values["thumbnails"] = dg.MetadataValue.md(f"![images](data:image/jpeg;base64,{picture})")
    return values


def count_metadata(figures: Figures) -> Metadata:
    """Rows by status, and credits, of one partition's manifest rows."""
    statuses = figures.statuses
    at_stake = sum(
        statuses.get(state.value, 0) for state in (State.UNKNOWN, State.SUBMITTED, State.COMPLETED)
    )
    return {
        "rows": figures.rows,
        **{f"rows_{state}": count for state, count in sorted(statuses.items())},
        "credits_reserved": round(figures.reserved, 4),
        "credits_charged": round(figures.charged, 4),
        "rows_at_stake": at_stake,
    }


def manifest_metadata(figures: Figures, path: str) -> Metadata:
    """The metadata of one partition of ``image_manifest``."""
    return {
        **count_metadata(figures),
        "dagster/partition_row_count": figures.rows,
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


def missing_table(figures: Figures) -> dg.TableMetadataValue:
    """The rows without an image, as a table for the UI; the first 50."""
    return dg.MetadataValue.table(
        records=[
            dg.TableRecord({name: _short(value) for name, value in row.items()})
            for row in figures.missing
        ]
    )


def contact_sheet(
    table: pa.Table, storage: Storage, *, most: int = SHEET_IMAGES, columns: int = _COLUMNS
) -> bytes | None:
    """A JPEG of the first images of a manifest, or None where there is none.

    A file that cannot be read is left out: the run that finds it missing fetches it again.
    """
    stored = table.filter(pc.is_valid(table["image_path"])).slice(0, most)
    return _sheet(stored["image_path"].to_pylist(), storage, columns)


def _sheet(locations: Sequence[str], storage: Storage, columns: int) -> bytes | None:
    names = [storage.name_of(location) for location in locations]
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


def _quantile(ordered: npt.NDArray[np.float64], share: float) -> float:
    return float(ordered[min(len(ordered) - 1, int(share * len(ordered)))])


def _short(value: str | int | None) -> str | int | None:
    return value if not isinstance(value, str) or len(value) <= 200 else f"{value[:199]}…"

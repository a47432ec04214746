"""Reads exports with the libraries of their formats, and says what is in them.

Runs in an environment of its own that has ``datasets`` and ``webdataset`` and nothing of this
project. ``python readers.py FORM FOLDER`` prints JSON: by split and prompt_id the sha256 of the
image's bytes and of its pixels, its size, its source type by IPTC, and all columns.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import sys
from datetime import date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from PIL import Image as Pillow

Found = dict[str, dict[str, dict[str, Any]]]


def main() -> None:
    form, folder = sys.argv[1], Path(sys.argv[2])
    print(json.dumps(READERS[form](folder)))


def by_datasets(folder: Path) -> Found:
    """Parquet, an image folder, or JSON lines: as ``load_dataset`` has it from the card."""
    from datasets import Image, load_dataset  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - of the other environment

    loaded = load_dataset(str(folder))
    found: Found = {}
    for split, loaded_rows in loaded.items():
        rows = loaded_rows
        has_images = "image" in rows.features
        if has_images:
            assert isinstance(rows.features["image"], Image), rows.features
            assert rows[0]["image"].size == (rows[0]["width"], rows[0]["height"])
            rows = rows.cast_column("image", Image(decode=False))
        for row in rows:
            if has_images:
                image = row.pop("image")
                data = image["bytes"] or Path(image["path"]).read_bytes()
            else:
                data = (folder / row.pop("file_name")).read_bytes()
            found.setdefault(split, {})[row["prompt_id"]] = described(data, row)
    return found


def by_webdataset(folder: Path) -> Found:
    """Tar files, as ``webdataset`` has them."""
    import webdataset  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - of the other environment

    found: Found = {}
    for split in sorted({path.name.rpartition("-")[0] for path in folder.glob("data/*.tar")}):
        urls = sorted(map(str, folder.glob(f"data/{split}-*.tar")))
        for sample in webdataset.WebDataset(urls, shardshuffle=False, empty_check=False):
            row = json.loads(sample["json"])
            assert sample["txt"].decode() == row["prompt"]
            (ending,) = {"png", "jpg", "webp", "avif"} & set(sample)
            found.setdefault(split, {})[row["prompt_id"]] = described(sample[ending], row)
    return found


def webdataset_by_datasets(folder: Path) -> Found:
    """The same, as ``datasets`` has them."""
    from datasets import Image, load_dataset  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - of the other environment

    found: Found = {}
    for split, loaded_rows in load_dataset(str(folder)).items():
        rows = loaded_rows
        images = [name for name, kind in rows.features.items() if isinstance(kind, Image)]
        for name in images:
            rows = rows.cast_column(name, Image(decode=False))
        for row in rows:
            (data,) = [row[name]["bytes"] for name in images if row[name] is not None]
            columns = row["json"] if isinstance(row["json"], dict) else json.loads(row["json"])
            found.setdefault(split, {})[columns["prompt_id"]] = described(data, columns)
    return found


def by_csv(folder: Path) -> Found:
    """CSV, as Python has it: everything is text."""
    found: Found = {}
    for table in folder.glob("*.csv"):
        with table.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                data = (folder / row.pop("file_name")).read_bytes()
                found.setdefault(table.stem, {})[row["prompt_id"]] = described(data, row)
    return found


def by_croissant(folder: Path) -> Found:
    """Any form except tar shards, as ``mlcroissant`` has it."""
    import mlcroissant  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - of the other environment

    dataset = mlcroissant.Dataset(jsonld=str(folder / "croissant.json"))
    assert not dataset.metadata.ctx.issues.errors
    found: Found = {}
    for record in dataset.records("images"):
        row = {unquote(name.partition("/")[2]): texts(value) for name, value in record.items()}
        split, image = row.pop("split"), row.pop("image")
        columns = {name: plain(value) for name, value in row.items()}
        found.setdefault(split, {})[columns["prompt_id"]] = {
            "pixels": hashlib.sha256(image.convert("RGB").tobytes()).hexdigest(),
            "columns": columns,
        }
    return found


def texts(value: Any) -> Any:
    """A value with text in place of bytes."""
    if isinstance(value, list):
        return [texts(one) for one in value]
    return value.decode() if isinstance(value, bytes) else value


def described(data: bytes, row: dict[str, Any]) -> dict[str, Any]:
    import pyexiv2  # type: ignore[import-not-found,unused-ignore] # noqa: PLC0415 - of the other environment

    with Pillow.open(io.BytesIO(data)) as image:
        pixels = hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()
        size = image.size
    with pyexiv2.ImageData(data) as file:
        source_type = file.read_xmp().get("Xmp.iptcExt.DigitalSourceType")
    return {
        "size": size,
        "source_type": source_type,
        "sha256": hashlib.sha256(data).hexdigest(),
        "pixels": pixels,
        "columns": {name: plain(value) for name, value in row.items()},
    }


def plain(value: Any) -> Any:
    match value:
        case datetime() | date() | time():
            return value.isoformat()
        case bytes():
            return base64.b64encode(value).decode()
        case Decimal():
            return f"{value:f}"
        case dict():
            return {name: plain(one) for name, one in value.items()}
        case list():
            return [plain(one) for one in value]
        case float() if not math.isfinite(value):
            return None
    return value


READERS = {
    "parquet": by_datasets,
    "imagefolder": by_datasets,
    "jsonl": by_datasets,
    "webdataset": by_webdataset,
    "webdataset-datasets": webdataset_by_datasets,
    "csv": by_csv,
    "csv-datasets": by_datasets,
    "croissant": by_croissant,
}

if __name__ == "__main__":
    main()

"""A storage root with accepted images, for tests of exports."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cache
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from krea_dagster.curation.accepted.accepted_table import accepted_name, accepted_schema
from krea_dagster.curation.measures.measures_table import measures_name
from krea_dagster.curation.similarity.near_duplicates import (
    NEAR_DUPLICATES_SCHEMA,
    near_duplicates_name,
)
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest

FURTHER: Final = (
    pa.field("category", pa.string()),
    pa.field("weight", pa.float64()),
    pa.field("tags", pa.list_(pa.string())),
)
FORMATS: Final = {"png": "PNG", "jpg": "JPEG", "webp": "WEBP"}


@cache
def drawn(number: int, ending: str = "png", side: int = 24) -> bytes:
    """Draw a different image for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, FORMATS[ending])
    return file.getvalue()


@dataclass
class ExportProject:
    """Writes accepted images, manifests and near-duplicates."""

    root: str
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.root)

    def row(self, number: int, *, image: int | None = None, **columns: Any) -> dict[str, Any]:
        """Return a stored row; every fourth has a JPEG, the others a PNG."""
        key = hashlib.sha256(b"%d" % number).hexdigest()
        ending = "jpg" if number % 4 == 3 else "png"
        data = drawn(number if image is None else image, ending)
        name = f"images/{key[:2]}/{key}.{ending}"
        self._put(name, data)
        return {
            "prompt_id": f"row-{number:04d}",
            "sample": 0,
            "prompt": f"prompt {number}, ünïcode “quoted”, 50 % | <b>",
            "model": "krea-2-turbo",
            "size": "1:1",
            "quality": "1K",
            "seed": 1 + number,
            "nsfw_check": False,
            "attempt": 0,
            "request_key": key,
            "partition_key": "a",
            "status": "stored",
            "task_id": f"task-{number}",
            "image_path": self.storage.locate(name),
            "image_sha256": hashlib.sha256(data).hexdigest(),
            "image_bytes": len(data),
            "image_format": FORMATS[ending],
            "width": 24,
            "height": 24,
            "credits_reserved": 1.0,
            "credits_charged": 0.9,
            "stored_at": datetime(2026, 11, 2, 3, 4, number % 60, 567, timezone.utc),
            "reused": number % 2 == 0,
            "category": "sea" if number % 2 else "land",
            "weight": float("nan") if number == 5 else number / 7,
            "tags": None if number == 6 else ["x", f"y{number}"],
            "verdict": "keep",
            "reviewer": "ada",
            **columns,
        }

    def rows(self, count: int, begin: int = 0) -> list[dict[str, Any]]:
        """Return rows with the numbers from ``begin`` on."""
        return [self.row(number) for number in range(begin, begin + count)]

    def write_accepted(
        self,
        rows: Sequence[dict[str, Any]],
        key: str = "a",
        *,
        columns: Mapping[str, pa.Array] = MappingProxyType({}),
    ) -> None:
        """Write the accepted images of a partition, with more columns."""
        schema = accepted_schema(pa.schema([*MANIFEST_SCHEMA, *FURTHER]))
        table = pa.Table.from_pylist([{**row, "partition_key": key} for row in rows], schema)
        for name, values in columns.items():
            table = table.append_column(name, values)
        self.storage.write(accepted_name(key), lambda file: pq.write_table(table, file))

    def write_listed(self, rows: Sequence[dict[str, Any]], key: str = "a") -> None:
        """Write the manifest of a partition."""
        schema = pa.schema([*MANIFEST_SCHEMA, *FURTHER])
        table = pa.Table.from_pylist([{**row, "partition_key": key} for row in rows], schema)
        write_manifest(self.storage, key, table)

    def write_measures(
        self, rows: Sequence[dict[str, Any]], key: str = "a", **measures: Sequence[float]
    ) -> None:
        """Write some measures of images of a partition."""
        images = [row["image_sha256"] for row in rows]
        table = pa.table({"image_sha256": images, "partition_key": [key] * len(rows), **measures})
        self.storage.write(measures_name(key), lambda file: pq.write_table(table, file))

    def write_near_duplicates(self, *clusters: Sequence[dict[str, Any]]) -> None:
        """Write the table of near-duplicates."""
        rows = [
            {
                "image_sha256": row["image_sha256"],
                "partition_key": row["partition_key"],
                "prompt_id": row["prompt_id"],
                "sample": row["sample"],
                "request_key": row["request_key"],
                "cluster": min(one["image_sha256"] for one in cluster),
                "kind": "near",
                "keep": row is cluster[0],
                "distance": 0 if row is cluster[0] else 9,
                "credits_charged": 0.9,
            }
            for cluster in clusters
            for row in cluster
        ]
        table = pa.Table.from_pylist(rows, NEAR_DUPLICATES_SCHEMA)
        self.storage.write(near_duplicates_name(), lambda file: pq.write_table(table, file))

    def _put(self, name: str, data: bytes) -> None:
        if self.storage.folder is None:
            self.storage.write(name, lambda file: file.write(data))
            return
        path = self.storage.folder / name  # without waiting for the disk, image by image
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

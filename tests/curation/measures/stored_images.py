"""A storage root with manifests and real images, for tests of measures."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from krea_dagster.curation.measures.measures_table import measures_name
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest


def drawn(number: int, side: int = 64) -> Image.Image:
    """Draw a different image for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@dataclass
class StoredImages:
    """Writes manifests and their image files."""

    root: str
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.root)

    def row(
        self, number: int, content: bytes | None = None, *, written: bool = True
    ) -> dict[str, Any]:
        """Return a stored row; its file is a drawn image, or ``content``."""
        key = hashlib.sha256(b"%d" % number).hexdigest()
        data = png(drawn(number)) if content is None else content
        name = f"images/{key[:2]}/{key}.png"
        if written:
            self.storage.write(name, lambda file: file.write(data))
        return {
            "prompt_id": f"row-{number:04d}",
            "sample": 0,
            "status": "stored",
            "request_key": key,
            "image_path": self.storage.locate(name),
            "image_sha256": hashlib.sha256(data).hexdigest(),
            "width": 64,
            "height": 64,
        }

    def write(self, key: str, rows: Sequence[dict[str, Any]], folders: Sequence[str] = ()) -> None:
        """Write the manifest of a partition."""
        rows = [{**row, "partition_key": key} for row in rows]
        write_manifest(self.storage, key, pa.Table.from_pylist(rows, MANIFEST_SCHEMA), folders)


def read_measures(storage: Storage, keys: Sequence[str], folders: Sequence[str] = ()) -> pa.Table:
    """Read the measures of partitions as one table, in the order of the keys."""
    tables = []
    for key in keys:
        with storage.open(measures_name(key, folders)) as file:
            tables.append(pq.ParquetFile(file).read().replace_schema_metadata(None))
    return pa.concat_tables(tables, promote_options="permissive")

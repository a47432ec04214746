"""A storage root with manifests and real pictures, for tests of what is measured."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image

from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest


def drawn(number: int, side: int = 64) -> Image.Image:
    """A picture of its own for each number."""
    coarse = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


@dataclass
class Shelf:
    """Writes manifests of pictures that lie there, or do not."""

    root: str
    storage: Storage = field(init=False)

    def __post_init__(self) -> None:
        self.storage = Storage(self.root)

    def row(
        self, number: int, content: bytes | None = None, *, written: bool = True
    ) -> dict[str, Any]:
        """A stored row; its file is a drawn picture, or ``content``."""
        key = hashlib.sha256(b"%d" % number).hexdigest()
        data = png(drawn(number)) if content is None else content
        name = f"images/{key[:2]}/{key}.png"
        if written:
            self.storage.write(name, lambda file: _put(file, data))
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


def _put(file: Any, data: bytes) -> None:
    file.write(data)

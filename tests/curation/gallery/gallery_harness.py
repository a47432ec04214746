"""A storage root with real images and their manifests, for galleries."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image

from krea_dagster.emulator.render import encode, render
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import Verdict
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest

#: A prompt that would attack a page which does not escape it.
HOSTILE = (
    "</p><script>window.ran = 1</script><img src=https://evil.invalid/x onerror='window.ran=1'>"
    "{{ 7 * 7 }} &amp; \u202etfel ot thgir \x00 end"
)

PROMPTS = (
    "A lighthouse on a basalt coast at blue hour, long exposure, the lamp's beam in the mist",
    "Rice terraces after rain, seen from a drone, early light, mirrored clouds",
    "Portrait of an old cellist in a workshop, window light, shallow depth of field",
    "A red kite over wet slate roofs at dawn",
    "Night market in light rain, paper lanterns, reflections on cobbles",
    "A glass greenhouse in winter, ferns inside, frost on the panes",
    "Old observatory on a ridge under a clear sky, dome half open",
    "Macro of a beetle on a wet leaf, morning dew, soft background",
    "منارة قديمة على الساحل عند الغروب، ضوء ناعم",
    "雨后的梯田,清晨的光,倒映的云",
)


def judged(row: Mapping[str, Any], verdict: str, **more: Any) -> dict[str, Verdict]:
    """Return the verdict on the image of a row, by the image's hash."""
    sha256 = row["image_sha256"]
    of = (row["request_key"], row["prompt_id"], row["sample"], 0, row["partition_key"])
    return {sha256: Verdict("v", sha256, verdict, "ada", *of, **more)}


@dataclass
class GalleryProject:
    """Manifest rows with their image files."""

    root: Path
    storage: Storage = field(init=False)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.storage = Storage(str(self.root))

    def add_image(
        self,
        name: str,
        prompt: str,
        *,
        partition: str = "a",
        image: Image.Image | None = None,
        file_format: str = "PNG",
        pixels: tuple[int, int] = (256, 256),
        further: Mapping[str, Any] | None = None,
        **different: Any,
    ) -> dict[str, Any]:
        """Add a row with a drawn or given image, and return it."""
        seed = different.get("seed", len(name) + 1)
        image = image or render(prompt, seed, *pixels)
        if image.mode == "RGB":
            data = encode(image, file_format)
        else:
            buffer = io.BytesIO()
            image.save(buffer, file_format)
            data = buffer.getvalue()
        sha256 = hashlib.sha256(data).hexdigest()
        key = hashlib.sha256(f"{name} {partition}".encode()).hexdigest()
        path = f"images/{key[:2]}/{key}.{file_format.lower()}"
        self.storage.write(path, lambda file: file.write(data))
        row = {
            "prompt_id": name,
            "sample": 0,
            "prompt": prompt,
            "size": "1:1",
            "quality": "1K",
            "seed": seed,
            "attempt": 0,
            "request_key": key,
            "partition_key": partition,
            "status": "stored",
            "image_path": self.storage.locate(path),
            "image_sha256": sha256,
            "image_format": file_format,
            "width": image.width,
            "height": image.height,
            "credits_charged": 0.45,
            **(further or {}),
            **different,
        }
        self.rows.setdefault(partition, []).append(row)
        return row

    def add_failed(self, name: str, prompt: str, partition: str = "a") -> None:
        """Add a failed row."""
        row = self.add_image(name, prompt, partition=partition)
        nothing = dict.fromkeys(["image_path", "image_sha256", "width", "height"])
        said = {"error_code": "content_policy_violation", "error_message": "refused <b>it</b>"}
        self.rows[partition][-1] = {
            **row, **nothing, **said, "status": "failed", "credits_charged": 0.0
        }  # fmt: skip

    def write(self) -> Storage:
        """Write the manifests."""
        own = set(MANIFEST_SCHEMA.names)
        for key, rows in self.rows.items():
            names = dict.fromkeys(name for row in rows for name in row if name not in own)
            further = [(name, pa.array([row.get(name) for row in rows]).type) for name in names]
            schema = pa.schema([*MANIFEST_SCHEMA, *further])
            write_manifest(self.storage, key, pa.Table.from_pylist(rows, schema))
        return self.storage

    def path_of(self, row: Mapping[str, Any]) -> Path:
        """Return the file of a row."""
        return self.root / self.storage.name_of(row["image_path"])

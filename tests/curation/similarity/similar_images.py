"""A storage root with hand-made manifests and measures, for tests of near-duplicates."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA, measures_name
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest

BEGAN = datetime(2026, 11, 2, tzinfo=timezone.utc)


def digest(text: str) -> str:
    """Return a sha256 in hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def hashes(count: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Return random perceptual hashes: count × 32 bytes."""
    return np.random.default_rng(seed).integers(0, 256, (count, 32), dtype=np.uint8)


def flipped(one: npt.NDArray[np.uint8], bits: Sequence[int]) -> npt.NDArray[np.uint8]:
    """Return a hash with these bits flipped."""
    found = np.unpackbits(one)
    found[list(bits)] ^= 1
    return np.packbits(found)


@dataclass
class SimilarImages:
    """Rows of manifests, and measures of their images."""

    root: Path
    folders: Sequence[str] = ()
    storage: Storage = field(init=False)
    rows: list[dict[str, Any]] = field(default_factory=list)
    measured: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.storage = Storage(str(self.root))

    def add(
        self,
        name: str,
        hashed: npt.NDArray[np.uint8] | None = None,
        *,
        file: str | None = None,
        partition: str = "a",
        sharpness: float | None = 100.0,
        quality: int = 100,
        later_s: float = 0.0,
        **different: Any,
    ) -> str:
        """Add a stored row, and measures where a hash is given; return the sha256 of its file.

        Rows with the same ``file`` have the same content.
        """
        sha256 = digest(f"file {file or name}")
        self.rows.append(
            {
                "prompt_id": name,
                "sample": 0,
                "prompt": f"a heron, {name}",
                "seed": 7,
                "size": "1:1",
                "quality": "1K",
                "request_key": digest(f"request {name}"),
                "partition_key": partition,
                "status": "stored",
                "image_sha256": sha256,
                "image_path": self.storage.locate(f"images/{sha256}.png"),
                "width": 1024,
                "height": 1024,
                "credits_charged": 0.45,
                "stored_at": BEGAN + timedelta(seconds=later_s),
                **different,
            }
        )
        if hashed is not None:
            self.measured.append(
                {
                    "image_sha256": sha256,
                    "partition_key": partition,
                    "perceptual_hash": hashed.tobytes(),
                    "perceptual_hash_quality": quality,
                    "sharpness": sharpness,
                }
            )
        return sha256

    def write(self, shuffle: int | None = None) -> Storage:
        """Write the tables, in the order of addition or shuffled."""
        rows, measured = list(self.rows), list(self.measured)
        if shuffle is not None:
            drawn = np.random.default_rng(shuffle)
            rows = [rows[at] for at in drawn.permutation(len(rows))]
            measured = [measured[at] for at in drawn.permutation(len(measured))]
        for key in sorted({row["partition_key"] for row in rows}):
            mine = [row for row in rows if row["partition_key"] == key]
            table = pa.Table.from_pylist(mine, MANIFEST_SCHEMA)
            write_manifest(self.storage, key, table, self.folders)
            figures = [row for row in measured if row["partition_key"] == key]
            if figures:
                self._write_measures(key, pa.Table.from_pylist(figures, MEASURES_SCHEMA))
        return self.storage

    def _write_measures(self, key: str, table: pa.Table) -> None:
        self.storage.write(
            measures_name(key, self.folders), lambda file: pq.write_table(table, file)
        )

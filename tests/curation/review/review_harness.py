"""A storage root to review: manifests of any length over a few images, and a real journal.

Each row has its own image hash, although there are few files: a review identifies images by their
hash only.
"""

from __future__ import annotations

import hashlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from functools import lru_cache
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.emulator.render import encode, render
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest

TOKEN = "a-token-of-this-test-alone"
SAMPLES = 4
PARTITIONS = 8
PIXELS = ((1024, 1024), (1152, 896), (832, 1216), (1344, 768))
#: Every 211th row has no image.
FAILS_EVERY = 211
_STORED = datetime(2026, 11, 20, 9, 0, tzinfo=timezone.utc)


@dataclass(frozen=True)
class ReviewProject:
    """A storage root with its journal."""

    folder: Path
    rows: int

    @property
    def journal_url(self) -> str:
        return f"sqlite:///{self.folder / 'journal.db'}"


@lru_cache
def texts() -> list[str]:
    """Return the prompts of the sample table."""
    table = pq.read_table(Path(__file__).parents[3] / "data" / "prompts.parquet")
    return [str(one) for one in table["prompt"].to_pylist()]


def sha256(row: int) -> str:
    return hashlib.sha256(f"picture {row}".encode()).hexdigest()


def draw_images(folder: Path, subjects: int) -> list[tuple[str, int, int, int]]:
    """Draw ``SAMPLES`` images of each prompt; return name, width, height and bytes of each."""
    made = []
    for subject in range(subjects):
        width, height = PIXELS[subject % len(PIXELS)]
        for sample in range(SAMPLES):
            image = render(texts()[subject], 1000 + sample, width, height)
            data = encode(image, "JPEG" if subject % 3 else "PNG")
            ending = "jpg" if subject % 3 else "png"
            name = f"images/{subject:02x}/{subject:03d}-{sample}.{ending}"
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
            made.append((name, width, height, len(data)))
    return made


def make_project(
    folder: Path, *, rows: int, subjects: int = 29, measured: bool = True
) -> ReviewProject:
    """Make a storage root with ``rows`` rows in ``PARTITIONS`` partitions, and its journal."""
    storage = Storage(str(folder))
    subjects = min(subjects, len(texts()))
    files = draw_images(folder, subjects)
    number = np.arange(rows)
    prompt, sample = number // SAMPLES, number % SAMPLES
    subject = prompt % subjects
    file = subject * SAMPLES + sample
    partition = prompt % PARTITIONS
    stored = number % FAILS_EVERY != FAILS_EVERY - 1
    table = pa.table(
        {
            "prompt_id": [f"prompt-{one:06d}" for one in prompt],
            "sample": pa.array(sample, pa.int32()),
            "prompt": [texts()[one] for one in subject],
            "model": ["krea-2-turbo"] * rows,
            "size": ["1:1"] * rows,
            "quality": np.where(prompt % 5 == 0, "2K", "1K").tolist(),
            "seed": pa.array(number % 1_048_576 + 1, pa.int32()),
            "nsfw_check": [False] * rows,
            "attempt": pa.array(np.zeros(rows), pa.int32()),
            "request_key": [hashlib.sha256(f"{one}".encode()).hexdigest() for one in number],
            "partition_key": [f"bucket-{one:03d}" for one in partition],
            "status": np.where(stored, "stored", "failed").tolist(),
            "task_id": [f"task-{one}" for one in number],
            "image_path": _where(stored, [storage.locate(files[one][0]) for one in file]),
            "image_sha256": _where(stored, [sha256(int(one)) for one in number]),
            "image_bytes": _where(stored, [files[one][3] for one in file]),
            "image_format": _where(
                stored, ["JPEG" if files[one][0].endswith("jpg") else "PNG" for one in file]
            ),
            "width": _where(stored, [files[one][1] for one in file]),
            "height": _where(stored, [files[one][2] for one in file]),
            "credits_charged": np.where(stored, 0.45, 0.0),
            "stored_at": _where(stored, [_STORED + timedelta(seconds=int(one)) for one in number]),
            "error_code": _where(~stored, ["content_policy"] * rows),
        }
    )
    for field in MANIFEST_SCHEMA:
        if field.name not in table.column_names:
            table = table.append_column(field.name, pa.nulls(rows, field.type))
    table = table.select(MANIFEST_SCHEMA.names).cast(MANIFEST_SCHEMA)
    table = table.append_column("campaign", pa.array([f"campaign {one % 7}" for one in prompt]))
    keys = np.asarray(partition)
    for at in range(PARTITIONS):
        write_manifest(storage, f"bucket-{at:03d}", table.filter(pa.array(keys == at)))
    if measured:
        _measure(storage, number[stored], keys[stored])
    project = ReviewProject(folder, rows)
    Journal(project.journal_url).close()
    return project


def _where(chosen: np.ndarray, values: Sequence[object]) -> pa.Array:
    return pa.array(values, mask=~chosen)


def _measure(storage: Storage, rows: np.ndarray, partitions: np.ndarray) -> None:
    source = np.random.default_rng(7)
    measures = pa.table(
        {
            "image_sha256": [sha256(int(one)) for one in rows],
            "partition_key": [f"bucket-{one:03d}" for one in partitions],
            "width": pa.array(np.full(len(rows), 1), pa.int32()),
            "sharpness": source.gamma(3.0, 120.0, len(rows)),
            "brightness": source.beta(4.0, 4.0, len(rows)),
            "entropy": source.normal(7.1, 0.4, len(rows)),
        }
    )
    storage.write("measures/bucket-000.parquet", lambda file: pq.write_table(measures, file))
    similar = rows[rows % 97 < 2]
    duplicates = pa.table(
        {
            "image_sha256": [sha256(int(one)) for one in similar],
            "cluster": [sha256(int(one) // 97 * 97) for one in similar],
            "kind": ["near"] * len(similar),
            "keep": [bool(one % 97 == 0) for one in similar],
        }
    )
    storage.write("near_duplicates/all.parquet", lambda file: pq.write_table(duplicates, file))


class Server:
    """The command in a separate process; ``url`` is the page's address."""

    def __init__(
        self, project: ReviewProject, *further: str, port: int = 0, opens: str = ""
    ) -> None:
        code = "from krea_dagster.cli.review import review_command; review_command()"
        settings = ["--storage", str(project.folder), "--port", str(port)]
        if not opens:
            settings.append("--no-open")
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *settings, "--reviewer", "ada", *further],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "KREA_REVIEW_TOKEN": TOKEN, "BROWSER": opens},
        )
        assert self._process.stdout is not None
        self.url = self._process.stdout.readline().strip()
        if not self.url:
            _, said = self._process.communicate()
            raise AssertionError(said)
        found = re.fullmatch(r"http://127\.0\.0\.1:(\d+)/.*/", self.url)
        assert found is not None
        self.port = int(found[1])

    def kill(self) -> None:
        """Kill the process."""
        self._process.kill()
        self._process.communicate()

    def stop(self) -> tuple[int, str]:
        """Stop it as Ctrl+C does; return the exit code and stderr."""
        self._process.send_signal(signal.SIGINT)
        _, said = self._process.communicate(timeout=60)
        return self._process.returncode, said

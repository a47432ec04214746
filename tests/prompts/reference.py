"""The reference: what a prompt table means, one row and one value at a time.

The package computes the same for whole columns. Tests compare the two, and use this to say which
images a table requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final
from urllib.parse import unquote

import pyarrow as pa

from krea_dagster.errors import Problem
from krea_dagster.models import SEED_MAX, SEED_MIN, ImageRequest
from krea_dagster.prompts import (
    HashPartitions,
    PartitionBy,
    PlannedImage,
    PromptTable,
    drawn_seed,
    request_key,
)
from krea_dagster.prompts.plan import Attempts
from krea_dagster.prompts.requests import digest_of


@dataclass(frozen=True)
class PromptRow:
    """One validated row, with the defaults filled in.

    ``row`` counts from 1. ``seed`` is None where one is drawn, else from 1 to 1048576.
    """

    row: int
    prompt_id: str
    prompt: str
    size: str
    quality: str
    seed: int | None
    nsfw_check: bool
    num_images: int
    partition_key: str


@dataclass(frozen=True)
class PromptRows:
    """Rows in the table's order, and a table of their passthrough columns."""

    rows: tuple[PromptRow, ...]
    passthrough: pa.Table
    warnings: tuple[Problem, ...]
    warning_count: int


def read_rows(table: PromptTable, keys: Sequence[str] | None = None) -> PromptRows:
    """Read the rows of some partitions, or of all, by the scan that a plan uses."""
    wanted = table._wanted(keys)
    rows: list[PromptRow] = []
    batches: list[pa.RecordBatch] = []
    scan = table.scan(wanted)
    for chunk in scan.map(lambda chunk: chunk):
        rows += (PromptRow(**row) for row in chunk.rows.to_pylist())
        batches.append(chunk.passthrough)
    if scan.passthrough_schema.names:
        passthrough = pa.Table.from_batches(batches, scan.passthrough_schema)
    else:  # a table without columns has no length of its own
        passthrough = pa.table({"": pa.nulls(len(rows))}).select([])
    return PromptRows(tuple(rows), passthrough, tuple(scan.warnings.first), scan.warnings.count)


def images_of(table: PromptTable, attempts: Attempts | None = None) -> list[PlannedImage]:
    """Return the images that a table requests."""
    return list(plan_images(read_rows(table).rows, attempts))


def plan_images(
    rows: Iterable[PromptRow], attempts: Attempts | None = None
) -> Iterator[PlannedImage]:
    """Yield the images that rows request: row by row, sample by sample."""
    for row in rows:
        for sample in range(row.num_images):
            attempt = (attempts or {}).get((row.prompt_id, sample), 0)
            seed = seed_for(row.seed, row.prompt_id, sample, attempt)
            key = request_key(
                prompt=row.prompt,
                size=row.size,
                quality=row.quality,
                seed=seed,
                nsfw_check=row.nsfw_check,
                attempt=attempt,
            )
            request = ImageRequest(
                key, row.prompt, row.size, row.quality, seed, row.nsfw_check, attempt
            )
            yield PlannedImage(row.prompt_id, sample, row.partition_key, request)


def seed_for(seed: int | None, prompt_id: str, sample: int = 0, attempt: int = 0) -> int:
    """Return the seed of one image of a row, which names ``seed`` or none."""
    if seed is None:
        return drawn_seed(prompt_id, sample, attempt)
    return SEED_MIN + (seed - SEED_MIN + sample) % (SEED_MAX - SEED_MIN + 1)


def derived_prompt_id(
    *, prompt: str, size: str, quality: str, seed: int | None, nsfw_check: bool
) -> str:
    """Return the prompt_id of a row whose table has no such column."""
    flag = "1" if nsfw_check else "0"
    parts = ("krea-dagster/1/id", size, quality, str(seed or 0), flag, prompt)
    return f"p-{digest_of(parts)[:16]}"


def partition_version(request_keys: Iterable[str]) -> str:
    """Return the data version of a partition with these images."""
    return digest_of(("krea-dagster/1/partition", *sorted(request_keys)))[:16]


def key_for(by: PartitionBy, prompt_id: str) -> str:
    """Return the partition of ``hash:N`` of the row with this prompt_id."""
    assert isinstance(by, HashPartitions)
    return by.keys()[(hash_of_text(prompt_id) >> 32) % by.count]


_FACTOR: Final = 0xC6A4A7935BD1E995
_MASK: Final = (1 << 64) - 1


def hash_of_text(text: str) -> int:
    """Return the MurmurHash64A of the text's UTF-8 form, with seed 0."""
    data = text.encode()
    number = len(data) * _FACTOR & _MASK
    end = len(data) - len(data) % 8
    for at in range(0, end, 8):
        word = int.from_bytes(data[at : at + 8], "little") * _FACTOR & _MASK
        word = (word ^ word >> 47) * _FACTOR & _MASK
        number = (number ^ word) * _FACTOR & _MASK
    if end < len(data):
        number = (number ^ int.from_bytes(data[end:], "little")) * _FACTOR & _MASK
    number = (number ^ number >> 47) * _FACTOR & _MASK
    return number ^ number >> 47


def key_from_name(name: str) -> str | None:
    """Return the key that ``safe_name`` was given, or None where the name was cut."""
    return None if "@" in name else unquote(name)

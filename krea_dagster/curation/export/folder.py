"""Exports of image files: a folder of images per shard, and one table per split.

``imagefolder`` has ``<split>/metadata.jsonl``, which ``datasets`` reads; ``jsonl`` and ``csv`` have
``<split>.jsonl`` and ``<split>.csv``. The column ``file_name`` is the image's path relative to the
table. Image files are synced together before the export is published, not one by one.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, BinaryIO, Final

from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedImage,
    ImageEntry,
    ShardContent,
    check_image,
)
from krea_dagster.curation.export.json_rows import to_json
from krea_dagster.curation.export.target import ExportTarget

#: The table of a split, by form.
TABLES: Final = {
    "imagefolder": "{split}/metadata.jsonl",
    "jsonl": "{split}.jsonl",
    "csv": "{split}.csv",
}


def write_folder(
    target: ExportTarget,
    folder: str,
    content: ShardContent,
    images: Iterator[ExportedImage],
    *,
    sidecars: bool,
) -> None:
    """Write the images of a shard, and their sidecars."""
    for image in images:
        target.put(f"{folder}/{image.item.file}", image.data)
        if sidecars:
            target.put(
                f"{folder}/{image.item.key}.json", _sidecar(content, image.item, image.sha256)
            )


def check_folder(
    target: ExportTarget, folder: str, content: ShardContent, *, sidecars: bool
) -> list[str]:
    """Verify the images of a shard; return the sha256 of each. Raises CorruptShard."""
    found = []
    for item in content.items:
        sha256 = check_image(item, _read(target, f"{folder}/{item.file}"))
        if sidecars:
            written = _read(target, f"{folder}/{item.key}.json")
            if written != _sidecar(content, item, sha256):
                raise CorruptShard(f"{folder}/{item.key}.json has other values")
        found.append(sha256)
    return found


def images_sha256(content: ShardContent, shas: Iterable[str]) -> str:
    """Return a hash of a shard's file names and their sha256."""
    lines = (f"{item.file} {sha}\n" for item, sha in zip(content.items, shas, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def table_lines(
    form: str, rows: Iterable[tuple[str, dict[str, Any]]], *, columns: list[str]
) -> Iterator[bytes]:
    """Yield the lines of a split's table: file name and row of each image."""
    if form != "csv":
        for file, record in rows:
            yield f"{to_json({'file_name': file, **record})}\n".encode()
        return
    text = io.StringIO()
    # The writer quotes only its line terminator, and readers also end a line at a lone \r.
    writer = csv.writer(text, lineterminator="\r\n")
    writer.writerow(["file_name", *columns])
    for file, record in rows:
        writer.writerow([file, *(_cell(record[name]) for name in columns)])
        if text.tell() > 1 << 20:
            yield text.getvalue().encode()
            text.seek(0)
            text.truncate()
    yield text.getvalue().encode()


def check_table(form: str, file: BinaryIO, names: Sequence[str]) -> None:
    """Verify that a split's table has a complete row per image. Raises CorruptShard."""
    with io.TextIOWrapper(file, encoding="utf-8", newline="" if form == "csv" else "\n") as text:
        if form == "csv":
            reader = csv.reader(text, strict=True)
            wide = len(next(reader))
            found = [row[0] for row in reader if len(row) == wide]
        else:
            found = [json.loads(line)["file_name"] for line in text]
    if found != list(names):
        raise CorruptShard(f"the table of {len(names)} images has {len(found)} valid rows")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return to_json(value) if isinstance(value, dict | list) else value


def _sidecar(content: ShardContent, item: ImageEntry, sha256: str) -> bytes:
    return f"{to_json(content.ready(item, sha256))}\n".encode()


def _read(target: ExportTarget, name: str) -> bytes:
    try:
        return target.read(name)
    except FileNotFoundError:
        raise CorruptShard(f"{name} is missing") from None

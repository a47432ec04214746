"""Exports of loose files: a folder of images for each shard, and a table of all beside them.

``imagefolder`` has ``<split>/metadata.jsonl``, which ``datasets`` reads; ``jsonl`` and ``csv``
have ``<split>.jsonl`` and ``<split>.csv``. The column ``file_name`` says where an image lies, from
where the table lies. Image files are not made durable one by one: all are, before the export is
published.
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
    check_picture,
)
from krea_dagster.curation.export.json_rows import line_of, text_of
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
    pictures: Iterator[ExportedImage],
    *,
    sidecars: bool,
) -> None:
    """Write the images of a shard, and what lies beside each."""
    for picture in pictures:
        target.put(f"{folder}/{picture.item.file}", picture.data)
        if sidecars:
            target.put(
                f"{folder}/{picture.item.key}.json", _sidecar(content, picture.item, picture.sha256)
            )


def check_folder(
    target: ExportTarget, folder: str, content: ShardContent, *, sidecars: bool
) -> list[str]:
    """Read the images of a shard back; return the sha256 of each. Raises CorruptShard."""
    found = []
    for item in content.items:
        sha256 = check_picture(item, _read(target, f"{folder}/{item.file}"))
        if sidecars:
            written = _read(target, f"{folder}/{item.key}.json")
            if written != _sidecar(content, item, sha256):
                raise CorruptShard(f"{folder}/{item.key}.json holds other values")
        found.append(sha256)
    return found


def images_sha256(content: ShardContent, shas: Iterable[str]) -> str:
    """A hash over a shard's images: a line of name and sha256 for each."""
    lines = (f"{item.file} {sha}\n" for item, sha in zip(content.items, shas, strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def table_lines(
    form: str, rows: Iterable[tuple[str, dict[str, Any]]], *, columns: list[str]
) -> Iterator[bytes]:
    """Yield the lines of a split's table: the name of each image's file, and its row."""
    if form != "csv":
        for file, record in rows:
            yield f"{line_of({'file_name': file, **record})}\n".encode()
        return
    text = io.StringIO()
    # Only what ends a line is quoted, and readers take a lone \r for an end too.
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
    """Read a split's table back: a row for each image, of as many cells. Raises CorruptShard."""
    with io.TextIOWrapper(file, encoding="utf-8", newline="" if form == "csv" else "\n") as text:
        if form == "csv":
            reader = csv.reader(text, strict=True)
            wide = len(next(reader))
            found = [row[0] for row in reader if len(row) == wide]
        else:
            found = [json.loads(line)["file_name"] for line in text]
    if found != list(names):
        raise CorruptShard(f"the table of {len(names)} images was read back as one of {len(found)}")


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return text_of(value) if isinstance(value, dict | list) else value


def _sidecar(content: ShardContent, item: ImageEntry, sha256: str) -> bytes:
    return f"{line_of(content.ready(item, sha256))}\n".encode()


def _read(target: ExportTarget, name: str) -> bytes:
    try:
        return target.read(name)
    except FileNotFoundError:
        raise CorruptShard(f"{name} is missing") from None

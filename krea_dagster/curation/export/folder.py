"""Exports of image files: a folder of images per shard, and one table per split.

``imagefolder`` has ``<split>/metadata.parquet``, which ``datasets`` reads with the types of its
columns: those of JSON lines it would guess, in each split. ``jsonl`` and ``csv`` have
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

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedFile,
    ExportedImage,
    ImageEntry,
    ShardContent,
    check_image,
)
from krea_dagster.curation.export.json_rows import records, to_json
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.export.target import ExportTarget
from krea_dagster.parquet_files import open_parquet

#: The table of a split, by form.
TABLES: Final = {
    "imagefolder": "{split}/metadata.parquet",
    "jsonl": "{split}.jsonl",
    "csv": "{split}.csv",
}


def write_folder(
    target: ExportTarget,
    folder: str,
    content: ShardContent,
    images: Iterator[ExportedImage],
    spec: ExportSpec,
) -> None:
    """Write the images of a shard, and the files next to them."""
    for image in images:
        target.put(f"{folder}/{image.item.file}", image.data)
        for ending, data in _next_to(content, image.item, image.file, spec):
            target.put(f"{folder}/{image.item.key}.{ending}", data)


def check_folder(
    target: ExportTarget,
    folder: str,
    content: ShardContent,
    files: Sequence[ExportedFile],
    spec: ExportSpec,
) -> None:
    """Verify the images of a shard, whose files are ``files``. Raises CorruptShard."""
    for item, known in zip(content.items, files, strict=True):
        check_image(item, _read(target, f"{folder}/{item.file}"), known)
        for ending, data in _next_to(content, item, known, spec):
            if _read(target, f"{folder}/{item.key}.{ending}") != data:
                raise CorruptShard(f"{folder}/{item.key}.{ending} has other values")


def images_sha256(content: ShardContent, files: Iterable[ExportedFile]) -> str:
    """Return a hash of a shard's file names and their sha256."""
    pairs = zip(content.items, files, strict=True)
    lines = (f"{item.file} {file.sha256}\n" for item, file in pairs)
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_table(
    form: str,
    file: BinaryIO,
    schema: pa.Schema,
    shards: Iterable[tuple[Sequence[str], pa.Table]],
) -> None:
    """Write a split's table from the file names and the rows of each shard."""
    if form == "imagefolder":
        columns = pa.schema([pa.field("file_name", pa.string()), *schema])
        with pq.ParquetWriter(file, columns, compression="zstd") as writer:
            for names, table in shards:
                arrays = [pa.array(names, pa.string()), *table.columns]
                writer.write_table(pa.Table.from_arrays(arrays, schema=columns))
        return
    rows = (
        (name, record)
        for names, table in shards
        for name, record in zip(names, records(table), strict=True)
    )
    file.writelines(_csv_lines(rows, schema.names) if form == "csv" else _json_lines(rows))


def _json_lines(rows: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[bytes]:
    for file, record in rows:
        yield f"{to_json({'file_name': file, **record})}\n".encode()


def _csv_lines(
    rows: Iterable[tuple[str, dict[str, Any]]], columns: Sequence[str]
) -> Iterator[bytes]:
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
    if form == "imagefolder":
        found = open_parquet(file).read(columns=["file_name"])["file_name"].to_pylist()
    else:
        found = _file_names(form, file)
    if found != list(names):
        raise CorruptShard(f"the table of {len(names)} images has {len(found)} valid rows")


def _file_names(form: str, file: BinaryIO) -> list[str]:
    with io.TextIOWrapper(file, encoding="utf-8", newline="" if form == "csv" else "\n") as text:
        if form == "csv":
            reader = csv.reader(text, strict=True)
            wide = len(next(reader))
            return [row[0] for row in reader if len(row) == wide]
        return [json.loads(line)["file_name"] for line in text]


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "true" if value else "false"
    return to_json(value) if isinstance(value, dict | list) else value


def next_to_endings(spec: ExportSpec) -> list[str]:
    """Return the endings of the files next to each image."""
    return [*(["json"] if spec.sidecars else []), *(["txt"] if spec.captions else [])]


def _next_to(
    content: ShardContent, item: ImageEntry, file: ExportedFile, spec: ExportSpec
) -> Iterator[tuple[str, bytes]]:
    """Yield the ending and the content of each file next to an image."""
    if spec.sidecars:
        yield "json", f"{to_json(content.ready(item, file))}\n".encode()
    if spec.captions:
        # Trainers take the whole text for the caption.
        yield "txt", (content.facts["prompt"][item.place].as_py() or "").encode()


def _read(target: ExportTarget, name: str) -> bytes:
    try:
        return target.read(name)
    except FileNotFoundError:
        raise CorruptShard(f"{name} is missing") from None

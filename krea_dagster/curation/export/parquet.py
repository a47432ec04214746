"""Parquet shards for the ``datasets`` library, with the images inside as an Image column.

The column ``image`` is a struct of the file's bytes and name, and the schema has the metadata that
``datasets`` writes. Row groups are small, because reading one image means reading its row group.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.export.features import IMAGE, parquet_metadata
from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedFile,
    ExportedImage,
    ShardContent,
    check_image,
    written_columns,
    written_schema,
)
from krea_dagster.curation.export.json_rows import records

_GROUP_IMAGES: Final = 100
_GROUP_BYTES: Final = 32_000_000
_IMAGE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, content: ShardContent, images: Iterator[ExportedImage]) -> None:
    """Write a shard, with one row group in memory at a time."""
    schema = shard_schema(content)
    with pq.ParquetWriter(
        path,
        schema,
        # Images are compressed already, and distinct.
        compression={
            name: "none" if name.startswith("image.") else "zstd" for name in _leaves(schema)
        },
        use_dictionary=[name for name in _leaves(schema) if not name.startswith("image.")],
        write_statistics=False,
    ) as writer:
        group: list[ExportedImage] = []
        size = 0
        for image in images:
            if group and size + len(image.data) > _GROUP_BYTES:
                writer.write_table(_group(content, group, schema))
                group, size = [], 0
            group.append(image)
            size += len(image.data)
            if len(group) == _GROUP_IMAGES:
                writer.write_table(_group(content, group, schema))
                group, size = [], 0
        if group:
            writer.write_table(_group(content, group, schema))


def check_parquet(path: Path, content: ShardContent, files: Sequence[ExportedFile]) -> None:
    """Verify a shard, whose image files are ``files``. Raises CorruptShard."""
    found = 0
    schema = shard_schema(content)
    others = schema.names[1:]
    try:
        with pq.ParquetFile(path) as file:
            if not file.schema_arrow.equals(schema, check_metadata=True):
                raise CorruptShard(f"{path.name} has other columns")
            if file.metadata.num_rows != len(content.items):
                raise CorruptShard(f"{path.name} has {file.metadata.num_rows} rows")
            for number in range(file.num_row_groups):
                group = file.read_row_group(number)
                part = slice(found, found + len(group))
                items = content.items[part]
                for item, image, known in zip(items, group["image"], files[part], strict=True):
                    value = image.as_py()
                    if value["path"] != item.file:
                        raise CorruptShard(f"{path.name}: {item.file} is missing or misplaced")
                    check_image(item, value["bytes"], known)
                expected = written_columns(content, [one.place for one in items], files[part])
                if not _same(group.select(others), expected):
                    raise CorruptShard(f"{path.name} has other values")
                found += len(group)
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(f"{path.name} cannot be read: {error}") from None


def shard_schema(content: ShardContent) -> pa.Schema:
    """Return the columns of a shard, with the metadata of ``datasets``."""
    rows = written_schema(content.table.schema, content.edits)
    schema = pa.schema([pa.field(IMAGE, _IMAGE), *rows])
    return schema.with_metadata(parquet_metadata(schema))


def _leaves(schema: pa.Schema) -> list[str]:
    """Return the Parquet paths of the columns."""
    file = pa.BufferOutputStream()
    pq.write_table(schema.empty_table(), file)
    columns = pq.ParquetFile(pa.BufferReader(file.getvalue())).schema
    return [columns.column(at).path for at in range(len(columns))]


def _group(content: ShardContent, group: list[ExportedImage], schema: pa.Schema) -> pa.Table:
    images = pa.array(
        [{"bytes": one.data, "path": one.item.file} for one in group], schema.field("image").type
    )
    places = [one.item.place for one in group]
    others = written_columns(content, places, [one.file for one in group])
    return pa.Table.from_arrays([images, *others.columns], schema=schema)


def _same(found: pa.Table, expected: pa.Table) -> bool:
    if found.equals(expected):
        return True
    # NaN is not equal to itself.
    return list(records(found)) == list(records(expected))

"""Parquet files as the datasets library reads them: the images inside, as an Image column.

The column ``image`` is a struct of the file's bytes and its name, and the schema says so in the
metadata that ``datasets`` writes itself. Row groups are small, because a reader that wants one
image reads a row group.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedImage,
    ShardContent,
    check_picture,
)
from krea_dagster.curation.export.json_rows import records

_GROUP_IMAGES: Final = 100
_GROUP_BYTES: Final = 32_000_000
_IMAGE: Final = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def write_parquet(path: Path, content: ShardContent, pictures: Iterator[ExportedImage]) -> None:
    """Write a shard; one row group is in memory at a time."""
    schema = shard_schema(content)
    with pq.ParquetWriter(
        path,
        schema,
        # Images are compressed already, and no two are alike.
        compression={
            name: "none" if name.startswith("image.") else "zstd" for name in _leaves(schema)
        },
        use_dictionary=[name for name in _leaves(schema) if not name.startswith("image.")],
        write_statistics=False,
    ) as writer:
        group: list[ExportedImage] = []
        size = 0
        for picture in pictures:
            if group and size + len(picture.data) > _GROUP_BYTES:
                writer.write_table(_group(content, group, schema))
                group, size = [], 0
            group.append(picture)
            size += len(picture.data)
            if len(group) == _GROUP_IMAGES:
                writer.write_table(_group(content, group, schema))
                group, size = [], 0
        if group:
            writer.write_table(_group(content, group, schema))


def check_parquet(path: Path, content: ShardContent) -> list[str]:
    """Read a shard back; return the sha256 of each image in it. Raises CorruptShard."""
    found: list[str] = []
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
                items = content.items[len(found) : len(found) + len(group)]
                shas: list[str] = []
                for item, image in zip(items, group["image"], strict=True):
                    value = image.as_py()
                    if value["path"] != item.file:
                        raise CorruptShard(
                            f"{path.name}: {item.file} is missing, or in another place"
                        )
                    shas.append(check_picture(item, value["bytes"]))
                expected = _columns(content, [item.place for item in items], shas)
                if not _same(group.select(others), expected):
                    raise CorruptShard(f"{path.name} holds other values")
                found += shas
    except (pa.ArrowException, OSError) as error:
        raise CorruptShard(f"{path.name} cannot be read: {error}") from None
    return found


def shard_schema(content: ShardContent) -> pa.Schema:
    """The columns of a shard, with what ``datasets`` wants to know of them."""
    own = [pa.field("exported_sha256", pa.string())] if content.embed else []
    fields = [pa.field("image", _IMAGE), *content.table.schema, *own]
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    for field in fields[1:]:
        feature = _feature(field.type)
        if feature is None:
            # Of a type that it has no name for: then it finds out for itself, all but the images.
            features = {}
            break
        features[field.name] = feature
    info = {"info": {"features": features}} if features else {}
    metadata = {"huggingface": json.dumps(info)} if info else None
    return pa.schema([pa.field(f.name, f.type) for f in fields], metadata)


#: Arrow's names of types, where ``datasets`` has others.
_NAMES: Final = {"double": "float64", "float": "float32", "halffloat": "float16"}


def _feature(kind: pa.DataType) -> Any:
    """How ``datasets`` writes a type; None for one that it writes in no stable way."""
    if pa.types.is_list(kind) and not pa.types.is_nested(kind.value_type):
        inner = _feature(kind.value_type)
        return None if inner is None else {"feature": inner, "_type": "Sequence"}
    if pa.types.is_nested(kind) or pa.types.is_fixed_size_binary(kind):
        return None
    name = str(kind)
    if pa.types.is_date(kind):
        name = name.partition("[")[0]
    return {"dtype": _NAMES.get(name, name), "_type": "Value"}


def _leaves(schema: pa.Schema) -> list[str]:
    """The names of a file's columns as Parquet has them."""
    names = []
    for field in schema:
        names += _paths(field.name, field.type)
    return names


def _paths(name: str, kind: pa.DataType) -> list[str]:
    if pa.types.is_struct(kind):
        return [path for one in kind for path in _paths(f"{name}.{one.name}", one.type)]
    if pa.types.is_map(kind):
        return [
            *_paths(f"{name}.key_value.key", kind.key_type),
            *_paths(f"{name}.key_value.value", kind.item_type),
        ]
    if pa.types.is_nested(kind):
        return _paths(f"{name}.list.element", kind.value_type)
    return [name]


def _group(content: ShardContent, group: list[ExportedImage], schema: pa.Schema) -> pa.Table:
    images = pa.array(
        [{"bytes": one.data, "path": one.item.file} for one in group], schema.field("image").type
    )
    places = [one.item.place for one in group]
    others = _columns(content, places, [one.sha256 for one in group])
    return pa.Table.from_arrays([images, *others.columns], schema=schema)


def _columns(content: ShardContent, places: list[int], shas: list[str]) -> pa.Table:
    table = content.table.take(pa.array(places, pa.int64()))
    if not content.embed:
        return table
    return table.append_column("exported_sha256", pa.array(shas, pa.string()))


def _same(found: pa.Table, expected: pa.Table) -> bool:
    if found.equals(expected):
        return True
    # Numbers that are none are not equal to themselves.
    return list(records(found)) == list(records(expected))

"""The other files of a version: the tables of image files, the index, the dataset card."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from krea_dagster.curation.export.croissant import CROISSANT, write_croissant
from krea_dagster.curation.export.dataset_facts import DatasetFacts
from krea_dagster.curation.export.folder import TABLES, check_table, write_table
from krea_dagster.curation.export.image_content import ending_of, written_columns, written_schema
from krea_dagster.curation.export.plan import ExportPlan, content_of, shard_layout
from krea_dagster.curation.export.shards import FinishedShard, ShardBuilder
from krea_dagster.curation.export.spec import ONE_FILE
from krea_dagster.curation.export.target import EXPORT, FORMAT_VERSION, INDEX, INDEX_SCHEMA


def write_version_files(
    builder: ShardBuilder,
    plan: ExportPlan,
    shards: Sequence[FinishedShard],
    card: str,
    facts: DatasetFacts,
) -> Mapping[str, Any]:
    """Write the tables, the index and the card, and finally ``export.json``; return its content."""
    target, spec, version = builder.target, builder.spec, builder.version
    for split in spec.splits if spec.form in TABLES else ():
        of_split = [one for one in shards if one.shard.split == split.name]
        _write_table(builder, split.name, of_split)
    builder.known.forget()
    target.storage.write(f"{version}/{INDEX}", lambda file: _write_index(file, builder, shards))
    croissant = write_croissant(facts, spec, plan, version=version)
    for name, text in (("README.md", card.encode()), (CROISSANT, croissant)):
        target.storage.write(f"{version}/{name}", partial(_all, pieces=[text]))
    described = {
        "format_version": FORMAT_VERSION,
        "version": version,
        "layout": shard_layout(spec),
        "image_edits": builder.rows.edits.settings(),
        "made_by": facts.made_by,
        "images": plan.images,
        "splits": dict(facts.splits),
        "credits_charged": facts.credits,
        "bytes": sum(one.bytes for one in shards),
        "shards": [
            {
                "name": one.shard.name,
                "split": one.shard.split,
                "number": one.shard.number,
                "images": len(one.shard.rows),
                "bytes": one.bytes,
                "crc32": one.crc32,
                "images_sha256": one.images_sha256,
                "fingerprint": one.shard.fingerprint,
            }
            for one in shards
        ],
    }
    last = f"{json.dumps(described, indent=1)}\n".encode()
    target.storage.write(f"{version}/{EXPORT}", partial(_all, pieces=[last]))
    return described


def _write_table(builder: ShardBuilder, split: str, shards: Sequence[FinishedShard]) -> None:
    """Write the table of a split, shard by shard, and verify it."""
    form, name = builder.spec.form, TABLES[builder.spec.form].format(split=split)
    path, written = f"{builder.version}/{name}", list[str]()

    def rows() -> Iterator[tuple[Sequence[str], pa.Table]]:
        for one in shards:
            content = content_of(builder.rows, one.shard)
            # The table of an imagefolder is in the split's folder, the others are above it.
            folder = one.shard.name
            if form == "imagefolder":
                folder = folder.partition("/")[2]
            names = [f"{folder}/{item.file}" for item in content.items]
            written.extend(names)
            places = [item.place for item in content.items]
            yield names, written_columns(content, places, one.files)

    schema = written_schema(builder.rows.schema, builder.rows.edits)
    builder.target.storage.write(path, lambda file: write_table(form, file, schema, rows()))
    with builder.target.storage.open(path) as file:
        check_table(form, file, written)


def _write_index(file: BinaryIO, builder: ShardBuilder, shards: Sequence[FinishedShard]) -> None:
    with pq.ParquetWriter(file, INDEX_SCHEMA, compression="zstd") as writer:
        for one in shards:
            shard = one.shard
            facts = builder.rows.take(
                shard.rows, ["prompt_id", "sample", "request_key", "image_path", "image_sha256"]
            )
            keys = [key.decode() for key in builder.rows.keys[shard.rows].tolist()]
            files = [
                f"{key}.{builder.rows.edits.ending(ending_of(path))}"
                for key, path in zip(keys, facts["image_path"].to_pylist(), strict=True)
            ]
            folder = "" if builder.spec.form in ONE_FILE else f"{shard.name}/"
            columns = {
                "key": keys,
                "split": [shard.split] * len(keys),
                "shard": [shard.number] * len(keys),
                "file": [f"{folder}{name}" for name in files],
                **{
                    name: facts[name]
                    for name in ("prompt_id", "sample", "request_key", "image_sha256")
                },
                "exported_sha256": [file.sha256 for file in one.files],
                "exported_bytes": [file.bytes for file in one.files],
            }
            writer.write_table(pa.table(columns, schema=INDEX_SCHEMA))


def _all(file: BinaryIO, pieces: Iterable[bytes]) -> None:
    file.writelines(pieces)

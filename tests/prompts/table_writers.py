"""Tables of Delta and Iceberg whose rows other writers (Spark, Trino) have deleted in place.

The Python libraries read such deletions and write none, so these write the files by the formats'
specifications.
"""

from __future__ import annotations

import base64
import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io.fsspec import FsspecFileIO
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestWriterV2,
    write_manifest_list,
)
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadataV2
from pyiceberg.typedef import Record
from pyroaring import BitMap64

_B85 = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz!#$%&()*+-;<=>?@^_`{|}~"
_Z85 = b"0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
#: The magic number of a bitmap in a deletion vector of Delta.
_DELTA_MAGIC = 1681511377


def delete_in_delta(folder: Path, places: Sequence[int]) -> None:
    """Delete rows of a table with one data file by a deletion vector in its log."""
    log = folder / "_delta_log"
    first = [json.loads(line) for line in (log / f"{0:020}.json").read_text().splitlines()]
    add = next(action["add"] for action in first if "add" in action)
    bitmap = struct.pack("<i", _DELTA_MAGIC) + BitMap64(places).serialize()
    encoded = base64.b85encode(bitmap.ljust(-(-len(bitmap) // 4) * 4, b"\0"))
    vector = {
        "storageType": "i",
        "pathOrInlineDv": encoded.translate(bytes.maketrans(_B85, _Z85)).decode(),
        "sizeInBytes": len(bitmap),
        "cardinality": len(places),
    }
    features = ["deletionVectors"]
    protocol = {
        "minReaderVersion": 3,
        "minWriterVersion": 7,
        "readerFeatures": features,
        "writerFeatures": features,
    }
    remove = {"path": add["path"], "deletionTimestamp": 1, "dataChange": True}
    version = len(list(log.glob("*.json")))
    actions: list[dict[str, Any]] = [
        {"protocol": protocol},
        {"remove": remove},
        {"add": {**add, "dataChange": True, "deletionVector": vector}},
    ]
    (log / f"{version:020}.json").write_text("".join(json.dumps(one) + "\n" for one in actions))


class InMemory(FsspecFileIO):
    """Files of Iceberg in fsspec's store in memory."""

    def get_fs(self, scheme: str, hostname: str | None = None) -> Any:  # noqa: ARG002
        return fsspec.filesystem(scheme)


class _DeletesWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


def delete_in_iceberg(
    table: Table, deleted: pa.Table, content: DataFileContent, equality_ids: list[int] | None = None
) -> None:
    """Commit a delete file, of rows by position or by equality, to a table on this machine.

    The new version is named by the version hint; the catalog does not know it.
    """
    root = Path(table.location().removeprefix("file://"))
    path = root / "data" / "deletes.parquet"
    pq.write_table(deleted, path)
    current = table.metadata.current_snapshot()
    assert current is not None
    assert isinstance(table.metadata, TableMetadataV2)
    sequence, snapshot_id = table.metadata.last_sequence_number + 1, current.snapshot_id + 1
    data_file = DataFile.from_args(
        content=content,
        file_path=str(path),
        file_format=FileFormat.PARQUET,
        partition=Record(),
        record_count=deleted.num_rows,
        file_size_in_bytes=path.stat().st_size,
        equality_ids=equality_ids,
    )
    manifest = table.io.new_output(str(root / "metadata" / "deletes.avro"))
    with _DeletesWriter(table.spec(), table.schema(), manifest, snapshot_id, "null") as writer:
        writer.add_entry(
            ManifestEntry.from_args(
                status=ManifestEntryStatus.ADDED, snapshot_id=snapshot_id, data_file=data_file
            )
        )
    listed = root / "metadata" / "snap-deletes.avro"
    manifests = [*current.manifests(table.io), writer.to_manifest_file()]
    with write_manifest_list(
        2, table.io.new_output(str(listed)), snapshot_id, current.snapshot_id, sequence, "null"
    ) as lists:
        lists.add_manifests(manifests)
    metadata = json.loads(Path(table.metadata_location.removeprefix("file://")).read_text())
    snapshot = {
        **metadata["snapshots"][-1],
        "snapshot-id": snapshot_id,
        "parent-snapshot-id": current.snapshot_id,
        "sequence-number": sequence,
        "manifest-list": str(listed),
        "summary": {"operation": "delete"},
    }
    metadata["snapshots"].append(snapshot)
    metadata["current-snapshot-id"] = snapshot_id
    metadata["last-sequence-number"] = sequence
    metadata["refs"]["main"]["snapshot-id"] = snapshot_id
    (root / "metadata" / "v7.metadata.json").write_text(json.dumps(metadata))
    (root / "metadata" / "version-hint.text").write_text("7")

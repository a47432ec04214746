"""Data versions of the columns that a prompt table only passes through to the manifest."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Final

import duckdb
import pyarrow as pa

from krea_dagster.application.partition_look import PartitionLook, looks_of
from krea_dagster.prompts import PromptTable
from krea_dagster.prompts.scan import Chunk

_BITS: Final = 2**64


@dataclass(frozen=True)
class Carried:
    """The further columns of a table: their versions by partition, sorted, and their schema.

    A version depends on their names, types and order, and on each row's prompt_id and values, but
    not on the order of the rows. ``looks`` are at the rows that were read for it.
    """

    versions: Mapping[str, str]
    schema: pa.Schema
    looks: Mapping[str, PartitionLook]


def carried_columns(table: PromptTable) -> Carried:
    """Read the further columns of a table. Raises ConfigError or PromptTableError."""
    sums: dict[str, int] = defaultdict(int)
    looks: dict[str, PartitionLook] = defaultdict(PartitionLook)
    with closing(duckdb.connect(":memory:")) as duck:
        scan = table.scan()
        for chunk in scan.map(lambda chunk: chunk):
            for key, value in _sums(chunk, duck):
                sums[key] = (sums[key] + value) % _BITS
            rows = (chunk.rows.column(name) for name in ("partition_key", "prompt"))
            for key, look in looks_of(*rows).items():
                looks[key] += look
        about = str([(field.name, str(field.type)) for field in scan.passthrough_schema])
    versions = {
        key: hashlib.sha256(f"{about}\x1f{sums[key]}".encode()).hexdigest()[:16]
        for key in sorted(sums)
    }
    return Carried(versions, scan.passthrough_schema, looks)


def _sums(chunk: Chunk, duck: duckdb.DuckDBPyConnection) -> list[tuple[str, int]]:
    """Add up a hash of each row, by partition."""
    columns = [chunk.rows.column("prompt_id"), *chunk.passthrough.columns]
    names = [f"c{number}" for number in range(len(columns))]
    rows = pa.table([chunk.rows.column("partition_key"), *columns], ["partition", *names])
    found = duck.from_arrow(rows).aggregate(
        f"partition, (sum(hash({', '.join(names)})::hugeint) % {_BITS})::varchar", "partition"
    )
    return [(key, int(value)) for key, value in found.fetchall()]

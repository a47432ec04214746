"""Data versions of the columns that a prompt table only passes through to the manifest."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping
from contextlib import closing
from typing import Final

import duckdb
import pyarrow as pa

from krea_dagster.prompts import PromptTable
from krea_dagster.prompts.scan import Chunk

_BITS: Final = 2**64


def carried_versions(table: PromptTable) -> Mapping[str, str]:
    """Return a version of each partition's further columns, by key, sorted.

    It depends on their names, types and order, and on each row's prompt_id and values, but not on
    the order of the rows. Raises ConfigError or PromptTableError.
    """
    sums: dict[str, int] = defaultdict(int)
    with closing(duckdb.connect(":memory:")) as duck:
        scan = table.scan()
        for chunk in scan.map(lambda chunk: chunk):
            for key, value in _sums(chunk, duck):
                sums[key] = (sums[key] + value) % _BITS
        about = str([(field.name, str(field.type)) for field in scan.passthrough_schema])
    return {
        key: hashlib.sha256(f"{about}\x1f{sums[key]}".encode()).hexdigest()[:16]
        for key in sorted(sums)
    }


def _sums(chunk: Chunk, duck: duckdb.DuckDBPyConnection) -> list[tuple[str, int]]:
    """Add up a hash of each row, by partition."""
    columns = [chunk.rows.column("prompt_id"), *chunk.passthrough.columns]
    names = [f"c{number}" for number in range(len(columns))]
    rows = pa.table([chunk.rows.column("partition_key"), *columns], ["partition", *names])
    found = duck.from_arrow(rows).aggregate(
        f"partition, (sum(hash({', '.join(names)})::hugeint) % {_BITS})::varchar", "partition"
    )
    return [(key, int(value)) for key, value in found.fetchall()]

"""Marks of a table and of reports, which the prompts sensor compares, and its cursor.

They are cheap to take. The table is read only if one has changed.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import dagster as dg

T = TypeVar("T")


@dataclass(frozen=True)
class Marks:
    """The sensor's cursor: about 200 bytes for any number of partitions.

    ``files`` is empty if the listing of the files does not show changes; the table is then read at
    every tick. ``reported`` are the positions in Dagster's event log of the last reports, by the
    sensor or by runs. ``upstream`` is one of the materializations of the asset whose value is the
    table. ``prunes``: partitions that left the table are removed. ``versions`` is one hash over the
    data versions of all partitions.
    """

    files: str
    attempts: str
    reported: str
    upstream: str = ""
    prunes: bool = False
    versions: str = ""

    def unchanged_since(self, before: "Marks | None") -> bool:
        """Return whether nothing has changed since ``before``, when everything was reported."""
        return (
            before is not None
            and self.files != ""
            and replace(self, versions="") == replace(before, versions="")
        )


def read_cursor(kind: type[T], cursor: str | None) -> T | None:
    """Read a cursor; None for none, and for one of another version of this package."""
    try:
        return kind(**json.loads(cursor or "null"))
    except (TypeError, ValueError):
        return None


def mark_of_reports(instance: dg.DagsterInstance, keys: Sequence[dg.AssetKey]) -> str:
    """Return the positions of the assets' last materializations in Dagster's event log."""
    positions = {}
    for record in instance.get_asset_records(keys):
        last = record.asset_entry.last_materialization_record
        positions[record.asset_entry.asset_key] = None if last is None else last.storage_id
    return "/".join(str(positions.get(key) or 0) for key in keys)


def hash_of_versions(*versions: Mapping[str, str]) -> str:
    """Return one hash over the data versions of many partitions of some assets."""
    return _hash(
        json.dumps([number, *one])
        for number, some in enumerate(versions)
        for one in sorted(some.items())
    )


def _hash(lines: Any) -> str:
    digest = hashlib.sha256()
    for line in lines:
        digest.update(line.encode())
        digest.update(b"\n")
    return digest.hexdigest()[:32]

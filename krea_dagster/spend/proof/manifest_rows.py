"""Compare the manifest files with the journal, row by row, streaming."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from typing import Any, Final

import pyarrow as pa

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import Event, State, advance
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import IllegalTransition
from krea_dagster.manifest import (
    credits_charged,
    earlier_rows,
    manifest_name,
    present_manifests,
)
from krea_dagster.models import units_from_credits
from krea_dagster.parquet_files import open_parquet
from krea_dagster.spend.proof.findings import FindingKind, ProofFindings

#: Columns that must agree with the journal.
_PROVED: Final = ("status", "task_id", "image_path", "image_sha256", "credits_charged")
#: Columns that name the row.
_NAMES: Final = ("prompt_id", "sample", "partition_key", "request_key")
_BATCH: Final = 4096


@dataclass
class ListedRows:
    """The rows of the manifests.

    ``rows_of`` names, by request key, the first row that lists it; ``earlier`` the row that listed
    it before it left the manifests. ``written`` is when the newest manifest of each file name was
    written.
    """

    files: int = 0
    rows: int = 0
    agreeing: int = 0
    rows_of: dict[str, str] = field(default_factory=dict)
    earlier: dict[str, str] = field(default_factory=dict)
    written: dict[str, datetime | None] = field(default_factory=dict)

    def name(self, record: Record) -> str:
        """Return a request's row as text, or its key and partition where no row lists it."""
        key = record.request_key
        row = self.rows_of.get(key) or self.earlier.get(key)
        return row or f"request {record.request_key[:12]} ({record.partition_key})"

    @cached_property
    def names(self) -> frozenset[str]:
        """The rows that are listed now."""
        return frozenset(self.rows_of.values())

    def has_left(self, record: Record) -> bool:
        """Return whether a manifest was written without an image that was stored.

        Then the table does not request it any more.
        """
        if record.request_key in self.earlier:
            return True
        name = _last_part(manifest_name(record.partition_key))
        if name not in self.written:
            return False
        written, since = self.written[name], record.stored_at or record.completed_at
        return written is None or since is None or written >= since


def compare_rows(
    storage: Storage, journal: Journal, findings: ProofFindings, pruned: Collection[str] = ()
) -> ListedRows:
    """Compare every manifest under the storage root with the journal.

    The journal is read after the rows: where a run changes both meanwhile, a row can be behind the
    journal, and never ahead. The files of ``pruned`` requests have no path.
    """
    listed = ListedRows()
    if (earlier := earlier_rows(storage, _NAMES)) is not None:
        for row in earlier.to_pylist():
            listed.earlier.setdefault(row["request_key"], _row_name(row))
    for name in present_manifests(storage):
        listed.files += 1
        _note_written(listed, name, storage.modified_at(name))
        for batch in _batches(storage, name, findings):
            records = journal.records({row["request_key"] for row in batch})
            for row in batch:
                listed.rows += 1
                record = records.get(row["request_key"])
                if record is None:
                    listed.agreeing += _unknown(name, row, findings)
                    continue
                listed.rows_of.setdefault(record.request_key, _row_name(row))
                listed.agreeing += _compare(
                    name, row, record, findings, storage=storage, journal=journal, pruned=pruned
                )
    return listed


def _note_written(listed: ListedRows, name: str, at: datetime | None) -> None:
    part = _last_part(name)
    known = listed.written.get(part)
    listed.written[part] = at if known is None or at is None else max(known, at)


def _batches(
    storage: Storage, name: str, findings: ProofFindings
) -> Iterator[list[dict[str, Any]]]:
    try:
        with storage.open(name) as file:
            parquet = open_parquet(file)
            columns = [*_NAMES, *_PROVED]
            if missing := set(columns) - set(parquet.schema_arrow.names):
                raise pa.ArrowInvalid(f"no column {min(missing)!r}")
            for batch in parquet.iter_batches(_BATCH, columns=columns):
                yield batch.to_pylist()
    except (OSError, pa.ArrowException) as error:
        findings.add(FindingKind.MANIFEST_UNREADABLE, f"{name} cannot be read: {error}")


def _unknown(name: str, row: Mapping[str, Any], findings: ProofFindings) -> bool:
    """Check a row whose request is not in the journal: nothing may have been done for it."""
    filled = any(row[column] is not None for column in _PROVED[1:])
    if row["status"] == State.PLANNED.value and not filled:
        return True
    findings.add(
        FindingKind.ROW_UNKNOWN,
        f"{_row_name(row)}: {name} says {row['status']}"
        + (f" and {row['credits_charged']:g} credits" if row["credits_charged"] else "")
        + ", and the journal does not have its request",
        units_from_credits(row["credits_charged"] or 0),
        request_key=row["request_key"],
        task_id=row["task_id"],
    )
    return False


def _compare(
    name: str,
    row: Mapping[str, Any],
    record: Record,
    findings: ProofFindings,
    *,
    storage: Storage,
    journal: Journal,
    pruned: Collection[str],
) -> bool:
    image = record.image
    recorded = {
        "status": record.state.value,
        "task_id": record.task_id,
        "image_path": None if image is None else image.path,
        "image_sha256": None if image is None else image.sha256,
        "credits_charged": credits_charged(record),
    }
    listed = {column: row[column] for column in _PROVED}
    if listed["image_path"] is not None:  # as it was when the manifest was written
        listed["image_path"] = storage.name_of(listed["image_path"])
    elif record.request_key in pruned:
        recorded["image_path"] = None
    wrong = [column for column in _PROVED if listed[column] != recorded[column]]
    if not wrong:
        return True
    behind = "status" in wrong and _was_right(row, record, journal)
    column = wrong[0]
    findings.add(
        FindingKind.ROW_BEHIND if behind else FindingKind.ROW_DIFFERS,
        f"{_row_name(row)}: {name} says {column} {_shown(row[column])}, the journal "
        f"{_shown(recorded[column])}"
        + ("; the manifest is older, materialize it again" if behind else ""),
        record.charged_units or 0,
        request_key=record.request_key,
        task_id=record.task_id,
    )
    return False


def _was_right(row: Mapping[str, Any], record: Record, journal: Journal) -> bool:
    """Return whether a row shows an earlier state of its request, and no other money."""
    has_image = row["image_path"] is not None or row["image_sha256"] is not None
    if has_image and row["status"] != State.STORED.value:
        return False
    if row["task_id"] not in (None, record.task_id):
        return False
    if row["credits_charged"] not in (None, 0.0, credits_charged(record)):
        return False
    return row["status"] in _states(journal, record.request_key)


def _states(journal: Journal, request_key: str) -> set[str]:
    """Return all states that a request was in, or may have been in."""
    state: State | None = None
    states: set[str] = set()
    try:
        history = journal.history(request_key)
        if history and history[0][1] is not Event.PLANNED:  # pruned
            return {state.value for state in State}
        for _, event, _ in history:
            state = advance(state, event)
            states.add(state.value)
    except (ValueError, IllegalTransition):
        return set()  # these events prove nothing; the check of the events reports them
    return states


def _row_name(row: Mapping[str, Any]) -> str:
    sample = f" sample {row['sample']}" if row["sample"] else ""
    return f"{str(row['prompt_id'])[:60]}{sample} ({row['partition_key']})"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _last_part(name: str) -> str:
    return name.rpartition("/")[2]

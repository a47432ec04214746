"""Counts and credits of a manifest, added up part by part without keeping its rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.digests import Digests, Mask, digests_from_hex, first_of_each
from krea_dagster.engine.states import State

#: Maximum number of images in a sheet of thumbnails.
SHEET_IMAGES: Final = 12

#: Maximum number of missing rows in the metadata.
MISSING_ROWS: Final = 50

#: Maximum number of failures in the metadata.
NEWEST_FAILURES: Final = 20

#: States in which a row has no image, and will not get one by waiting.
FAILED_STATES: Final = (State.FAILED, State.REFUSED, State.EXPIRED, State.UNKNOWN)

#: States in which a row waits for its image.
_UNDER_WAY: Final = (State.PLANNED, State.SUBMITTED, State.COMPLETED)

_FAILED_NAMES: Final = pa.array([state.value for state in FAILED_STATES])
_FAILURE: Final = ("prompt_id", "sample", "status", "error_code", "error_message", "submitted_at")

_MISSING: Final = (
    "partition_key", "prompt_id", "sample", "status", "error_code", "error_message"
)  # fmt: skip


@dataclass(frozen=True)
class StoredFile:
    """The file of a manifest row: its path or URL, and its hash if it is known."""

    location: str
    sha256: str | None = None


class ManifestSummary:
    """Counts and credits of manifest rows.

    ``reserved`` and ``charged`` are credits; rows with the same request share one purchase.
    ``spent`` is the part of ``charged`` that the present run bought, and ``saved`` what its rows
    would have cost in addition, had it bought each of them. ``reasons`` counts the rows without
    an image by status and error code, ``missing`` holds the first of them, ``failures`` the newest
    failures, and ``shown`` the first images. Of the rows without an image, ``outside`` counts those
    that a trial leaves out, by status; they are not among the missing and the failures.
    """

    def __init__(self) -> None:
        self.rows = 0
        self.statuses: Counter[str] = Counter()
        self.reserved = 0.0
        self.charged = 0.0
        self.spent = 0.0
        self.saved = 0.0
        self.bought = 0
        self.reused = 0
        self.outside: Counter[str] = Counter()
        self.shown: list[StoredFile] = []
        self.reasons: Counter[str] = Counter()
        self.missing: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []
        self._latencies: list[npt.NDArray[np.float64]] = []

    @classmethod
    def of(cls, table: pa.Table) -> ManifestSummary:
        """Summarize a whole manifest."""
        summary = cls()
        summary.add(table, first_of_each(_digests(table))[0])
        return summary

    @property
    def missing_count(self) -> int:
        """Number of rows without an image, of the trial if there is one."""
        return self.rows - self.statuses[State.STORED.value] - self.outside.total()

    @property
    def under_way(self) -> int:
        """Number of rows that wait for the server: a later run delivers them."""
        return sum(self.statuses[one.value] - self.outside[one.value] for one in _UNDER_WAY)

    def latencies_s(self) -> npt.NDArray[np.float64]:
        """Return the seconds from submission to completion of what was bought, sorted."""
        return np.sort(np.concatenate([np.empty(0), *self._latencies]))

    def add(self, part: pa.Table, first: Mask, outside: Mask | None = None) -> None:
        """Add rows; ``first`` masks the first row of each request.

        ``outside`` masks those that a trial leaves out.
        """
        self.rows += part.num_rows
        self.statuses.update(_counted(part["status"]))
        once = part.select(["credits_reserved", "credits_charged", "reused"])
        once = once.filter(pa.array(first))
        self.reserved += pc.sum(once["credits_reserved"]).as_py() or 0.0
        self.charged += pc.sum(once["credits_charged"]).as_py() or 0.0
        own = once.filter(pc.invert(once["reused"]))
        spent = pc.sum(own["credits_charged"]).as_py() or 0.0
        self.spent += spent
        self.saved += (pc.sum(part["credits_charged"]).as_py() or 0.0) - spent
        self.reused += pc.sum(part["reused"]).as_py() or 0
        bought = part.filter(pc.and_(pc.invert(part["reused"]), pc.is_valid(part["stored_at"])))
        self.bought += bought.num_rows
        took = pc.subtract(bought["completed_at"], bought["submitted_at"]).drop_null()
        self._latencies.append(took.cast(pa.int64()).to_numpy() / 1e6)
        if len(self.shown) < SHEET_IMAGES:
            stored = part.filter(pc.is_valid(part["image_path"]))
            first_stored = stored.slice(0, SHEET_IMAGES - len(self.shown))
            files = (first_stored[name].to_pylist() for name in ("image_path", "image_sha256"))
            self.shown += map(StoredFile, *files)
        missing = pc.not_equal(part["status"], State.STORED.value)
        if outside is not None:
            left_out = pc.and_(missing, pa.chunked_array([pa.array(outside)]))
            self.outside.update(_counted(part["status"].filter(left_out)))
            missing = pc.and_not(missing, left_out)
        missing = part.filter(missing)
        if missing.num_rows:
            codes = pc.if_else(pc.equal(missing["error_code"], ""), None, missing["error_code"])
            self.reasons.update(
                _counted(
                    pc.binary_join_element_wise(missing["status"], codes.fill_null("no code"), ": ")
                )
            )
            room = MISSING_ROWS - len(self.missing)
            self.missing += missing.select(_MISSING).slice(0, room).to_pylist()
            failed = missing.filter(pc.is_in(missing["status"], value_set=_FAILED_NAMES))
            order = pc.sort_indices(failed, sort_keys=[("submitted_at", "descending")])
            latest = failed.select(_FAILURE).take(order[:NEWEST_FAILURES]).to_pylist()
            self.failures = _newest([*self.failures, *latest])

    def __add__(self, other: ManifestSummary) -> ManifestSummary:
        """Add two partitions; a purchase that they share counts in both."""
        both = ManifestSummary()
        for one in (self, other):
            both.rows += one.rows
            both.statuses += one.statuses
            both.reserved += one.reserved
            both.charged += one.charged
            both.spent += one.spent
            both.saved += one.saved
            both.bought += one.bought
            both.reused += one.reused
            both.outside += one.outside
            both.reasons += one.reasons
            both.shown = [*both.shown, *one.shown][:SHEET_IMAGES]
            both.failures = _newest([*both.failures, *one.failures])
            both.missing = [*both.missing, *one.missing][:MISSING_ROWS]
        return both


def watched(
    parts: Iterable[pa.Table],
    digests: Digests,
    summary: ManifestSummary,
    outside: Mask | None = None,
) -> Iterator[pa.Table]:
    """Yield the parts of a manifest and add them to the summary.

    ``digests`` are its keys, and ``outside`` masks the rows that a trial leaves out.
    """
    first, _ = first_of_each(digests)
    start = 0
    for part in parts:
        here = slice(start, start + part.num_rows)
        summary.add(part, first[here], None if outside is None else outside[here])
        start += part.num_rows
        yield part


def _newest(failures: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sort by submission, the newest first; failures without one come last."""
    began = datetime.min.replace(tzinfo=timezone.utc)
    ordered = sorted(failures, key=lambda row: row["submitted_at"] or began, reverse=True)
    return ordered[:NEWEST_FAILURES]


def _counted(column: pa.ChunkedArray) -> dict[str, int]:
    return {run["values"].as_py(): run["counts"].as_py() for run in pc.value_counts(column)}


def _digests(table: pa.Table) -> Digests:
    return digests_from_hex(table["request_key"].cast(pa.string()).combine_chunks())

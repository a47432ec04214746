"""A review's view of the verdicts: the current one of each image, and those at an earlier time.

Verdicts are read from the journal incrementally. A list must not change while a reviewer works
through it, so the verdicts up to any number can be computed.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from krea_dagster.curation.review.index import ReviewIndex
from krea_dagster.curation.review.selection import empty_code
from krea_dagster.engine.journal.verdict_log import NONE, VERDICTS, Verdict, VerdictLog

Codes = npt.NDArray[np.int8]

_CODE: Final = {verdict: code for code, verdict in enumerate(VERDICTS)}


class _VerdictChange(NamedTuple):
    """One verdict: its number, its image, and the code before and after it."""

    number: int
    sha256: str
    before: int
    after: int


class BatchVerdict(NamedTuple):
    """A verdict of a batch, what was said of the image before, and whether something was since."""

    given: Verdict
    before: Verdict | None
    since: bool = False


class VerdictView:
    """The verdicts that were read from a journal. Thread-safe."""

    def __init__(self, log: VerdictLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._present: dict[str, Verdict] = {}
        #: Each row of the journal, and what it says of its image (``Verdict.said_after``).
        self._every: list[Verdict] = []
        self._said: list[Verdict] = []
        self._changes: list[_VerdictChange] = []
        self._by_image: tuple[ReviewIndex, Codes, int] | None = None
        self.number = 0
        self.catch_up()

    def catch_up(self) -> int:
        """Read new verdicts; return the last number. Raises JournalError."""
        with self._lock:
            for one in self._log.since(self.number):
                before = self._present.get(one.image_sha256)
                said = one.said_after(before)
                if said is not one:  # the page orders what it hears by number
                    said = replace(said, number=one.number)
                code = empty_code() if before is None else _CODE[before.verdict]
                change = _VerdictChange(one.number, one.image_sha256, code, _CODE[said.verdict])
                self._changes.append(change)
                self._present[one.image_sha256] = said
                self._every.append(one)
                self._said.append(said)
                self.number = one.number
            return self.number

    def since(self, number: int) -> list[Verdict]:
        """Return what the verdicts after a number say."""
        with self._lock:
            at = len(self._every)
            while at and self._every[at - 1].number > number:
                at -= 1
            return self._said[at:]

    def last_of(self, sha256: str | None) -> Verdict | None:
        """Return what was said last of an image: also a verdict of ``none``, with tags."""
        return None if sha256 is None else self._present.get(sha256)

    def all_at(self, number: int) -> Mapping[str, Verdict]:
        """Return what was said last of each image, up to a number."""
        with self._lock:
            if number >= self.number:
                return dict(self._present)
            return {one.image_sha256: one for one in self._said if one.number <= number}

    def batch(self, batch_id: str) -> list[BatchVerdict]:
        """Return the verdicts whose id begins with that of a batch."""
        before: dict[str, Verdict] = {}
        found: dict[str, BatchVerdict] = {}
        with self._lock:
            for one, said in zip(self._every, self._said, strict=True):
                sha256 = one.image_sha256
                if one.verdict_id.startswith(batch_id):
                    found[sha256] = BatchVerdict(one, before.get(sha256))
                elif sha256 in found:
                    found[sha256] = found[sha256]._replace(since=True)
                before[sha256] = said
        return list(found.values())

    def codes(self, index: ReviewIndex, at_number: int | None = None) -> Codes:
        """Return each row's verdict as its index in ``VERDICTS``: the current, or at a number."""
        with self._lock:
            by_image = self._up_to_date(index)
            if at_number is not None and at_number < self.number:
                by_image = by_image.copy()
                for change in reversed(self._changes):
                    if change.number <= at_number:
                        break
                    place = index.codes_by_sha.get(change.sha256)
                    if place is not None:
                        by_image[place] = change.before
            # A row without an image has the code -1: the last entry, which belongs to no image.
            return np.asarray(by_image[index.sha_codes], np.int8)

    def _up_to_date(self, index: ReviewIndex) -> Codes:
        """Return each image's current verdict; for the index of the last call only the changes."""
        done = 0
        by_image = np.full(len(index.codes_by_sha) + 1, empty_code(), np.int8)
        if self._by_image is not None and self._by_image[0] is index:
            _, by_image, done = self._by_image
        for change in self._changes[done:]:
            place = index.codes_by_sha.get(change.sha256)
            if place is not None:
                by_image[place] = change.after
        self._by_image = (index, by_image, len(self._changes))
        return by_image

    def progress(self, index: ReviewIndex) -> list[dict[str, Any]]:
        """Return the number of images by partition and verdict."""
        codes, of = self.codes(index), index.partition_codes
        number = len(index.partitions)

        def count(chosen: npt.NDArray[np.bool_]) -> list[int]:
            return [int(one) for one in np.bincount(of[chosen & index.to_review], minlength=number)]

        all_ = count(index.to_review)
        by = {one: count(codes == _CODE[one]) for one in VERDICTS if one != NONE}
        return sorted(
            (
                {
                    "partition_key": index.partitions[at],
                    "images": all_[at],
                    **{one: counts[at] for one, counts in by.items()},
                }
                for at in range(number)
            ),
            key=lambda one: str(one["partition_key"]),
        )


def verdict_json(one: Verdict | None) -> dict[str, Any] | None:
    """Return a verdict as JSON for the page."""
    if one is None:
        return None
    return {
        "verdict_id": one.verdict_id,
        "image_sha256": one.image_sha256,
        "verdict": one.verdict,
        "reason": one.reason,
        "tags": list(one.tags or ()),
        "note": one.note,
        "annotates": one.annotates,
        "reviewer": one.reviewer,
        "at": None if one.at is None else one.at.isoformat(),
        "number": one.number,
    }

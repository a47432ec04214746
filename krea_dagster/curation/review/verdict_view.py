"""The verdicts as a review needs them: the present one of each picture, and how it stood before.

They are read from the journal bit by bit, each once. A list that a reviewer works through must
not move under the hand, so it can be asked how the verdicts stood at any number.
"""

from __future__ import annotations

import threading
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from krea_dagster.curation.review.index import ReviewIndex
from krea_dagster.curation.review.selection import empty_code
from krea_dagster.engine.journal.verdict_log import NONE, VERDICTS, Verdict, VerdictLog

Codes = npt.NDArray[np.int8]

_CODE: Final = {verdict: code for code, verdict in enumerate(VERDICTS)}


class _Step(NamedTuple):
    """One verdict: its number, its picture, and the code before and after it."""

    number: int
    sha256: str
    before: int
    after: int


class VerdictView:
    """The verdicts of a journal, as far as they were read. May be used from several threads."""

    def __init__(self, log: VerdictLog) -> None:
        self._log = log
        self._lock = threading.Lock()
        self._present: dict[str, Verdict] = {}
        self._every: list[Verdict] = []
        self._steps: list[_Step] = []
        self._by_picture: tuple[ReviewIndex, Codes, int] | None = None
        self.number = 0
        self.catch_up()

    def catch_up(self) -> int:
        """Read what is new; returns the last number. Raises JournalError."""
        with self._lock:
            for one in self._log.since(self.number):
                before = self._present.get(one.image_sha256)
                code = empty_code() if before is None else _CODE[before.verdict]
                self._steps.append(_Step(one.number, one.image_sha256, code, _CODE[one.verdict]))
                self._present[one.image_sha256] = one
                self._every.append(one)
                self.number = one.number
            return self.number

    def every(self) -> list[Verdict]:
        """Every verdict that was read, in order."""
        with self._lock:
            return list(self._every)

    def since(self, number: int) -> list[Verdict]:
        """The verdicts after a number that were read."""
        with self._lock:
            at = len(self._every)
            while at and self._every[at - 1].number > number:
                at -= 1
            return self._every[at:]

    def of(self, sha256: str | None) -> Verdict | None:
        """The verdict that counts for a picture."""
        found = None if sha256 is None else self._present.get(sha256)
        return None if found is None or found.verdict == NONE else found

    def codes(self, index: ReviewIndex, at_number: int | None = None) -> Codes:
        """Each row's verdict, as its place in ``VERDICTS``: now, or as it was at a number."""
        with self._lock:
            by_picture = self._up_to_date(index)
            if at_number is not None and at_number < self.number:
                by_picture = by_picture.copy()
                for step in reversed(self._steps):
                    if step.number <= at_number:
                        break
                    place = index.codes_by_sha.get(step.sha256)
                    if place is not None:
                        by_picture[place] = step.before
            # A row without a picture has the code -1: the last place, which is no picture's.
            return np.asarray(by_picture[index.sha_codes], np.int8)

    def _up_to_date(self, index: ReviewIndex) -> Codes:
        """Each picture's verdict now. Of an index that was asked about before, what is new."""
        done = 0
        by_picture = np.full(len(index.codes_by_sha) + 1, empty_code(), np.int8)
        if self._by_picture is not None and self._by_picture[0] is index:
            _, by_picture, done = self._by_picture
        for step in self._steps[done:]:
            place = index.codes_by_sha.get(step.sha256)
            if place is not None:
                by_picture[place] = step.after
        self._by_picture = (index, by_picture, len(self._steps))
        return by_picture

    def progress(self, index: ReviewIndex) -> list[dict[str, Any]]:
        """By partition: how many pictures there are, and how many have which verdict."""
        codes, of = self.codes(index), index.partition_codes
        many = len(index.partitions)

        def count(chosen: npt.NDArray[np.bool_]) -> list[int]:
            return [int(one) for one in np.bincount(of[chosen & index.to_review], minlength=many)]

        all_ = count(index.to_review)
        by = {one: count(codes == _CODE[one]) for one in VERDICTS if one != NONE}
        return sorted(
            (
                {
                    "partition_key": index.partitions[at],
                    "pictures": all_[at],
                    **{one: counts[at] for one, counts in by.items()},
                }
                for at in range(many)
            ),
            key=lambda one: str(one["partition_key"]),
        )


def shown(one: Verdict | None) -> dict[str, Any] | None:
    """A verdict as the page is told it."""
    if one is None:
        return None
    return {
        "verdict_id": one.verdict_id,
        "image_sha256": one.image_sha256,
        "verdict": one.verdict,
        "reason": one.reason,
        "reviewer": one.reviewer,
        "at": None if one.at is None else one.at.isoformat(),
        "number": one.number,
    }

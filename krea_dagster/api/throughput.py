"""Judges a line by how downloads come over it, and how many may come at once. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

#: Fewer bytes a second, over a whole span, and a download ends: it would never be done.
MIN_BYTES_PER_S: Final = 1024


@dataclass(frozen=True)
class RateWindow:
    """What came since a moment, by a clock that never goes back."""

    since_s: float
    came_bytes: int = 0

    def add(self, came_bytes: int) -> RateWindow:
        """The span with further bytes."""
        return replace(self, came_bytes=self.came_bytes + came_bytes)

    def pause(self, lasted_s: float) -> RateWindow:
        """The span without a time in which nothing was read."""
        return replace(self, since_s=self.since_s + lasted_s)

    def is_over(self, now_s: float, lasts_s: float) -> bool:
        """Whether it has lasted long enough to be judged."""
        return now_s - self.since_s >= lasts_s

    def is_crawling(self, now_s: float) -> bool:
        """Whether so little came that the download ends."""
        return self.came_bytes < MIN_BYTES_PER_S * (now_s - self.since_s)


@dataclass(frozen=True)
class DownloadLimit:
    """How many downloads run at once.

    A download that went silent or crawled halves the number, and each that ended well adds one.
    What began before the number was last halved was slow under the old number, and says nothing of
    the new one: sixteen that stop together halve it once.
    """

    most: int
    number: int
    halved_at_s: float = float("-inf")

    def slow(self, began_at_s: float, now_s: float) -> DownloadLimit:
        """After a slow download that began at a time."""
        if began_at_s <= self.halved_at_s:
            return self
        return replace(self, number=max(1, self.number // 2), halved_at_s=now_s)

    def well(self) -> DownloadLimit:
        """After a download that ended well."""
        return replace(self, number=min(self.most, self.number + 1))

"""Judge the speed of a download, and adapt the number of simultaneous downloads. Pure."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Final

from krea_dagster.models import evolve

#: A download that brings fewer bytes a second, over a whole window, ends: it would never finish.
MIN_BYTES_PER_S: Final = 1024


@dataclass(frozen=True)
class RateWindow:
    """The bytes received since a time, by a clock that never goes back."""

    since_s: float
    received_bytes: int = 0

    def add(self, size_bytes: int) -> RateWindow:
        """Return the window with more bytes."""
        return evolve(self, received_bytes=self.received_bytes + size_bytes)

    def pause(self, lasted_s: float) -> RateWindow:
        """Return the window without a time in which nothing was read."""
        return evolve(self, since_s=self.since_s + lasted_s)

    def is_over(self, now_s: float, window_s: float) -> bool:
        """Return whether the window is long enough to be judged."""
        return now_s - self.since_s >= window_s

    def is_too_slow(self, now_s: float) -> bool:
        """Return whether fewer than MIN_BYTES_PER_S have come."""
        return self.received_bytes < MIN_BYTES_PER_S * (now_s - self.since_s)


@dataclass(frozen=True)
class DownloadLimit:
    """The number of simultaneous downloads.

    A download that went silent or was too slow halves the number, and each success adds one. A
    download that began before the last halving was slow under the old number and does not count:
    sixteen that stop together halve the number once.
    """

    most: int
    number: int
    halved_at_s: float = float("-inf")

    def slow(self, began_at_s: float, now_s: float) -> DownloadLimit:
        """Return the limit after a slow download that began at a time."""
        if began_at_s <= self.halved_at_s:
            return self
        return replace(self, number=max(1, self.number // 2), halved_at_s=now_s)

    def success(self) -> DownloadLimit:
        """Return the limit after a successful download."""
        return replace(self, number=min(self.most, self.number + 1))

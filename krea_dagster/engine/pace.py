"""How many tasks in flight, and when to ask about one. Pure, given a clock's seconds.

The account's limits are nowhere published and no header names them, so they are met by
feedback: the window grows while the server takes what it is given and is cut when it turns
something away.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from statistics import median
from types import MappingProxyType
from typing import Final

#: Seconds from submission to the finished image before anything has been learned: public
#: measurements of the model itself.
EXPECTED_LATENCY_S: Final[Mapping[str, float]] = MappingProxyType({"1K": 2.0, "2K": 7.0})


@dataclass(frozen=True)
class Window:
    """How many tasks may be in flight.

    Starts small, doubles with every full window taken, until the server first turns one away.
    A cut takes it to 70 %, and one burst of refusals counts as one. After a cut it grows as
    fast again up to 90 % of where it was cut, and from there by one per full window: refusals
    that come by chance, and not because of the load, do not wear it down.
    """

    most: int
    limit: float = 8.0
    cut_at_s: float | None = None
    ceiling: float = 0.0
    pause_until_s: float = 0.0
    calm_s: float = 2.0

    @classmethod
    def opening(cls, most: int) -> Window:
        """The window of a run that knows nothing yet."""
        return cls(most=most, limit=float(min(8, most)))

    @property
    def size(self) -> int:
        """Tasks that may be in flight now."""
        return max(1, min(self.most, int(self.limit)))

    def taken(self) -> Window:
        """After a submission that the server took."""
        quickly = self.cut_at_s is None or self.limit < 0.9 * self.ceiling
        growth = 1.0 if quickly else 1.0 / self.limit
        return replace(self, limit=min(float(self.most), self.limit + growth))

    def turned_away(self, now_s: float, retry_after_s: float | None) -> Window:
        """After a 429, with what the server asked for."""
        pause_until_s = max(self.pause_until_s, now_s + (retry_after_s or 0.0))
        if self.cut_at_s is not None and now_s - self.cut_at_s < self.calm_s:
            return replace(self, pause_until_s=pause_until_s)
        limit = max(1.0, self.limit * 0.7)
        return replace(
            self, limit=limit, ceiling=self.limit, cut_at_s=now_s, pause_until_s=pause_until_s
        )


@dataclass(frozen=True)
class Latencies:
    """The seconds that finished images took, by quality, as far as they were bracketed.

    Learned from the middle between the last "not yet" and the first "done": learning from
    when the end was *noticed* would let every late look make the next one later.
    """

    recent: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    keep: int = 64

    def finished(self, quality: str, last_not_yet_s: float, first_done_s: float) -> Latencies:
        """With one more, in seconds since its submission."""
        middle = (last_not_yet_s + first_done_s) / 2
        kept = (*self.recent.get(quality, ()), middle)[-self.keep :]
        return replace(self, recent={**self.recent, quality: kept})

    def expected_s(self, quality: str) -> float:
        """The median of the recent ones, or what is expected before there are any."""
        recent = self.recent.get(quality)
        return median(recent) if recent else EXPECTED_LATENCY_S.get(quality, 2.0)


def next_look_s(latencies: Latencies, quality: str, age_s: float, asks: int) -> float:
    """Seconds until a task should be asked about, given its age and how often it was asked.

    First when half of its kind are done, then after a quarter of the expected time, and ever
    more seldom as it grows older, at least 0.2 s and at most 15 s apart.
    """
    expected_s = latencies.expected_s(quality)
    if asks == 0:
        return max(0.0, expected_s - age_s)
    return min(15.0, max(0.2, expected_s / 4, (age_s - expected_s) / 4))


def is_overdue(latencies: Latencies, quality: str, age_s: float) -> bool:
    """Whether a task is so late that the server has hardly still got it in work.

    It is asked about on and on, but no longer kept a place in the window: a few tasks that never
    end would otherwise fill it.
    """
    return age_s > 5.0 + 4.0 * latencies.expected_s(quality)

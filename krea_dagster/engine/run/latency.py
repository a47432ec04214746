"""How long images take: a distribution per quality, learned from reads that bracket the end.

Pure. The API does not tell when a task ended: only that it was unfinished at one read and finished
at the next. Learning from the time of the last read would let every late read make the next one
later, so each image only moves the weight of the distribution that is in its bracket.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Final

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]

#: Seconds from submission to the finished image before anything has been learned: public
#: measurements of the model itself.
EXPECTED_LATENCY_S: Final[Mapping[str, float]] = MappingProxyType({"1K": 2.0, "2K": 7.0})

# Bins of 5 %, from 20 ms to 15 minutes.
_BINS: Final = 220
_EDGES_S: Final[Floats] = np.concatenate(([0.0], 0.02 * 1.05 ** np.arange(1.0, _BINS + 1)))
_EDGES: Final[list[float]] = _EDGES_S.tolist()
_WIDTHS_S: Final = np.diff(_EDGES_S)
_MIDDLES_S: Final = np.maximum(_EDGES_S[:-1], 0.01) + _WIDTHS_S / 2

#: Images that the distribution remembers, so that it follows a service that changes.
_MEMORY: Final = 200.0
#: The weight of the expectation, in images.
_PRIOR: Final = 1.5
#: The spread of the expectation, as a share.
_SPREAD: Final = 0.35
#: Once this share of a kind has ended, the others are stragglers: the distribution tells little of
#: them. They are expected within this share of their age, and within this many seconds.
_NEARLY_ALL: Final = 0.9
_STRAGGLER_SHARE: Final = 0.15
_STRAGGLER_MOST_S: Final = 5.0


@dataclass(frozen=True)
class Curve:
    """The distribution of one quality's latencies, learned from ``seen`` images."""

    mass: Floats = field(repr=False)
    seen: float = 0.0
    total: Floats = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        total = np.zeros(_BINS + 1)
        np.cumsum(self.mass, out=total[1:])
        total /= total[-1]
        object.__setattr__(self, "total", total)

    @classmethod
    def expecting(cls, latency_s: float) -> Curve:
        """Return the curve of an expected latency, before any image was seen."""
        distance = np.log(_MIDDLES_S / latency_s) / _SPREAD
        mass = np.exp(-distance * distance / 2) + 1e-4
        return cls(mass / mass.sum())

    @classmethod
    def known(cls, latency_s: float) -> Curve:
        """Return the curve of a known latency."""
        return replace(cls.expecting(latency_s), seen=_MEMORY / 4)

    def finished(self, not_yet_s: float, done_s: float) -> Curve:
        """Return the curve with one more image: unfinished at one age, finished at the other."""
        done_s = max(done_s, not_yet_s + 1e-3)
        first = min(bisect_right(_EDGES, not_yet_s) - 1, _BINS - 1)
        last = min(bisect_left(_EDGES, done_s), _BINS)
        low = np.maximum(_EDGES_S[first:last], not_yet_s)
        high = np.minimum(_EDGES_S[first + 1 : last + 1], done_s)
        within = np.maximum(high - low, 0.0) / _WIDTHS_S[first:last]
        within *= self.mass[first:last] + 1e-7
        weight = within.sum()
        if weight <= 0:  # older than the oldest bin
            return self
        seen = min(self.seen + 1.0, _MEMORY)
        share = 1.0 / (seen + _PRIOR)
        mass = self.mass * (1.0 - share)
        mass[first:last] += within * (share / weight)
        return Curve(mass, seen)

    def done_since(self, not_yet_s: Floats | float, age_s: Floats | float) -> Floats:
        """Return the chance that a task has ended, by its age when unfinished and its age now."""
        before = np.interp(not_yet_s, _EDGES_S, self.total)
        left = 1.0 - before
        now = np.interp(age_s, _EDGES_S, self.total)
        chance = np.clip((now - before) / np.maximum(left, 1e-9), 0.0, 1.0)
        scale_s = np.clip(_STRAGGLER_SHARE * not_yet_s, 0.01, _STRAGGLER_MOST_S)
        straggler = 1.0 - np.exp(-np.maximum(age_s - not_yet_s, 0.0) / scale_s)
        return np.where(before > _NEARLY_ALL, np.maximum(chance, straggler), chance)

    @property
    def median_s(self) -> float:
        """The median latency."""
        return float(np.interp(0.5, self.total, _EDGES_S))


@dataclass(frozen=True)
class Latencies:
    """The curves of latencies, by quality."""

    curves: Mapping[str, Curve] = field(default_factory=dict)

    @classmethod
    def known(cls, by_quality_s: Mapping[str, float]) -> Latencies:
        """Return the curves of known latencies, in seconds."""
        return cls({quality: Curve.known(s) for quality, s in by_quality_s.items()})

    @classmethod
    def expecting(cls, latency_s: float | None) -> Latencies:
        """Return the curves of one expected latency; None uses the published ones."""
        if latency_s is None:
            return cls()
        return cls({quality: Curve.expecting(latency_s) for quality in EXPECTED_LATENCY_S})

    def of(self, quality: str) -> Curve:
        """Return the curve of a quality, the published one before any image was seen."""
        known = self.curves.get(quality)
        return _expected(quality) if known is None else known

    def finished(self, quality: str, not_yet_s: float, done_s: float) -> Latencies:
        """Return the curves with one more image, by its ages when unfinished and finished."""
        after = self.of(quality).finished(not_yet_s, done_s)
        return Latencies({**self.curves, quality: after})


def is_overdue(latencies: Latencies, quality: str, age_s: float) -> bool:
    """Whether a task is so late that the server is probably not working on it.

    It is still polled, but has no place in the window any more: a few tasks that never end would
    otherwise fill it.
    """
    return age_s > 5.0 + 4.0 * latencies.of(quality).median_s


_EXPECTED: dict[str, Curve] = {}


def _expected(quality: str) -> Curve:
    if quality not in _EXPECTED:
        _EXPECTED[quality] = Curve.expecting(EXPECTED_LATENCY_S.get(quality, 2.0))
    return _EXPECTED[quality]

"""A clock that the test moves."""

from __future__ import annotations


class ManualClock:
    """Returns ``now_s`` when called."""

    def __init__(self, now_s: float = 0.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def move(self, seconds: float) -> None:
        """Move the clock by a number of seconds."""
        self.now_s += seconds

"""Time as the engine sees it: passed in, so that tests decide how late it is."""

from __future__ import annotations

import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol

import anyio


class Clock(Protocol):
    """UTC for the journal, seconds that never go back for pacing, and a pause."""

    def now(self) -> datetime:
        """Return the time in UTC."""

    def monotonic(self) -> float:
        """Return seconds from some fixed point."""

    async def sleep(self, seconds: float) -> None:
        """Pause."""


@dataclass(frozen=True)
class SystemClock:
    """This machine's clocks."""

    def now(self) -> datetime:
        """Return the time in UTC."""
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        """Return seconds from some fixed point."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Pause."""
        await anyio.sleep(seconds)

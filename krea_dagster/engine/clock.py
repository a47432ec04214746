"""Time as the engine sees it: passed in, so that tests control it."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Protocol


class Clock(Protocol):
    """UTC for the journal, a monotonic clock for pacing, and a pause."""

    def now(self) -> datetime:
        """Return the time in UTC."""

    def monotonic(self) -> float:
        """Return seconds from some fixed point."""

    async def sleep(self, seconds: float) -> None:
        """Pause."""


@dataclass(frozen=True)
class SystemClock:
    """The clocks of this machine."""

    def now(self) -> datetime:
        """Return the time in UTC."""
        return datetime.now(timezone.utc)

    def monotonic(self) -> float:
        """Return seconds from some fixed point."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Pause."""
        await asyncio.sleep(seconds)


async def wait_for_event(event: asyncio.Event, timeout_s: float | None) -> None:
    """Return once the event is set. A timeout sets it.

    A cancel scope costs ten times as much, and a run waits many times for every image.
    """
    if event.is_set():
        return
    if timeout_s is None:
        await event.wait()
        return
    timer = asyncio.get_running_loop().call_later(timeout_s, event.set)
    try:
        await event.wait()
    finally:
        timer.cancel()

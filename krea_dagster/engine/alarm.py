"""Waits for an event or for a time, whichever comes first.

A cancel scope does the same at ten times the cost, and a run waits many times for every image.
"""

from __future__ import annotations

import asyncio


async def wait(event: asyncio.Event, at_most_s: float | None) -> None:
    """Return once the event is set, or after so many seconds; None for as long as it takes."""
    if event.is_set():
        return
    if at_most_s is None:
        await event.wait()
        return
    alarm = asyncio.get_running_loop().call_later(at_most_s, event.set)
    try:
        await event.wait()
    finally:
        alarm.cancel()

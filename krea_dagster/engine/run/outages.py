"""Waits for what is away: the API, the journal's database, the storage root.

While one of them is away nothing new is started, and one call probes it at growing pauses. What
failed meanwhile is repeated once it is back, and counts for nothing. Where it stays away for
longer than the patience, the run ends: nothing is lost by running it later.
"""

from __future__ import annotations

import asyncio
import enum
import logging
from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any, Final, TypeVar

from krea_dagster.engine.clock import Clock
from krea_dagster.engine.threads import InThread
from krea_dagster.errors import (
    JournalUnavailable,
    KreaError,
    RunStopped,
    StorageUnavailable,
    TryLater,
)

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: The code of a run that ended because the API stayed away.
API_AWAY: Final = "api_away"

#: Seconds between two probes: doubling from the first to the last.
_FIRST_S: Final = 0.5
_MOST_S: Final = 15.0


class Part(enum.Enum):
    """What can be away."""

    API = "EvoLink's API"
    JOURNAL = "the journal"
    STORAGE = "the storage root"


#: Returns what went wrong where a part is away, and None where it is there.
Probe = Callable[[], Awaitable[KreaError | None]]


class Outages:
    """What a run waits for.

    ``probes`` is to be given one for each part that is waited for. ``changed`` is called whenever
    the answer of ``closed`` may be another one.
    """

    def __init__(self, clock: Clock, *, patience_s: float, wait_scale: float = 1.0) -> None:
        self._clock = clock
        self._patience_s = patience_s
        self._wait_scale = wait_scale
        self._away: dict[Part, asyncio.Event] = {}
        self.probes: dict[Part, Probe] = {}
        self.changed: Callable[[], None] = lambda: None
        self._given_up = False
        #: Seconds of this run in which something was away.
        self.away_s = 0.0
        #: Why the run is over, where the API stayed away for too long.
        self.over: RunStopped | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing new is to be started now."""
        return bool(self._away) or self.over is not None

    def give_up(self) -> None:
        """Wait for nothing any more: the run was stopped."""
        self._given_up = True

    def patient(self, in_thread: InThread) -> InThread:
        """Return the same way of calling, which repeats what fails because a part is away."""

        async def call_in_thread(call: Callable[..., _T], /, *arguments: Any) -> _T:
            return await self.repeated(lambda: in_thread(call, *arguments))

        return call_in_thread

    async def repeated(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make a call, and make it again where the journal or the storage root was away.

        Raises JournalUnavailable or StorageUnavailable where that outlasts the patience.
        """
        since_s = self._clock.monotonic()
        for tries in count(1):
            try:
                return await call()
            except (JournalUnavailable, StorageUnavailable) as error:
                part = Part.JOURNAL if isinstance(error, JournalUnavailable) else Part.STORAGE
                was_away = await self.until_back(part, error)
                if self._given_up or self._clock.monotonic() - since_s > self._patience_s:
                    raise
                if not was_away:
                    await self._clock.sleep(self._pause_s(tries))
        raise AssertionError

    async def until_back(self, part: Part, error: KreaError) -> bool:
        """Wait until a part is there, or the patience is over; returns whether it was away.

        ``error`` is what gave rise to the question.
        """
        if self.over is not None and part is Part.API:
            return True
        ended = self._away.get(part)
        if ended is not None:
            await ended.wait()
            return True
        ended = self._away[part] = asyncio.Event()
        since_s = self._clock.monotonic()
        try:
            return await self._probe(part, error)
        finally:
            del self._away[part]
            self.away_s += self._clock.monotonic() - since_s
            ended.set()
            self.changed()

    async def _probe(self, part: Part, error: KreaError) -> bool:
        since_s = self._clock.monotonic()
        for tries in count(1):
            said = await self.probes[part]()
            away_s = self._clock.monotonic() - since_s
            if said is None:
                if tries > 1:
                    _log.warning("%s is back after %.0f s.", part.value, away_s)
                return tries > 1
            if tries == 1 and self._patience_s > 0:
                _log.warning(
                    "%s is away, and is waited for, for at most %g s; nothing new is bought "
                    "meanwhile: %s",
                    part.value,
                    self._patience_s,
                    str(error).partition(". ")[0],
                )
            # A certificate that is refused is so until a person has looked at it.
            passes = getattr(said, "cause", None) != "certificate"
            if self._given_up:
                return True
            if away_s >= self._patience_s or not passes:
                if part is Part.API:
                    stop = TryLater if passes else RunStopped
                    self.over = stop(
                        API_AWAY, f"{part.value} was away for {away_s:.0f} s, the last try: {said}"
                    )
                return True
            await self._clock.sleep(min(self._pause_s(tries), self._patience_s - away_s + 0.01))
        raise AssertionError

    def _pause_s(self, tries: int) -> float:
        return min(_MOST_S, _FIRST_S * 2.0 ** min(tries - 1, 10)) * self._wait_scale

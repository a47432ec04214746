"""Waits for dependencies that are away: the API, the journal's database, the storage root.

While one of them is away nothing new is started, and one call probes it at growing pauses. What
failed meanwhile is repeated once it is back, and is not counted as a failure. If it stays away for
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
from krea_dagster.engine.policy import API_AWAY, Policy, backoff_s
from krea_dagster.engine.threads import InThread
from krea_dagster.errors import (
    JournalUnavailable,
    KreaError,
    RunStopped,
    StorageUnavailable,
    TryLater,
)
from krea_dagster.models import evolve

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

#: The longest pause between two probes, in seconds.
_MAX_PAUSE_S: Final = 15.0


class Dependency(enum.Enum):
    """A part that can be away."""

    API = "EvoLink's API"
    JOURNAL = "the journal"
    STORAGE = "the storage root"


#: Returns the error of a dependency that is away, None if it answers.
Probe = Callable[[], Awaitable[KreaError | None]]


class Outages:
    """The dependencies that are away, and the waits for them.

    ``probes`` needs one for each dependency. ``changed`` is called when ``closed`` may have
    changed.
    """

    def __init__(self, clock: Clock, policy: Policy) -> None:
        self._clock = clock
        self._policy = evolve(policy, backoff_max_s=_MAX_PAUSE_S)
        self._patience_s = policy.outage_patience_s
        self._away: dict[Dependency, asyncio.Event] = {}
        self.probes: dict[Dependency, Probe] = {}
        self.changed: Callable[[], None] = lambda: None
        self._given_up = False
        #: Seconds of this run in which something was away.
        self.away_s = 0.0
        #: Why the run is over, if the API stayed away for too long.
        self.over: RunStopped | None = None

    @property
    def closed(self) -> bool:
        """Whether nothing new is to be started now."""
        return bool(self._away) or self.over is not None

    def give_up(self) -> None:
        """Wait no more: the run was stopped."""
        self._given_up = True

    def patient(self, in_thread: InThread) -> InThread:
        """Return ``in_thread`` with calls repeated that fail because a dependency is away."""

        async def call_in_thread(call: Callable[..., _T], /, *arguments: Any) -> _T:
            return await self.repeated(lambda: in_thread(call, *arguments))

        return call_in_thread

    async def repeated(self, call: Callable[[], Awaitable[_T]]) -> _T:
        """Make a call, and repeat it while the journal or the storage root is away.

        Raises JournalUnavailable or StorageUnavailable if that lasts for longer than the patience.
        """
        since_s = self._clock.monotonic()
        for tries in count(1):
            try:
                return await call()
            except (JournalUnavailable, StorageUnavailable) as error:
                journal = isinstance(error, JournalUnavailable)
                dependency = Dependency.JOURNAL if journal else Dependency.STORAGE
                was_away = await self.until_back(dependency, error)
                if self._given_up or self._clock.monotonic() - since_s > self._patience_s:
                    raise
                if not was_away:
                    await self._clock.sleep(self._pause_s(tries))
        raise AssertionError

    async def until_back(self, dependency: Dependency, error: KreaError) -> bool:
        """Wait until a dependency answers, or the patience is over; returns whether it was away.

        ``error`` is what raised the suspicion.
        """
        if self.over is not None and dependency is Dependency.API:
            return True
        ended = self._away.get(dependency)
        if ended is not None:
            await ended.wait()
            return True
        ended = self._away[dependency] = asyncio.Event()
        since_s = self._clock.monotonic()
        try:
            return await self._probe(dependency, error)
        finally:
            del self._away[dependency]
            self.away_s += self._clock.monotonic() - since_s
            ended.set()
            self.changed()

    async def _probe(self, dependency: Dependency, error: KreaError) -> bool:
        since_s, name = self._clock.monotonic(), dependency.value
        for tries in count(1):
            found = await self.probes[dependency]()
            away_s = self._clock.monotonic() - since_s
            if found is None:
                if tries > 1:
                    _log.warning("%s is back after %.0f s.", name, away_s)
                return tries > 1
            if tries == 1 and self._patience_s > 0:
                _log.warning(
                    "%s is away. The run waits for at most %g s and buys nothing new meanwhile: %s",
                    name,
                    self._patience_s,
                    str(error).partition(". ")[0],
                )
            # A certificate that is refused needs a person.
            passes = getattr(found, "cause", None) != "certificate"
            if self._given_up:
                return True
            if away_s >= self._patience_s or not passes:
                if dependency is Dependency.API:
                    stop = TryLater if passes else RunStopped
                    message = f"{name} was away for {away_s:.0f} s, the last try: {found}"
                    self.over = stop(API_AWAY, message)
                return True
            await self._clock.sleep(min(self._pause_s(tries), self._patience_s - away_s + 0.01))
        raise AssertionError

    def _pause_s(self, tries: int) -> float:
        return backoff_s(tries, 1.0, self._policy)

"""A request in the hands of a task, and the desk where its events are written."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from krea_dagster.engine.clock import Clock
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.group_commit import GroupCommit
from krea_dagster.engine.policy import Policy, Trail, backoff_s
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.poll_schedule import Awaited
from krea_dagster.engine.states import Event


@dataclass
class Carrier:
    """A request in the hands of a task.

    ``callback_url`` is where its row wants its end told. ``holds_place``: it counts in the window.
    ``may_submit``: it may send one POST; the pace is kept by giving that out. ``since_s`` is when
    its task was submitted, by the run's clock, and ``not_yet_s`` its age when it had last not
    ended.
    """

    record: Record
    trail: Trail
    partition_key: str
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None
    holds_place: bool = True
    may_submit: bool = False
    since_s: float = 0.0
    not_yet_s: float = 0.0

    @property
    def awaited(self) -> Awaited:
        """Its task, as what is waited for."""
        return Awaited(self.record.request.quality, self.since_s, self.not_yet_s)


class Desk:
    """What every step has at hand: the journal's writer, the policy, the clocks, and chance.

    ``on_release`` is called where a purchase commits less than before, so that caps have room.
    """

    def __init__(
        self,
        writer: GroupCommit,
        *,
        run_id: str,
        policy: Policy,
        clock: Clock,
        randomness: random.Random,
    ) -> None:
        self.run_id = run_id
        self.policy = policy
        self.clock = clock
        self._writer = writer
        self._random = randomness
        self.on_release: Callable[[], None] = lambda: None

    async def record(
        self,
        carrier: Carrier,
        event: Event,
        values: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
    ) -> None:
        """Write an event of the carrier's request, durably. Raises JournalError."""
        before = carrier.record
        carrier.record = await self._writer.append(
            Change(before.request_key, event, self.clock.now(), values or {}, data), known=before
        )
        if carrier.record.committed_units < before.committed_units:
            self.on_release()

    def age_s(self, record: Record) -> float:
        """Seconds since a request was submitted."""
        since = record.submitted_at or self.clock.now()
        return max(0.0, (self.clock.now() - since) / timedelta(seconds=1))

    def fraction(self) -> float:
        """Return a random number from 0 to 1."""
        return self._random.random()

    def backoff_s(self, tries: int, *, at_least_s: float | None = None) -> float:
        """Return the seconds to pause after so many failures in a row."""
        return backoff_s(tries, self.fraction(), self.policy, at_least_s=at_least_s)


def trouble(code: str, message: str) -> dict[str, Any]:
    """Return what an event sets where something went wrong."""
    return {"error_code": code, "error_message": message}

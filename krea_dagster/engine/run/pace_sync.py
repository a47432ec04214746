"""Exchanges the pace with the other runs of the account, through the journal."""

from __future__ import annotations

import logging

from krea_dagster.engine.pace_sharing import SOON_S
from krea_dagster.engine.run.context import RunContext
from krea_dagster.errors import JournalError

_log = logging.getLogger(__name__)


class PaceSync:
    """The exchanges of one run."""

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._in_flight = context.in_flight

    async def run(self) -> None:
        """Exchange when it is due and there is something to tell or to want, until cancelled."""
        clock, shared = self._context.clock, self._in_flight.shared
        while True:
            due_s = shared.due_s(clock.monotonic())
            await clock.sleep(min(max(due_s, 0.01), SOON_S))
            if shared.due_s(clock.monotonic()) <= 0.0 and not self._in_flight.is_idle:
                await self.exchange()

    async def exchange(self) -> None:
        """Exchange once. If the journal is away, the run goes on with what it knows."""
        options, shared = self._context.options, self._in_flight.shared
        clock = self._context.clock.monotonic
        lease, untold = self._in_flight.lease(self._context.owner), shared.untold()
        exchange, api_key = options.journal.paces.exchange, options.api_key or ""
        try:
            found = await options.in_thread(exchange, api_key, lease, untold, clock)
        except JournalError as error:
            # Purchases are written to the same journal: they decide whether the run must end.
            _log.debug("The pace was not shared: %s", error)
            shared.missed(clock())
        else:
            shared.exchanged(found, clock())
        self._context.wake()

"""What the steps of a run share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import anyio

from krea_dagster.engine.journal.changes import Change, record_after
from krea_dagster.engine.journal.group_commit import GroupCommit
from krea_dagster.engine.journal.owners import new_owner
from krea_dagster.engine.pace import Pace
from krea_dagster.engine.policy import backoff_s
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.in_flight import InFlight
from krea_dagster.engine.run.options import Client, RunOptions
from krea_dagster.engine.run.outages import Dependency, Outages
from krea_dagster.engine.run.poller import TaskPoller
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.run.worklist import WorkList
from krea_dagster.engine.states import Event
from krea_dagster.errors import AccountStopped, KreaError, NoUsableBody, RunStopped


class RunContext:
    """The options, the client, the work list, the journal's writer and the tasks in flight.

    ``in_thread`` also waits for a journal or a storage root that is away. ``wake`` is called when
    the scheduler may have something to do. ``on_release`` is called when a purchase commits less
    than before, so that caps have room. ``stopped`` is what ended the buying. ``owner`` is the name
    under which the run claims requests.
    """

    def __init__(
        self,
        options: RunOptions,
        client: Client,
        work: WorkList,
        outages: Outages,
        wake: Callable[[], None],
    ) -> None:
        self.options = options
        self.policy = options.policy
        self.clock = options.clock
        self.client = client
        self.work = work
        self.outages = outages
        self.in_thread = outages.patient(options.in_thread)
        self.process = new_owner(options.run_id)
        self.owner = self.process.owner
        self.writer = GroupCommit(
            options.journal,
            owner=self.owner,
            run_id=options.run_id,
            caps=options.caps,
            launch=options.launch,
            root_id=options.root.root_id,
            in_thread=self.in_thread,
        )
        self.poller = TaskPoller(client, options.clock.monotonic, options.latencies)
        pace = Pace(options.max_in_flight, options.max_per_s)
        self.in_flight = InFlight(self.poller, pace, options.clock)
        self.wake = wake
        self.on_release: Callable[[], None] = lambda: None
        self.stopped: AccountStopped | RunStopped | None = None

    def stop_buying(self, reason: AccountStopped | RunStopped) -> None:
        """Buy nothing more in this run. The first reason counts."""
        if self.stopped is None:
            self.stopped = reason
            self.wake()

    async def record(
        self,
        item: WorkItem,
        event: Event,
        values: Mapping[str, Any] | None = None,
        data: Mapping[str, Any] | None = None,
        *,
        error: tuple[str, str] | None = None,
    ) -> None:
        """Write an event of a request durably, with the code and message of an error.

        Raises JournalError.
        """
        values = dict(values or {})
        if error is not None:
            values["error_code"], values["error_message"] = error
        change = Change(item.record.request_key, event, self.clock.now(), values, data)
        await self._write(item, *item.unwritten, change)

    def record_with_next(self, item: WorkItem, event: Event, values: Mapping[str, Any]) -> None:
        """Note an event that the request's next one is written with, or ``write_noted``.

        Only for what is free to ask the server again: a process that dies before loses it.
        """
        before = item.record
        change = Change(before.request_key, event, self.clock.now(), values)
        item.record = record_after(change, before, self.owner, self.options.run_id)
        item.written, item.unwritten = item.written or before, (*item.unwritten, change)

    async def write_noted(self, item: WorkItem) -> None:
        """Write the events that were noted and no event has followed. Raises JournalError."""
        if item.unwritten:
            with anyio.CancelScope(shield=True):
                await self._write(item, *item.unwritten)

    async def _write(self, item: WorkItem, *changes: Change) -> None:
        before = item.written or item.record
        item.written, item.unwritten = None, ()
        item.record = before
        item.record = await self.writer.append(*changes, known=before)
        if item.record.committed_units < before.committed_units:
            self.on_release()

    async def api_was_away(self, error: KreaError) -> bool:
        """Wait for the API if an error suggests that it is away; return whether it was."""
        suspected = isinstance(error, NoUsableBody) or getattr(error, "may_be_away", False)
        return suspected and await self.outages.until_back(Dependency.API, error)

    def age_s(self, record: Record) -> float:
        """Return the seconds since a request was submitted."""
        since = record.submitted_at or self.clock.now()
        return max(0.0, (self.clock.now() - since) / timedelta(seconds=1))

    def random_fraction(self) -> float:
        """Return a random number from 0 to 1."""
        return self.options.randomness.random()

    def backoff_s(self, failures: int, *, at_least_s: float | None = None) -> float:
        """Return the pause after this many failures in a row."""
        return backoff_s(failures, self.random_fraction(), self.policy, at_least_s=at_least_s)

"""One request under way, with the state that a run keeps of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.policy import RetryState
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.poll_schedule import PendingTask
from krea_dagster.engine.run.requested_image import BoughtFor


@dataclass
class WorkItem:
    """One request under way.

    ``callback_url`` is the row's own callback address, ``row`` the row that it is bought for.
    ``holds_place``: it counts in the window.
    ``may_submit``: it may send one POST; the pace is kept by granting that. ``since_s`` is when its
    task was submitted, by the run's clock, and ``not_yet_s`` its age when it was last seen
    unfinished. ``unwritten`` are events that the next one is written with; ``written`` is the
    record without them, and ``record`` the one with them.
    """

    record: Record
    partition_key: str
    retry: RetryState = field(default_factory=RetryState)
    scopes: tuple[str, ...] = ()
    callback_url: str | None = None
    row: BoughtFor | None = None
    holds_place: bool = False
    may_submit: bool = False
    since_s: float = 0.0
    not_yet_s: float = 0.0
    written: Record | None = None
    unwritten: tuple[Change, ...] = ()

    @property
    def pending(self) -> PendingTask:
        """Its task, as the poll schedule sees it."""
        return PendingTask(self.record.request.quality, self.since_s, self.not_yet_s)

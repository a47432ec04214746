"""The tasks that this run has at the server, and how many more it may send there."""

from __future__ import annotations

from typing import Final

from krea_dagster.engine.clock import Clock
from krea_dagster.engine.pace import InWork, Pace, is_slow
from krea_dagster.engine.pace_sharing import Lease, PaceEvent, SharedPace
from krea_dagster.engine.run.poll_schedule import PollReason, chances, is_learned
from krea_dagster.engine.run.poller import TaskPoller, TaskRead
from krea_dagster.engine.run.work_item import WorkItem

#: By how much the lowest median seen is raised with every image.
_FORGET: Final = 1.001


class InFlight:
    """The tasks that were not seen to end, the POSTs under way, and the pace.

    ``wants`` is how many more requests this run would submit if the pace let it.
    """

    def __init__(self, poller: TaskPoller, pace: Pace, clock: Clock) -> None:
        self._poller = poller
        self._clock = clock
        self.shared = SharedPace(pace)
        self.wants = 0
        self._submitting: set[str] = set()  # requests that may submit
        self._in_work: dict[str, WorkItem] = {}  # requests whose task was not seen to end
        self._lowest_s: dict[str, float] = {}  # the lowest median, by quality

    @property
    def pace(self) -> Pace:
        """What may be submitted now."""
        return self.shared.pace

    @property
    def is_idle(self) -> bool:
        """Whether no task is at the server, and no submission is wanted."""
        return not (self._in_work or self._submitting or self.wants)

    @property
    def submitting(self) -> int:
        """Requests that may submit and have no answer yet."""
        return len(self._submitting)

    def lease(self, owner: str) -> Lease:
        """Return what other runs need to know of this one."""
        in_flight = self._own_in_work(closely=True).expected + len(self._submitting)
        return Lease(owner, round(in_flight), self.wants)

    def grant_submit(self, item: WorkItem) -> None:
        """Let a request send one POST, by the pace."""
        item.may_submit = True
        self.shared.pace = self.pace.sent(self._clock.monotonic())
        self._submitting.add(item.record.request_key)

    def revoke_submit(self, item: WorkItem) -> None:
        """Take the grant back, or note that it was used."""
        item.may_submit = False
        self._submitting.discard(item.record.request_key)

    def taken(self, item: WorkItem, sent_at_s: float) -> None:
        """Note that the server has taken a request, which was sent at ``sent_at_s``."""
        item.since_s, item.not_yet_s = sent_at_s, 0.0
        self._in_work[item.record.request_key] = item
        in_work = self._tasks_in_work(closely=self.pace.unclear)
        now_s, pressed = self._clock.monotonic(), self._poller.pressed
        self.shared.learn(PaceEvent(now_s, "taken", now_s - sent_at_s, in_work, pressed=pressed))

    def refused(self, sent_at_s: float, wait_s: float) -> None:
        """Note a 429, which asked for a pause of ``wait_s``."""
        now_s = self._clock.monotonic()
        in_work = self._tasks_in_work(closely=True)
        self.shared.learn(PaceEvent(now_s, "refused", now_s - sent_at_s, in_work, wait_s))

    def silent(self, pause_s: float) -> None:
        """Note that the server gives no usable answer."""
        self.shared.learn(PaceEvent(self._clock.monotonic(), "silent", wait_s=pause_s))

    def ended(self, item: WorkItem) -> None:
        """Note that a task has ended, or is not expected to end any more."""
        self._in_work.pop(item.record.request_key, None)

    def learn(self, item: WorkItem, read: TaskRead) -> None:
        """Learn how long an image took, and whether the server has become slow."""
        if read.reason is PollReason.TIMEOUT:
            return  # it may have ended long ago
        if read.reason is PollReason.CALLBACK:
            item.not_yet_s = max(item.not_yet_s, read.quiet_at_s - item.since_s)
        quality, poller = item.record.request.quality, self._poller
        now_s = self._clock.monotonic()
        poller.latencies = poller.latencies.finished(quality, item.not_yet_s, now_s - item.since_s)
        if is_learned(poller.latencies, quality):
            median_s = poller.latencies.of(quality).median_s
            # Forgotten slowly: a speed of the past may never come back.
            lowest_s = min(median_s, self._lowest_s.get(quality, median_s) * _FORGET)
            self._lowest_s[quality] = lowest_s
            if is_slow(median_s, lowest_s):
                self.shared.learn(PaceEvent(now_s, "slowed", median_s=median_s, best_s=lowest_s))

    def _tasks_in_work(self, *, closely: bool) -> InWork:
        """Return the tasks of all runs at the server that this one knows of."""
        own, elsewhere = self._own_in_work(closely=closely), self.shared.elsewhere
        return InWork(own.known + elsewhere, own.expected + elsewhere, own.deviation)

    def _own_in_work(self, *, closely: bool) -> InWork:
        """Return this run's tasks; ``closely``: estimate how many of them have ended."""
        known = len(self._in_work)
        if not closely or not known:
            return InWork(known, float(known), 0.0)
        pending = [item.pending for item in self._in_work.values()]
        ended = chances(self._poller.latencies, pending, self._clock.monotonic())
        deviation = float((ended * (1.0 - ended)).sum()) ** 0.5
        return InWork(known, known - float(ended.sum()), deviation)

"""What this run has at the server, as far as it knows, and how much more may be sent there."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Final

from krea_dagster.engine.clock import Clock
from krea_dagster.engine.journal.pace_log import PaceLog
from krea_dagster.engine.pace import InWork, Pace, is_slow
from krea_dagster.engine.pace_sharing import SOON_S, Lease, SharedPace
from krea_dagster.engine.pace_sharing import Answer as Shown
from krea_dagster.engine.run.poll_schedule import Hint, chances, is_learned
from krea_dagster.engine.run.poller import Answer, Asker
from krea_dagster.engine.run.work_item import Carrier
from krea_dagster.engine.threads import InThread
from krea_dagster.errors import JournalError

_log = logging.getLogger(__name__)

#: By how much the quickest median seen is raised with every image.
_FORGET: Final = 1.001


class AtServer:
    """The tasks whose end was not seen, the requests on their way, and the pace they go by."""

    def __init__(self, asker: Asker, pace: Pace, clock: Clock, *, wants: int = 0) -> None:
        self._asker = asker
        self._clock = clock
        self.shared = SharedPace(pace)
        self.wants = wants  # how many more this run would submit if the pace let it
        self._submitting: set[str] = set()  # requests that were given leave to submit
        self._in_work: dict[str, Carrier] = {}  # requests whose task has not been seen to end
        self._quickest_s: dict[str, float] = {}  # the least that the median was, by quality

    @property
    def pace(self) -> Pace:
        """What may be submitted now."""
        return self.shared.pace

    @property
    def is_idle(self) -> bool:
        """Whether nothing is at the server, and nothing wanted there."""
        return not (self._in_work or self._submitting or self.wants)

    def lease(self, owner: str) -> Lease:
        """What other runs are to know of this one."""
        in_flight = self._own_in_work(closely=True).expected + len(self._submitting)
        return Lease(owner, round(in_flight), self.wants)

    def may_submit(self, carrier: Carrier) -> None:
        """Give a carrier leave for one POST, by the pace."""
        carrier.may_submit = True
        self.shared.pace = self.pace.sent(self._clock.monotonic())
        self._submitting.add(carrier.record.request_key)

    def may_no_more_submit(self, carrier: Carrier) -> None:
        """Take the leave back, or note that it was used."""
        carrier.may_submit = False
        self._submitting.discard(carrier.record.request_key)

    @property
    def submitting(self) -> int:
        """Requests that have leave to submit and no answer yet."""
        return len(self._submitting)

    def taken(self, carrier: Carrier, sent_at_s: float) -> None:
        """Note that the server has taken a request, which was sent at ``sent_at_s``."""
        carrier.since_s, carrier.not_yet_s = sent_at_s, 0.0
        self._in_work[carrier.record.request_key] = carrier
        in_work = self._tasks_in_work(closely=self.pace.unclear)
        now_s, pressed = self._clock.monotonic(), self._asker.pressed
        self.shared.learn(Shown(now_s, "taken", now_s - sent_at_s, in_work, pressed=pressed))

    def refused(self, sent_at_s: float, wait_s: float) -> None:
        """Note that the server has refused one more, and asked for ``wait_s`` of silence."""
        now_s = self._clock.monotonic()
        in_work = self._tasks_in_work(closely=True)
        self.shared.learn(Shown(now_s, "refused", now_s - sent_at_s, in_work, wait_s))

    def silent(self, pause_s: float) -> None:
        """Note that the server gives no usable answer."""
        self.shared.learn(Shown(self._clock.monotonic(), "silent", wait_s=pause_s))

    def ended(self, carrier: Carrier) -> None:
        """Note that a request's task has ended, or is not counted on to end any more."""
        self._in_work.pop(carrier.record.request_key, None)

    def learn(self, carrier: Carrier, answer: Answer) -> None:
        """Take note of how long an image took, and of a server that has become slow."""
        if answer.hint is Hint.SWEPT:
            return  # it may have ended long ago
        if answer.hint is Hint.CALLED:
            quiet_s = answer.quiet_at_s - carrier.since_s
            carrier.not_yet_s = max(carrier.not_yet_s, quiet_s)
        quality = carrier.record.request.quality
        now_s = self._clock.monotonic()
        asker = self._asker
        asker.latencies = asker.latencies.finished(
            quality, carrier.not_yet_s, now_s - carrier.since_s
        )
        if is_learned(asker.latencies, quality):
            median_s = asker.latencies.of(quality).median_s
            # Forgotten by and by: what was quick once may never be again.
            quickest_s = self._quickest_s.get(quality, median_s) * _FORGET
            self._quickest_s[quality] = quickest_s = min(median_s, quickest_s)
            if is_slow(median_s, quickest_s):
                self.shared.learn(Shown(now_s, "slowed", median_s=median_s, best_s=quickest_s))

    def _tasks_in_work(self, *, closely: bool) -> InWork:
        """The tasks of all runs at the server, as far as they are known to this one."""
        own, elsewhere = self._own_in_work(closely=closely), self.shared.elsewhere
        return InWork(own.known + elsewhere, own.expected + elsewhere, own.deviation)

    def _own_in_work(self, *, closely: bool) -> InWork:
        """The tasks at the server; ``closely``: with how many of them have probably ended."""
        known = len(self._in_work)
        if not closely or not known:
            return InWork(known, float(known), 0.0)
        awaited = [carrier.awaited for carrier in self._in_work.values()]
        ended = chances(self._asker.latencies, awaited, self._clock.monotonic())
        deviation = float((ended * (1.0 - ended)).sum()) ** 0.5
        return InWork(known, known - float(ended.sum()), deviation)


class Sharing:
    """Has a run go by its share of what all runs of its account have learned."""

    def __init__(
        self,
        at_server: AtServer,
        paces: PaceLog,
        *,
        owner: str,
        api_key: str,
        clock: Clock,
        in_thread: InThread,
        changed: Callable[[], None],
    ) -> None:
        self._at_server = at_server
        self._paces = paces
        self._owner = owner
        self._api_key = api_key
        self._clock = clock
        self._in_thread = in_thread
        self._changed = changed

    async def run(self) -> None:
        """Exchange for as long as there is anything to tell or to want."""
        while True:
            due_s = self._at_server.shared.due_s(self._clock.monotonic())
            await self._clock.sleep(min(max(due_s, 0.01), SOON_S))
            due_s = self._at_server.shared.due_s(self._clock.monotonic())
            if due_s <= 0.0 and not self._at_server.is_idle:
                await self.exchange()

    async def exchange(self) -> None:
        """Exchange once. Where the journal is away, the run goes on with what it knows."""
        shared = self._at_server.shared
        lease, untold = self._at_server.lease(self._owner), shared.untold()
        clock = self._clock.monotonic
        try:
            found = await self._in_thread(self._paces.exchange, self._api_key, lease, untold, clock)
        except JournalError as error:
            # Purchases are written to the same journal: they say whether the run must end.
            _log.debug("The pace was not shared: %s", error)
            shared.missed(clock())
        else:
            shared.exchanged(found, clock())
        self._changed()

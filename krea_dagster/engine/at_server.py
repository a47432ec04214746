"""What this run has at the server, as far as it knows, and how much more may be sent there."""

from __future__ import annotations

from typing import Final

from krea_dagster.engine.asker import Answer, Asker
from krea_dagster.engine.carrier import Carrier
from krea_dagster.engine.clock import Clock
from krea_dagster.engine.looking import Hint, chances, is_learned
from krea_dagster.engine.pace import InWork, Pace

#: By how much the quickest median seen is raised with every image.
_FORGET: Final = 1.001


class AtServer:
    """The tasks whose end was not seen, the requests on their way, and the pace they go by."""

    def __init__(self, asker: Asker, pace: Pace, clock: Clock) -> None:
        self._asker = asker
        self._clock = clock
        self.pace = pace
        self._submitting: set[str] = set()  # requests that were given leave to submit
        self._in_work: dict[str, Carrier] = {}  # requests whose task has not been seen to end
        self._quickest_s: dict[str, float] = {}  # the least that the median was, by quality

    def may_submit(self, carrier: Carrier) -> None:
        """Give a carrier leave for one POST, by the pace."""
        carrier.may_submit = True
        self.pace = self.pace.sent(self._clock.monotonic())
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
        self.pace = self.pace.taken(sent_at_s, in_work, pressed=self._asker.pressed)

    def refused(self, sent_at_s: float, wait_s: float) -> None:
        """Note that the server has refused one more, and asked for ``wait_s`` of silence."""
        now_s = self._clock.monotonic()
        in_work = self._tasks_in_work(closely=True)
        self.pace = self.pace.refused(now_s, sent_at_s, in_work, wait_s)

    def silent(self, pause_s: float) -> None:
        """Note that the server gives no usable answer."""
        self.pace = self.pace.silent(self._clock.monotonic(), pause_s)

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
            self.pace = self.pace.slowed(now_s, median_s, quickest_s)

    def _tasks_in_work(self, *, closely: bool) -> InWork:
        """The tasks at the server; ``closely``: with how many of them have probably ended."""
        known = len(self._in_work)
        if not closely or not known:
            return InWork(known, float(known), 0.0)
        awaited = [carrier.awaited for carrier in self._in_work.values()]
        ended = chances(self._asker.latencies, awaited, self._clock.monotonic())
        deviation = float((ended * (1.0 - ended)).sum()) ** 0.5
        return InWork(known, known - float(ended.sum()), deviation)

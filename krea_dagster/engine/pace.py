"""How fast tasks may be submitted, and how many may be at the server. Pure, given seconds.

An account's limits are not published and no header names them, so they are found by feedback: the
submissions that the server takes, and those that it refuses with a 429. A 429 does not say which
limit was met, the number at once or the rate. They are told apart while the window first opens,
before tasks end: a server that is full takes nothing until one ends, one that counts by the second
takes the next although none has ended.

- A limit on the **number at once** is kept by a window. It grows a little with every submission
  that is taken and shrinks a little with every refusal, so it stays where few are refused.
- A limit on the **rate** is kept by spacing. After a refusal the rate is what the server took
  since the refusal before; then it rises, slowly at first, until the next refusal.

Several runs with one key share an account by this alone: a run that sends more is refused more. If
they also share a journal, each has its share of what all of them have learned
(``pace_sharing.py``).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import Final, NamedTuple

from krea_dagster.models import evolve

#: Tasks at once before the first refusal; each that is taken opens the window by one.
_OPENING: Final = 8.0

#: How the rate rises after a refusal, as a share by the second squared: at first, when little is
#: known of the limit, and in the end.
_RISE_FIRST: Final = 0.25
_RISE_LAST: Final = 0.0011
#: The rate to which this applies. A lower one rises relatively faster and a higher one slower, so
#: that runs which share an account come to share it evenly.
_USUAL_PER_S: Final = 20.0
#: After this many seconds without a refusal the limit has changed, and the rate rises quickly.
_QUIET_S: Final = 6.0
#: A refusal measures the rate only if the one before is at least this old.
_MEASURE_S: Final = 1.0

#: Pauses after refusals in a row: the first, and the longest that the server did not request.
_PAUSE_S: Final = 0.05
_MAX_PAUSE_S: Final = 0.3
#: A server that refuses for this long while no task ends is full: limits on the rate are mostly by
#: the second.
_FULL_S: Final = 1.1
#: Refusals with nothing taken beyond them, after which the server counts as full.
_FULL_TIMES: Final = 3
#: Refusals in a row after which a window that is larger than the number of tasks at the server
#: shrinks to that number, at most by half.
_FULL_ROW: Final = 4
#: After this many cuts within this many submissions the refusals come by chance, or from other
#: runs, and the learned rate is forgotten. If it is shared, it rises again as at first.
_USELESS_CUTS: Final = 6
_CUTS_WITHIN: Final = 100

#: A kind of image that takes this many times as long as it did shows an overloaded server.
_SLOW: Final = 2.0


class Limit(enum.Enum):
    """Which of an account's limits is known to bind."""

    NONE = "none"  #: nothing was refused yet
    UNCLEAR = "unclear"  #: something was, and it is not clear why
    AT_ONCE = "at once"
    RATE = "rate"


class InWork(NamedTuple):
    """Tasks at the server: known, and expected, with the standard deviation.

    ``known`` were taken and not seen to end; some of them have ended by now.
    """

    known: int
    expected: float
    deviation: float


class RateLimitHit(NamedTuple):
    """When a 429 came, how many tasks were taken before it, and for how long nothing was sent."""

    at_s: float
    taken: int
    paused_s: float


class Share(NamedTuple):
    """A run's share of an account: the places that other runs have, and its part of the rate.

    ``before`` is how many runs go before it: if each answer has to be waited for, only the first
    one tries, and after a pause for all of them they begin one after another.
    """

    elsewhere: int = 0
    of_rate: float = 1.0
    before: int = 0


ALONE: Final = Share()


@dataclass(frozen=True)
class Pace:
    """What may be submitted now, learned from the answers so far.

    ``most`` bounds the tasks at once, and ``most_per_s`` the submissions a second, if the user
    knows the limit; ``share`` is what other runs leave. All other fields are learned of the account
    as a whole. Times are seconds of one monotonic clock.
    """

    most: int
    most_per_s: float | None = None
    share: Share = ALONE
    limit: Limit = Limit.NONE
    window: float = _OPENING
    rate_per_s: float | None = None
    rate_at_s: float = 0.0
    rise: float = _RISE_FIRST
    next_at_s: float = 0.0
    pause_until_s: float = 0.0
    paused_s: float = 0.0
    taken_count: int = 0
    taken_in_row: int = 0
    refused_in_row: int = 0
    unanswered: bool = False
    row_since_s: float = 0.0
    refused_at_s: float = -math.inf
    refused_with: float = math.inf
    unrefuted: int = 0
    refusals: tuple[RateLimitHit, ...] = ()
    cuts: tuple[int, ...] = ()
    refusal_cost_s: float = 0.0
    slowed_at_s: float = -math.inf

    # -- what is allowed ----------------------------------------------------------------------

    @property
    def room(self) -> int:
        """Tasks that this run may have at the server at once."""
        if self.is_tried and self.share.before:
            return 0
        return max(0, math.floor(min(self.window, self.most_of_all)) - self.share.elsewhere)

    @property
    def most_of_all(self) -> float:
        """The window at which this run may have as many tasks as its user allows."""
        return float(self.most + self.share.elsewhere)

    def is_full(self, at_once: int) -> bool:
        """Whether this number of tasks is all that the user allows, or that the server takes."""
        return at_once >= self.most or (self.limit is Limit.AT_ONCE and at_once >= self.room)

    @property
    def one_by_one(self) -> bool:
        """Whether to wait for each answer before the next submission: an answer decides."""
        return self.is_tried or self.refused_in_row > 0

    @property
    def is_tried(self) -> bool:
        """Whether so little is known that only one run should try."""
        unmeasured = self.limit is Limit.RATE and self.rate_per_s is None
        return self.limit is Limit.UNCLEAR or unmeasured or self.unanswered

    @property
    def unclear(self) -> bool:
        """Whether it matters now how many tasks have ended."""
        return self.limit is Limit.UNCLEAR

    def wait_s(self, now_s: float) -> float:
        """Return the seconds until the rate, and a requested pause, allow the next submission."""
        until_s = self.pause_until_s
        rate = self.rate_at(now_s)
        if rate is not None:
            until_s = max(until_s + self.share.before / rate, self.next_at_s)
        return max(0.0, until_s - now_s)

    def rate_at(self, now_s: float) -> float | None:
        """Return the submissions a second of all runs, None if no limit is known."""
        most_per_s = None if self.most_per_s is None else self.most_per_s / self.share.of_rate
        if self.rate_per_s is None:
            return most_per_s
        # Each of the runs that share a rate is refused if it is too high, so it rises later.
        quiet_s = max(0.0, now_s - self.rate_at_s)
        late_s = max(0.0, quiet_s - _QUIET_S)
        quiet_s *= math.sqrt(self.share.of_rate)
        risen = self.rise * quiet_s**2 * math.sqrt(_USUAL_PER_S / self.rate_per_s)
        rate = self.rate_per_s * (1.0 + risen + 0.05 * late_s**2)
        return rate if most_per_s is None else min(rate, most_per_s)

    # -- after an answer ----------------------------------------------------------------------

    def sent(self, now_s: float) -> Pace:
        """Return the pace after a submission. A delay of less than the spacing is made up for."""
        rate = self.rate_at(now_s)
        if rate is None:
            return self
        spacing_s = 1.0 / (rate * self.share.of_rate)
        return evolve(self, next_at_s=max(self.next_at_s, now_s - spacing_s) + spacing_s)

    def taken(self, sent_at_s: float, in_work: InWork, *, pressed: bool) -> Pace:
        """Return the pace after a submission was taken; ``in_work`` counts it.

        ``pressed``: more would be submitted if there were room.
        """
        after = evolve(self, taken_count=self.taken_count + 1, taken_in_row=self.taken_in_row + 1)
        if sent_at_s <= self.refused_at_s:
            # Of the burst that was refused: it shows nothing about the time since.
            counted = [one._replace(taken=one.taken + 1) for one in self.refusals[-1:]]
            return evolve(after, refusals=(*self.refusals[:-1], *counted))
        after = evolve(after, refused_in_row=0, unanswered=False)
        match self.limit:
            case Limit.NONE:
                return _opened(after, 1.0)
            case Limit.UNCLEAR:
                return _weighed(_opened(after, 1.0), in_work)
            case Limit.AT_ONCE if pressed:
                return _opened(after, _growth(after))
        return after

    def refused(self, now_s: float, sent_at_s: float, in_work: InWork, wait_s: float) -> Pace:
        """Return the pace after a 429 that requested a pause of ``wait_s`` (0: none).

        Refusals of submissions that were sent before the last refusal came count as one.
        """
        after = self.paused(now_s, wait_s)
        if sent_at_s <= self.refused_at_s:
            return after
        first = self.refused_in_row == 0
        in_row = self.refused_in_row + 1
        after = evolve(
            after,
            refused_at_s=now_s,
            refused_in_row=in_row,
            row_since_s=now_s if first else self.row_since_s,
            taken_in_row=0,
            refusal_cost_s=wait_s,
            refusals=(
                *(one for one in self.refusals if now_s - one.at_s < 15.0),
                RateLimitHit(now_s, self.taken_count, self.paused_s),
            ),
        )
        pause_s = min(_MAX_PAUSE_S, _PAUSE_S * 2.0 ** min(in_row - 1, 10))
        rate = self.rate_at(now_s)
        if rate is not None:
            pause_s = max(pause_s, 1.0 / rate)
        after = evolve(after, pause_until_s=max(after.pause_until_s, now_s + pause_s))
        match self.limit:
            case Limit.NONE | Limit.UNCLEAR:
                return _doubted(after, now_s, in_work, wait_s)
            case Limit.AT_ONCE:
                window = self.window - max(0.5, self.window / 32.0)
                if in_row >= _FULL_ROW:
                    window = max(window / 2.0, min(window, float(in_work.known)))
                return evolve(after, window=max(1.0, window))
            case Limit.RATE:
                return _slower(after, now_s, in_work)

    def paused(self, now_s: float, wait_s: float) -> Pace:
        """Return the pace with a pause."""
        until_s = max(self.pause_until_s, now_s + wait_s)
        added_s = max(0.0, until_s - max(self.pause_until_s, now_s))
        return evolve(self, pause_until_s=until_s, paused_s=self.paused_s + added_s)

    def silent(self, now_s: float, wait_s: float) -> Pace:
        """Return the pace with a pause, and then one submission at a time until one is taken.

        For a server that gives no usable answer: each further submission may be charged.
        """
        return evolve(self.paused(now_s, wait_s), unanswered=True)

    def slowed(self, now_s: float, median_s: float, best_s: float) -> Pace:
        """Return the pace for images that take ``median_s`` and once took ``best_s``.

        A server that queues instead of refusing is overloaded too, and more tasks in its queue are
        not finished sooner. Once per such latency, 10 % of the window are taken off.
        """
        if not is_slow(median_s, best_s) or now_s - self.slowed_at_s < median_s:
            return self
        window = max(_OPENING, min(self.window, self.most_of_all) * 0.9)
        if window >= self.window:
            return evolve(self, slowed_at_s=now_s)
        limit = Limit.AT_ONCE if self.limit is Limit.NONE else self.limit
        return evolve(self, limit=limit, window=window, slowed_at_s=now_s, taken_in_row=0)


def is_slow(median_s: float, best_s: float) -> bool:
    """Return whether images take much longer than the best, so the server must be overloaded."""
    return median_s >= _SLOW * best_s


def _opened(pace: Pace, by: float) -> Pace:
    return evolve(pace, window=min(pace.most_of_all, pace.window + by))


def _growth(pace: Pace) -> float:
    """Return by how much a task that was taken opens the window.

    So little that about every 14th submission is refused; more after a long time without a refusal,
    because then the limit has changed.
    """
    steady = (1.0 / 24.0 + pace.window / 1024.0) / (1.0 + 20.0 * pace.refusal_cost_s)
    quiet = (pace.taken_in_row / pace.window - 2.0) / (4.0 + 40.0 * pace.refusal_cost_s)
    return max(steady, min(1.0, quiet))


def _weighed(pace: Pace, in_work: InWork) -> Pace:
    """Return the pace after a task was taken while the reason of a refusal is not clear."""
    at_least = in_work.expected - 2.0 * in_work.deviation
    if at_least >= pace.refused_with + 2.5 and in_work.deviation < 1.5:
        return evolve(
            pace,
            limit=Limit.RATE,
            rate_per_s=None,
            rise=_RISE_FIRST,
            window=math.inf,
            refused_with=math.inf,
        )
    return evolve(pace, unrefuted=0) if at_least > pace.refused_with + 0.5 else pace


def _doubted(pace: Pace, now_s: float, in_work: InWork, wait_s: float) -> Pace:
    """Return the pace after a refusal whose reason is not clear yet."""
    new = pace.limit is Limit.NONE or in_work.expected > pace.refused_with + 2.0
    # Further refusals in a row show no more than the first, unless a long pause was between.
    counts = pace.refused_in_row == 1 or (pace.refused_in_row == 2 and wait_s > 0.5)
    unrefuted = 1 if new else pace.unrefuted + counts
    long = pace.refused_in_row >= _FULL_TIMES and now_s - pace.row_since_s >= _FULL_S
    if long or unrefuted >= _FULL_TIMES:
        return evolve(pace, limit=Limit.AT_ONCE, window=max(1.0, float(in_work.known)))
    return evolve(
        pace,
        limit=Limit.UNCLEAR,
        window=max(float(in_work.known) + 1.0, min(pace.window, pace.most_of_all)),
        refused_with=in_work.expected if new else min(in_work.expected, pace.refused_with),
        unrefuted=unrefuted,
    )


def _slower(pace: Pace, now_s: float, in_work: InWork) -> Pace:
    """Return the pace after a refusal under a limit on the rate."""
    before = pace.rate_at(now_s) if pace.rate_per_s is not None else None
    if before is None:
        first = pace.refusals[0]
        rate = max(1, pace.taken_count - first.taken) / max(0.02, now_s - first.at_s)
        mark = pace.refusals[-1]
        # Each of the runs that share a rate is refused if it is too high.
        rise = _RISE_FIRST * pace.share.of_rate
        return _at_rate(evolve(pace, refusals=(mark,)), now_s, rate, rise=max(_RISE_LAST, rise))
    if pace.refused_in_row > 1:
        return pace
    rate = _measured(pace, now_s, before)
    cuts = (*(c for c in pace.cuts if pace.taken_count - c < _CUTS_WITHIN), pace.taken_count)
    rise = max(_RISE_LAST, pace.rise / 6.0)
    if len(cuts) >= _USELESS_CUTS and pace.rise <= _RISE_LAST:
        if pace.share.of_rate < 1.0:
            return _at_rate(evolve(pace, cuts=()), now_s, rate, rise=_RISE_FIRST)
        window = max(_OPENING, float(in_work.known))
        return evolve(pace, limit=Limit.NONE, rate_per_s=None, window=window, cuts=(), refusals=())
    return _at_rate(evolve(pace, cuts=cuts), now_s, rate, rise=rise)


def _measured(pace: Pace, now_s: float, rate: float) -> float:
    """Return the rate that the server takes, measured since the refusal before.

    A server that saves up unused rate takes more for a while than on average, so the measured rate
    counts. One that does not takes just less than it refused.
    """
    earlier = (one for one in reversed(pace.refusals[:-1]) if now_s - one.at_s >= _MEASURE_S)
    last = next(earlier, None)
    if last is None or pace.taken_count == last.taken:
        return rate
    sending_s = max(0.3, now_s - last.at_s - (pace.refusals[-1].paused_s - last.paused_s))
    took = (pace.taken_count - last.taken) / sending_s
    if took > 0.93 * rate:
        took += 0.4 * max(0.0, rate - took)
    return min(0.97 * rate if pace.share.of_rate < 1.0 else rate, max(took, 0.7 * rate))


def _at_rate(pace: Pace, now_s: float, rate_per_s: float, *, rise: float) -> Pace:
    next_at_s = now_s + 1.0 / rate_per_s
    return evolve(pace, rate_per_s=rate_per_s, rate_at_s=now_s, rise=rise, next_at_s=next_at_s)

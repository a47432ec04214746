"""How the runs of one journal share an account: what each has learned, and what each may send.

Pure, given seconds. Every run keeps a lease in the journal: how many tasks it has at the server,
and how many more it wants. Twice a second it writes what the server answered, reads what the
others wrote, and reads their leases. The window and the rate are divided evenly among those that
want something; what one does not want, the others have.

Runs that share no journal share the account by feedback alone (``pace.py``).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Final, NamedTuple

from krea_dagster.engine.pace import ALONE, InWork, Limit, Pace, RateLimitHit, Share
from krea_dagster.models import evolve

#: Seconds between two exchanges, and the least where something was learned that others wait for.
_EVERY_S: Final = 0.5
SOON_S: Final = 0.25
#: Seconds after which a lease that was not renewed counts no more.
LEASE_S: Final = 5.0
#: Seconds after which every run has told what it was answered.
_SETTLED_S: Final = 2.5
#: Seconds for which what was learned is believed while nobody sends anything.
_KNOWN_S: Final = 300.0
#: Seconds after which the places that do not divide evenly go to the next ones, and by how much
#: further: the multiples of the golden ratio, less their whole parts, are spread most evenly.
_TURN_S: Final = 5.0
_TURN: Final = 0.618034


class PaceEvent(NamedTuple):
    """What the server showed at a time, by the name of the Pace's method that learns from it.

    ``sent_s`` is how long before it was sent; ``in_work`` what was at the server then.
    """

    at_s: float
    name: str
    sent_s: float = 0.0
    in_work: InWork = InWork(0, 0.0, 0.0)
    wait_s: float = 0.0
    pressed: bool = False
    median_s: float = 0.0
    best_s: float = 0.0

    def taught(self, pace: Pace) -> Pace:
        """What a pace becomes by it."""
        match self.name:
            case "taken":
                return pace.taken(self.at_s - self.sent_s, self.in_work, pressed=self.pressed)
            case "refused":
                sent_at_s = self.at_s - self.sent_s
                return pace.refused(self.at_s, sent_at_s, self.in_work, self.wait_s)
            case "silent":
                return pace.silent(self.at_s, self.wait_s)
            case _:
                return pace.slowed(self.at_s, self.median_s, self.best_s)


@dataclass(frozen=True)
class Lease:
    """What a run has at the server, and how many more it would send now."""

    owner: str
    in_flight: int
    wants: int


class PaceHistory(NamedTuple):
    """What runs have told each other: what they knew ``_SETTLED_S`` ago, and every answer since.

    Answers are told late and in no order. In the order of their times they teach what they would
    have taught one run.
    """

    pace: Pace
    answers: tuple[PaceEvent, ...]

    def among(self, leases: Sequence[Lease]) -> PaceHistory:
        """Return the same for these runs: the more of them send, the later the rate rises."""
        senders = sum(1 for lease in leases if lease.wants)
        share = Share(of_rate=1.0 / max(1, senders))
        return self._replace(pace=evolve(self.pace, share=share))

    def learned(self) -> Pace:
        """What all of it teaches."""
        pace = self.pace
        for answer in self.answers:
            pace = answer.taught(pace)
        return pace

    def with_these(self, answers: Sequence[PaceEvent], now_s: float) -> PaceHistory:
        """With what one more run tells."""
        pace, recent = self.pace, []
        for answer in sorted((*self.answers, *answers), key=lambda one: one.at_s):
            if answer.at_s < now_s - _SETTLED_S:
                pace = answer.taught(pace)
            else:
                recent.append(answer)
        return PaceHistory(pace, tuple(recent))


class PaceExchange(NamedTuple):
    """What came of an exchange: what all runs have learned, and what each has and wants.

    ``told`` counts the run's own answers in it; ``at_s`` is of a clock that all of them share.
    """

    learned: Pace
    mine: Lease
    others: Sequence[Lease]
    told: int
    at_s: float


class SharedPace:
    """The pace of one run that shares an account, and what the others were not told of it yet."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.elsewhere = 0  # tasks that the others have at the server
        self._untold: list[PaceEvent] = []
        self._told_limit = pace.limit
        self._told_at_s = self._tried_at_s = -math.inf

    def learn(self, answer: PaceEvent) -> None:
        """Go on with what an answer teaches."""
        self.pace = answer.taught(self.pace)
        self._untold.append(answer)

    def untold(self) -> tuple[PaceEvent, ...]:
        """What the others are to be told."""
        return tuple(self._untold)

    def due_s(self, now_s: float) -> float:
        """Seconds until the next exchange."""
        refused = any(answer.name == "refused" for answer in self._untold)
        news = refused or self.pace.limit is not self._told_limit
        waited_for = news and self.pace.share != ALONE
        return max(0.0, self._tried_at_s + (SOON_S if waited_for else _EVERY_S) - now_s)

    def exchanged(self, found: PaceExchange, now_s: float) -> None:
        """Go on with what all have learned, and with this run's share of it."""
        del self._untold[: found.told]
        self._told_limit = found.learned.limit
        self._told_at_s = self._tried_at_s = now_s
        self.elsewhere = sum(lease.in_flight for lease in found.others)
        share = share_of(found.learned, found.mine, found.others, now_s, turn_at(found.at_s))
        own = self.pace
        pace = evolve(found.learned, most=own.most, most_per_s=own.most_per_s, share=share)
        for answer in self._untold:  # what came in the meantime
            pace = answer.taught(pace)
        next_at_s, rate = own.next_at_s, pace.rate_at(now_s)
        if rate is not None and own.rate_at(now_s) is None:
            next_at_s = now_s + share.before / rate  # one after another from the beginning
        self.pace = evolve(pace, next_at_s=next_at_s)

    def missed(self, now_s: float) -> None:
        """Go on without the others once their leases are not known any more."""
        self._tried_at_s = now_s
        if now_s - self._told_at_s > LEASE_S:
            self.pace, self.elsewhere = evolve(self.pace, share=ALONE), 0


# -- shares ---------------------------------------------------------------------------------------


def turn_at(now_s: float) -> int:
    """Whose turn it is, by a clock that all runs share."""
    return math.floor(now_s / _TURN_S)


def share_of(pace: Pace, mine: Lease, others: Sequence[Lease], now_s: float, turn: int) -> Share:
    """What one run has of an account that these runs share."""
    leases = sorted((mine, *others), key=lambda lease: lease.owner)
    begin = turn % len(leases)
    leases = leases[begin:] + leases[:begin]
    at = leases.index(mine)
    before = sum(1 for lease in leases[:at] if lease.wants)
    in_flight = sum(lease.in_flight for lease in others)
    if pace.is_tried:
        elsewhere = in_flight
    else:
        wanted = [lease.in_flight + lease.wants for lease in leases]
        wanted[at] = max(wanted[at], mine.in_flight + 1)
        dealt = _whole(_dealt(math.floor(min(pace.window, sum(wanted))), wanted), turn)
        # A run that holds more than its share gives it back as its tasks end.
        held = [max(dealt[i], lease.in_flight) for i, lease in enumerate(leases)]
        elsewhere = sum(held) - held[at]
    rate = pace.rate_at(now_s)
    sending = [lease.wants / _EVERY_S for lease in others if lease.wants]
    if rate is None:
        of_rate = 1.0 / (1 + len(sending))
    else:
        of_rate = _dealt(rate, [math.inf, *sending])[0] / rate
    return Share(elsewhere, of_rate, before)


def _dealt(whole: float, wanted: Sequence[float]) -> list[float]:
    """Deal out evenly, and what one does not want to the others."""
    dealt = [0.0] * len(wanted)
    for number, at in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        dealt[at] = min(wanted[at], whole / (len(wanted) - number))
        whole -= dealt[at]
    return dealt


def _whole(parts: Sequence[float], turn: int) -> list[int]:
    """Whole numbers of the same sum; which ones are the larger changes with the turn."""
    ends = itertools.accumulate(parts, initial=turn * _TURN % 1.0)
    whole = [math.floor(end + 1e-9) for end in ends]
    return [end - start for start, end in itertools.pairwise(whole)]


# -- what is kept ---------------------------------------------------------------------------------

#: Fields that are a run's own, and those that are times.
_OWN: Final = frozenset({"most", "most_per_s", "share", "next_at_s"})
_TIMES: Final = frozenset(
    {"rate_at_s", "pause_until_s", "row_since_s", "refused_at_s", "slowed_at_s"}
)
#: A bound that binds nothing: what is kept knows no user's.
_NO_BOUND: Final = 1_000_000


def kept_of(told: PaceHistory, now_s: float) -> str:
    """What is kept for the next run; its times are told from now."""
    pace = told.pace
    values: dict[str, Any] = {f.name: getattr(pace, f.name) for f in fields(pace)}
    values = {name: value for name, value in values.items() if name not in _OWN}
    values |= {name: values[name] - now_s for name in _TIMES}
    values["limit"] = pace.limit.value
    values["refusals"] = [one._replace(at_s=one.at_s - now_s) for one in pace.refusals]
    answers = [one._replace(at_s=one.at_s - now_s) for one in told.answers]
    return json.dumps({"pace": values, "answers": answers})


def told_of(kept: str, age_s: float, now_s: float) -> PaceHistory:
    """What was kept ``age_s`` ago; nothing where that is not there, or not to be believed."""
    nothing = PaceHistory(Pace(_NO_BOUND), ())
    if not kept or not 0.0 <= age_s <= _KNOWN_S:
        return nothing
    then_s = now_s - age_s
    try:
        found = json.loads(kept)
        values = found["pace"]
        values |= {name: values[name] + then_s for name in _TIMES}
        values["limit"] = Limit(values["limit"])
        values["cuts"] = tuple(values["cuts"])
        values["refusals"] = tuple(
            RateLimitHit(at_s + then_s, taken, paused_s)
            for at_s, taken, paused_s in values["refusals"]
        )
        pace = Pace(most=_NO_BOUND, **values)
        answers = tuple(
            PaceEvent(at_s + then_s, name, sent_s, InWork(*in_work), *rest)
            for at_s, name, sent_s, in_work, *rest in found["answers"]
        )
    except (ValueError, TypeError, KeyError):
        return nothing
    if age_s > LEASE_S:
        # Nobody sent anything since: that nothing was refused says nothing of the limits.
        pace = PaceHistory(pace, answers).learned()
        return PaceHistory(evolve(pace, rate_at_s=pace.rate_at_s + age_s, refusals=()), ())
    return PaceHistory(pace, answers)

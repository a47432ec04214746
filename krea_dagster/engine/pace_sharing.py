"""How the runs of one journal share an account: what they have learned, and what each may send.

Pure, given seconds. Every run keeps a lease in the journal: how many tasks it has at the server,
and how many more it wants. Twice a second it writes the server's answers, reads those of the other
runs, and reads their leases. The window and the rate are divided evenly among the runs that want
some; what one does not want, the others have.

Runs that do not share a journal share the account by feedback alone (``pace.py``).
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

#: Seconds between two exchanges, and the least if other runs wait for what was learned.
_EVERY_S: Final = 0.5
SOON_S: Final = 0.25
#: Seconds after which a lease that was not renewed expires.
LEASE_S: Final = 5.0
#: Seconds after which every run has written its answers.
_SETTLED_S: Final = 2.5
#: Seconds for which a stored pace is used while no run sends anything.
_KNOWN_S: Final = 300.0
#: Seconds after which the places that do not divide evenly go to the next runs, and by how much
#: further: the fractional parts of multiples of the golden ratio are spread most evenly.
_TURN_S: Final = 5.0
_TURN: Final = 0.618034


class PaceEvent(NamedTuple):
    """An answer of the server, with the name of the Pace's method that learns from it.

    ``sent_s`` is how long before ``at_s`` it was sent; ``in_work`` the tasks at the server then.
    """

    at_s: float
    name: str
    sent_s: float = 0.0
    in_work: InWork = InWork(0, 0.0, 0.0)
    wait_s: float = 0.0
    pressed: bool = False
    median_s: float = 0.0
    best_s: float = 0.0

    def applied_to(self, pace: Pace) -> Pace:
        """Return the pace after this event."""
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
    """How many tasks a run has at the server, and how many more it would send now."""

    owner: str
    in_flight: int
    wants: int


class PaceHistory(NamedTuple):
    """The shared pace of ``_SETTLED_S`` ago, and every event since.

    Events arrive late and in no order. Applied in the order of their times, they give the pace that
    one run would have learned.
    """

    pace: Pace
    events: tuple[PaceEvent, ...]

    def among(self, leases: Sequence[Lease]) -> PaceHistory:
        """Return the history for these runs: the more of them send, the later the rate rises."""
        senders = sum(1 for lease in leases if lease.wants)
        share = Share(of_rate=1.0 / max(1, senders))
        return self._replace(pace=evolve(self.pace, share=share))

    def learned(self) -> Pace:
        """Return the pace after all events."""
        pace = self.pace
        for event in self.events:
            pace = event.applied_to(pace)
        return pace

    def with_events(self, events: Sequence[PaceEvent], now_s: float) -> PaceHistory:
        """Return the history with the events of one more run."""
        pace, recent = self.pace, []
        for event in sorted((*self.events, *events), key=lambda one: one.at_s):
            if event.at_s < now_s - _SETTLED_S:
                pace = event.applied_to(pace)
            else:
                recent.append(event)
        return PaceHistory(pace, tuple(recent))


class PaceExchange(NamedTuple):
    """The result of an exchange: the pace of all runs, and their leases.

    ``told`` counts the run's own events in it; ``at_s`` is of a clock that all of them share.
    """

    learned: Pace
    mine: Lease
    others: Sequence[Lease]
    told: int
    at_s: float


class SharedPace:
    """The pace of one run that shares an account, and its events that it has not written yet."""

    def __init__(self, pace: Pace) -> None:
        self.pace = pace
        self.elsewhere = 0  # tasks that the other runs have at the server
        self._untold: list[PaceEvent] = []
        self._told_limit = pace.limit
        self._told_at_s = self._tried_at_s = -math.inf

    def learn(self, event: PaceEvent) -> None:
        """Apply an event."""
        self.pace = event.applied_to(self.pace)
        self._untold.append(event)

    def untold(self) -> tuple[PaceEvent, ...]:
        """Return the events to write."""
        return tuple(self._untold)

    def due_s(self, now_s: float) -> float:
        """Return the seconds until the next exchange."""
        refused = any(event.name == "refused" for event in self._untold)
        news = refused or self.pace.limit is not self._told_limit
        waited_for = news and self.pace.share != ALONE
        return max(0.0, self._tried_at_s + (SOON_S if waited_for else _EVERY_S) - now_s)

    def exchanged(self, found: PaceExchange, now_s: float) -> None:
        """Use the pace of all runs, and this run's share of it."""
        del self._untold[: found.told]
        self._told_limit = found.learned.limit
        self._told_at_s = self._tried_at_s = now_s
        self.elsewhere = sum(lease.in_flight for lease in found.others)
        share = share_of(found.learned, found.mine, found.others, now_s, turn_at(found.at_s))
        own = self.pace
        pace = evolve(found.learned, most=own.most, most_per_s=own.most_per_s, share=share)
        for event in self._untold:  # those of the meantime
            pace = event.applied_to(pace)
        next_at_s, rate = own.next_at_s, pace.rate_at(now_s)
        if rate is not None and own.rate_at(now_s) is None:
            next_at_s = now_s + share.before / rate  # one run after another from the start
        self.pace = evolve(pace, next_at_s=next_at_s)

    def missed(self, now_s: float) -> None:
        """Note a failed exchange, and go on alone once the leases have expired."""
        self._tried_at_s = now_s
        if now_s - self._told_at_s > LEASE_S:
            self.pace, self.elsewhere = evolve(self.pace, share=ALONE), 0


# -- shares ---------------------------------------------------------------------------------------


def turn_at(now_s: float) -> int:
    """Return whose turn it is, by a clock that all runs share."""
    return math.floor(now_s / _TURN_S)


def share_of(pace: Pace, mine: Lease, others: Sequence[Lease], now_s: float, turn: int) -> Share:
    """Return the share of one run in an account."""
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
    """Divide evenly; what one does not want, the others have."""
    dealt = [0.0] * len(wanted)
    for number, at in enumerate(sorted(range(len(wanted)), key=wanted.__getitem__)):
        dealt[at] = min(wanted[at], whole / (len(wanted) - number))
        whole -= dealt[at]
    return dealt


def _whole(parts: Sequence[float], turn: int) -> list[int]:
    """Round to integers of the same sum; the turn decides which are rounded up."""
    ends = itertools.accumulate(parts, initial=turn * _TURN % 1.0)
    whole = [math.floor(end + 1e-9) for end in ends]
    return [end - start for start, end in itertools.pairwise(whole)]


# -- in the journal -------------------------------------------------------------------------------

#: Fields of a single run, and those that are times.
_OWN: Final = frozenset({"most", "most_per_s", "share", "next_at_s"})
_TIMES: Final = frozenset(
    {"rate_at_s", "pause_until_s", "row_since_s", "refused_at_s", "slowed_at_s"}
)
#: No bound: the stored pace does not contain a user's.
_NO_BOUND: Final = 1_000_000


def dump_history(history: PaceHistory, now_s: float) -> str:
    """Return a history as JSON, with times relative to now."""
    pace = history.pace
    values: dict[str, Any] = {f.name: getattr(pace, f.name) for f in fields(pace)}
    values = {name: value for name, value in values.items() if name not in _OWN}
    values |= {name: values[name] - now_s for name in _TIMES}
    values["limit"] = pace.limit.value
    values["refusals"] = [one._replace(at_s=one.at_s - now_s) for one in pace.refusals]
    events = [one._replace(at_s=one.at_s - now_s) for one in history.events]
    return json.dumps({"pace": values, "answers": events})


def load_history(text: str, age_s: float, now_s: float) -> PaceHistory:
    """Return the history of ``age_s`` ago; an empty one if it is missing, invalid or too old."""
    nothing = PaceHistory(Pace(_NO_BOUND), ())
    if not text or not 0.0 <= age_s <= _KNOWN_S:
        return nothing
    then_s = now_s - age_s
    try:
        found = json.loads(text)
        values = found["pace"]
        values |= {name: values[name] + then_s for name in _TIMES}
        values["limit"] = Limit(values["limit"])
        values["cuts"] = tuple(values["cuts"])
        values["refusals"] = tuple(
            RateLimitHit(at_s + then_s, taken, paused_s)
            for at_s, taken, paused_s in values["refusals"]
        )
        pace = Pace(most=_NO_BOUND, **values)
        events = tuple(
            PaceEvent(at_s + then_s, name, sent_s, InWork(*in_work), *rest)
            for at_s, name, sent_s, in_work, *rest in found["answers"]
        )
    except (ValueError, TypeError, KeyError):
        return nothing
    if age_s > LEASE_S:
        # No run sent anything since, so the lack of refusals shows nothing of the limits.
        pace = PaceHistory(pace, events).learned()
        return PaceHistory(evolve(pace, rate_at_s=pace.rate_at_s + age_s, refusals=()), ())
    return PaceHistory(pace, events)

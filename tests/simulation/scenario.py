"""A scenario: the rows, the server, and all events, drawn from a seed.

A scenario is plain data, so that a failing one can be shortened by leaving parts out.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final, Literal, TypeAlias

from krea_dagster.emulator.faults import FAULTS, FORGERIES, Fault

HOUR_S: Final = 3600.0

#: What can be away, and how.
HOW_AWAY: Final[dict[str, tuple[str, ...]]] = {
    "api": ("refuses", "is silent", "loses its answers", "answers 502"),
    "files": ("refuses", "is silent", "answers 502"),
    "journal": ("is locked", "does not answer", "loses its answers", "is full"),
    "store": ("is gone", "is full"),
    "receiver": ("is down",),
}

#: Faults that are not drawn: one costs 64 MB each time, the other two are of an API that this
#: client does not use.
_LEFT_OUT: Final = ("endless", "list_", "no_list")


@dataclass(frozen=True)
class Row:
    """A row of the prompt table. Without a seed, another image may be requested."""

    prompt: str
    seed: int | None = None
    quality: str = "1K"

    def __str__(self) -> str:
        seed = "" if self.seed is None else f", seed {self.seed}"
        return f"{self.prompt!r} ({self.quality}{seed})"


@dataclass(frozen=True)
class Server:
    """The server without faults."""

    honours_keys: bool = True
    has_batch: bool = True
    latency_s: float = 8.0
    latency_jitter: float = 0.3
    max_concurrent: int | None = None
    rate: float | None = None
    link_lifetime_s: float = 24 * HOUR_S
    task_lifetime_s: float | None = None
    images_paid: int | None = None
    line_s: float = 0.05

    def __str__(self) -> str:
        keys = "honours" if self.honours_keys else "ignores"
        said = [
            f"{keys} Idempotency-Keys",
            "has the batch endpoint" if self.has_batch else "has no batch endpoint",
            f"takes {self.latency_s:g} s ± {self.latency_jitter:.0%} an image",
            f"is {self.line_s:g} s away",
        ]
        if self.max_concurrent is not None:
            said.append(f"takes {self.max_concurrent} tasks at a time")
        if self.rate is not None:
            said.append(f"takes {self.rate:g} orders a second")
        if self.link_lifetime_s < 24 * HOUR_S:
            said.append(f"has links that live {self.link_lifetime_s:g} s")
        if self.task_lifetime_s is not None:
            said.append(f"forgets a task after {self.task_lifetime_s:g} s")
        if self.images_paid is not None:
            said.append(f"has credits for {self.images_paid} images")
        return ", ".join(said)


@dataclass(frozen=True)
class Run:
    """A process that runs, on a host whose clock is ahead.

    It starts ``at_s`` after the start, or after the end of the run ``after``. ``again`` are rows of
    which another image is requested. ``kind`` "salvage" buys nothing.
    """

    number: int
    rows: tuple[int, ...]
    at_s: float = 0.0
    after: int | None = None
    ahead_s: float = 0.0
    on_unknown: Literal["replay", "hold"] = "replay"
    again: tuple[int, ...] = ()
    wait: bool = True
    cap_images: int | None = None
    max_in_flight: int = 16
    max_per_s: float | None = None
    called: bool = False
    kind: Literal["run", "salvage"] = "run"
    patience_s: float = 600.0

    def __str__(self) -> str:
        when = f"{self.at_s:.1f} s after " + (
            "the beginning" if self.after is None else f"the end of run {self.after}"
        )
        if self.kind == "salvage":
            said = [f"{when}, run {self.number} collects what is paid"]
        else:
            said = [f"{when}, run {self.number} wants the rows {list(self.rows)}"]
        if self.again:
            said.append(f"other images of the rows {list(self.again)}")
        if self.ahead_s:
            said.append(f"its clock is {self.ahead_s:+g} s ahead")
        if self.on_unknown == "hold":
            said.append("it holds unknown outcomes")
        if not self.wait:
            said.append("it does not wait")
        if self.cap_images is not None:
            said.append(f"its cap is {self.cap_images} images")
        if self.called:
            said.append("it is called back")
        if self.max_per_s is not None:
            said.append(f"at most {self.max_per_s:g} a second")
        return f"{', '.join(said)}; {self.max_in_flight} at once, patience {self.patience_s:g} s"


@dataclass(frozen=True)
class Kill:
    """A run's process is killed at its n-th call of the world, before or after it was made."""

    run: int
    call: int
    when: Literal["before", "after"]

    def __str__(self) -> str:
        return f"run {self.run} is killed {self.when} its call {self.call}"


@dataclass(frozen=True)
class Stop:
    """A run is told to stop, a number of seconds after it has begun."""

    run: int
    after_s: float

    def __str__(self) -> str:
        return f"run {self.run} is told to stop after {self.after_s:.1f} s"


@dataclass(frozen=True)
class ClockStep:
    """The clock of a run's host is set, a number of seconds after it has begun."""

    run: int
    after_s: float
    by_s: float

    def __str__(self) -> str:
        return f"the clock of run {self.run} is set by {self.by_s:+g} s after {self.after_s:.1f} s"


@dataclass(frozen=True)
class ScriptedFault:
    """The next ``n`` requests of a kind meet a fault, from ``at_s`` on."""

    at_s: float
    fault: str
    n: int = 1
    arg: str | None = None

    def __str__(self) -> str:
        arg = "" if self.arg is None else f" {self.arg}"
        return f"from {self.at_s:.1f} s on, {self.n} × {self.fault}{arg}"


@dataclass(frozen=True)
class FaultRate:
    """A share of the requests of a kind meets a fault, in the whole scenario."""

    fault: str
    share: float

    def __str__(self) -> str:
        return f"{self.share:.0%} of all requests of its kind: {self.fault}"


@dataclass(frozen=True)
class Outage:
    """A part of the world is away for some time."""

    what: str
    how: str
    at_s: float
    for_s: float

    def __str__(self) -> str:
        return f"from {self.at_s:.1f} s on, the {self.what} {self.how} for {self.for_s:.1f} s"


@dataclass(frozen=True)
class TopUp:
    """The account gets credits."""

    at_s: float

    def __str__(self) -> str:
        return f"at {self.at_s:.1f} s, the account is topped up"


@dataclass(frozen=True)
class ForgedCallback:
    """A stranger calls about one row's request, and names another row's task."""

    at_s: float
    about: int
    names: int

    def __str__(self) -> str:
        return (
            f"at {self.at_s:.1f} s, a stranger calls about row {self.about} and names the task of "
            f"row {self.names}"
        )


ScenarioEvent: TypeAlias = (
    Run | Kill | Stop | ClockStep | ScriptedFault | FaultRate | Outage | TopUp | ForgedCallback
)


@dataclass(frozen=True)
class Scenario:
    """The rows, the server, and the events."""

    seed: int
    rows: tuple[Row, ...]
    server: Server
    events: tuple[ScenarioEvent, ...]

    def __str__(self) -> str:
        lines = [f"The server {self.server}."]
        lines += [f"Row {number}: {row}" for number, row in enumerate(self.rows)]
        lines += [f"- {event}" for event in self.events]
        return "\n".join(lines)

    @property
    def runs(self) -> Sequence[Run]:
        """The runs, in the order of their numbers."""
        return [one for one in self.events if isinstance(one, Run)]

    def has(self, kind: type[ScenarioEvent], **fields: object) -> bool:
        """Whether there is an event of a kind with these fields."""
        return any(
            isinstance(one, kind) and all(getattr(one, k) == v for k, v in fields.items())
            for one in self.events
        )

    def has_fault(self, *names: str) -> bool:
        """Whether one of these faults may strike."""
        return any(
            isinstance(one, ScriptedFault | FaultRate) and one.fault in names for one in self.events
        )


def _faults(kind: str) -> list[Fault]:
    return [
        fault
        for fault in FAULTS.values()
        if fault.kind == kind and not fault.name.startswith(_LEFT_OUT)
    ]


_BY_KIND: Final = {
    kind: _faults(kind)
    for kind in ("create", "task", "read", "batch", "credits", "file", "callback")
}

#: The most expensive faults if handled wrongly, which are drawn more often.
_WORST: Final = {
    "create": (
        "drop_after_create",
        "502_html_after_create",
        "delay_create",
        "paid_outcome_unknown",
        "no_id",
        "429_no_retry_after",
    ),
    "batch": ("no_batch", "batch_failed"),
}

#: How far the clock of a host may be off.
_AHEAD_S: Final = (-25 * HOUR_S, -400.0, -100.0, -2.0, 2.0, 100.0, 400.0, 25 * HOUR_S)

#: How often each kind of thing is part of a scenario, out of 100.
_THEMES: Final[tuple[tuple[str, int], ...]] = (
    ("create", 30),
    ("task", 25),
    ("questions", 25),
    ("files", 20),
    ("rates", 12),
    ("away", 25),
    ("kills", 45),
    ("stops", 12),
    ("clocks", 15),
    ("forged", 6),
    ("credits", 8),
)


def draw(seed: int) -> Scenario:
    """Draw the scenario of a seed."""
    chance = random.Random(f"scenario {seed}")
    rows = _rows(chance)
    runs, called = _runs(chance, len(rows))
    events: list[ScenarioEvent] = [*runs]
    server = _server(chance)
    for theme, percent in _THEMES:
        if chance.random() * 100 < percent:
            events += _MAKERS[theme](chance, runs, len(rows))
    if called and chance.random() < 0.5:
        events += [_strike(chance, "callback") for _ in range(chance.randint(1, 3))]
    if any(isinstance(one, ForgedCallback) for one in events):
        events = _in_doubt(chance, events)
    if any(isinstance(one, TopUp) for one in events):
        server = replace(server, images_paid=chance.randint(0, len(rows)))
    return Scenario(seed, rows, server, tuple(events))


def _in_doubt(chance: random.Random, events: Sequence[ScenarioEvent]) -> list[ScenarioEvent]:
    """Return events that leave outcomes unknown, a forged callback, and a run that finds both."""
    runs = [replace(one, on_unknown="hold") for one in events if isinstance(one, Run)]
    others = [one for one in events if not isinstance(one, Run)]
    lost = chance.choice(("drop_after_create", "reset_after_create", "500_after_create", "no_id"))
    last = runs[-1].number
    later = replace(runs[0], number=last + 1, after=last, at_s=chance.uniform(0, 60))
    return [*runs, later, ScriptedFault(0.0, lost, chance.choice((1, 2, 6))), *others]


def _rows(chance: random.Random) -> tuple[Row, ...]:
    rows: list[Row] = []
    for number in range(chance.choice((1, 2, 2, 3, 3, 4, 5, 6, 8))):
        if rows and chance.random() < 0.1:
            rows.append(chance.choice(rows))
            continue
        seed = chance.randint(1, 9999) if chance.random() < 0.4 else None
        rows.append(Row(f"image {number}", seed, "2K" if chance.random() < 0.1 else "1K"))
    return tuple(rows)


def _server(chance: random.Random) -> Server:
    return Server(
        honours_keys=chance.random() < 0.7,
        has_batch=chance.random() < 0.8,
        latency_s=chance.choice((0.3, 2.0, 4.0, 8.0, 20.0)),
        latency_jitter=chance.choice((0.0, 0.3, 0.9)),
        max_concurrent=chance.choice((None, None, None, None, 1, 2, 4)),
        rate=chance.choice((None, None, None, None, 0.5, 2.0)),
        link_lifetime_s=chance.choice((24 * HOUR_S,) * 5 + (20.0, 300.0)),
        task_lifetime_s=HOUR_S if chance.random() < 0.05 else None,
        line_s=chance.choice((0.02, 0.05, 0.05, 0.5)),
    )


def _runs(chance: random.Random, rows: int) -> tuple[list[Run], bool]:
    everything = tuple(range(rows))
    hold: Literal["replay", "hold"] = "hold" if chance.random() < 0.35 else "replay"
    called = chance.random() < 0.25
    wished = chance.random() < 0.25
    runs: list[Run] = []
    for number in range(1, chance.choice((1, 1, 2, 2, 3)) + 1):
        part = everything
        if rows > 1 and chance.random() < 0.3:
            part = tuple(sorted(chance.sample(everything, chance.randint(1, rows))))
        again: tuple[int, ...] = ()
        if wished and chance.random() < 0.8:
            again = tuple(sorted(chance.sample(part, min(len(part), chance.choice((1, 1, 2))))))
        follows = bool(runs) and chance.random() < 0.5
        runs.append(
            Run(
                number,
                part,
                at_s=0.0
                if not runs and chance.random() < 0.5
                else chance.choice((0.0, chance.uniform(0, 5), chance.uniform(0, 120))),
                after=number - 1 if follows else None,
                ahead_s=chance.choice(_AHEAD_S) if chance.random() < 0.25 else 0.0,
                on_unknown=hold,
                again=again,
                wait=chance.random() < 0.9,
                cap_images=chance.randint(0, rows) if chance.random() < 0.1 else None,
                max_in_flight=chance.choice((1, 2, 4, 16, 16)),
                max_per_s=chance.choice((None, None, None, 0.5, 3.0)),
                called=called,
                kind="salvage" if runs and chance.random() < 0.1 else "run",
                patience_s=chance.choice((60.0, 200.0, 600.0)),
            )
        )
    return runs, called


def _when_s(chance: random.Random) -> float:
    return chance.choice((0.0, chance.uniform(0, 3), chance.uniform(0, 30), chance.uniform(0, 200)))


def _arg(chance: random.Random, fault: Fault) -> str | None:
    match fault.effect:
        case "delay" | "undecided":
            return chance.choice((None, "2", "65", "200"))
        case "slow":
            return chance.choice(("5", "100", "1000", "5000"))
        case "no_results":
            return chance.choice(("1", "2", "3"))
        case "too_busy" | "too_busy_date":
            return chance.choice(("1", "7", "90"))
        case "price":
            return chance.choice(("0.1", "0.5", "1", "3"))
        case "call_late":
            return chance.choice(("5", "100"))
        case "call_forged":
            return chance.choice(FORGERIES)
        case "fail":
            return chance.choice(
                (None, "service_error", "resource_exhausted", "content_policy_violation")
            )
    return None


def _strike(chance: random.Random, kind: str) -> ScriptedFault:
    fault = chance.choice(_BY_KIND[kind])
    if kind in _WORST and chance.random() < 0.4:
        fault = FAULTS[chance.choice(_WORST[kind])]
    n = chance.choice((1, 1, 1, 2, 3, 6, 15))
    return ScriptedFault(_when_s(chance), fault.name, n, _arg(chance, fault))


def _strikes(*kinds: str) -> Callable[[random.Random, Sequence[Run], int], list[ScenarioEvent]]:
    def make(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
        return [_strike(chance, chance.choice(kinds)) for _ in range(chance.choice((1, 1, 2, 3)))]

    return make


def _rates(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    kinds = [chance.choice(list(_BY_KIND)) for _ in range(chance.choice((1, 1, 2)))]
    return [
        FaultRate(chance.choice(_BY_KIND[kind]).name, chance.choice((0.1, 0.3, 0.7)))
        for kind in kinds
    ]


def _aways(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    what = [chance.choice(list(HOW_AWAY)) for _ in range(chance.choice((1, 1, 2)))]
    return [
        Outage(
            one,
            chance.choice(HOW_AWAY[one]),
            _when_s(chance),
            chance.choice((0.5, 5.0, 30.0, 100.0, 900.0)),
        )
        for one in what
    ]


def _kills(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    chosen = chance.sample(list(runs), chance.randint(1, len(runs)))
    return [
        Kill(
            run.number,
            chance.choice((chance.randint(1, 20), chance.randint(1, 20 + 12 * rows))),
            chance.choice(("before", "after")),
        )
        for run in chosen
    ]


def _stops(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    after_s = chance.choice((0.0, chance.uniform(0, 2), chance.uniform(0, 40)))
    return [Stop(chance.choice(runs).number, after_s)]


def _clocks(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    by_s = chance.choice((-1.0, 1.0)) * chance.choice((3.0, 100.0, 400.0, 25 * HOUR_S))
    after_s = chance.choice((0.0, chance.uniform(0, 2), chance.uniform(0, 40)))
    return [ClockStep(chance.choice(runs).number, after_s, by_s)]


def _forged(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    names = chance.randrange(rows)
    about = [names, *(chance.randrange(rows) for _ in range(chance.choice((1, 2))))]
    return [ForgedCallback(chance.uniform(2, 40), one, names) for one in about]


def _credits(chance: random.Random, runs: Sequence[Run], rows: int) -> list[ScenarioEvent]:
    return [TopUp(chance.uniform(1, 100))]


_MAKERS: Final[dict[str, Callable[[random.Random, Sequence[Run], int], list[ScenarioEvent]]]] = {
    "create": _strikes("create"),
    "task": _strikes("task"),
    "questions": _strikes("read", "batch", "batch", "credits"),
    "files": _strikes("file"),
    "rates": _rates,
    "away": _aways,
    "kills": _kills,
    "stops": _stops,
    "clocks": _clocks,
    "forged": _forged,
    "credits": _credits,
}

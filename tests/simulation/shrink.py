"""Makes a failing scenario as short as possible, as long as the same failure remains."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import fields, replace

from tests.simulation.play import ScenarioResult, play
from tests.simulation.scenario import (
    ClockStep,
    FaultRate,
    ForgedCallback,
    Kill,
    Row,
    Run,
    Scenario,
    ScenarioEvent,
    ScriptedFault,
    Server,
    Stop,
)


def shrink(result: ScenarioResult, *, within_s: float = 90.0) -> ScenarioResult:
    """Return the shortest scenario with the same failure that was found within a time."""
    like = _kind(result)
    until_s = time.monotonic() + within_s
    shorter = True
    while shorter:
        shorter = False
        for scenario in _shorter(result.scenario):
            if time.monotonic() > until_s:
                return result
            found = play(scenario)
            if found.failures and _kind(found) == like:
                result, shorter = found, True
                break
    return result


def _kind(result: ScenarioResult) -> str:
    """Return a failure's text without its numbers and names."""
    return re.sub(r"'[^']*'|[0-9a-f]{6,}|task-[\w-]+|\d+", "#", result.failures[0])[:60]


def _shorter(scenario: Scenario) -> Iterator[Scenario]:  # noqa: C901 - one after the other
    events = scenario.events
    for half in _halves(events):
        yield replace(scenario, events=_whole(half))
    for one in events:
        if not isinstance(one, Run):
            yield replace(scenario, events=tuple(each for each in events if each is not one))
    for run in scenario.runs:
        if len(scenario.runs) > 1:
            yield replace(scenario, events=_without_run(events, run.number))
    for number in range(len(scenario.rows)):
        if len(scenario.rows) > 1:
            yield _without_row(scenario, number)
    yield from (replace(scenario, server=server) for server in _plainer(scenario.server, Server()))
    for place, one in enumerate(events):
        for plainer in _plainer_decision(one):
            yield replace(scenario, events=(*events[:place], plainer, *events[place + 1 :]))
    for number, row in enumerate(scenario.rows):
        if row.quality != "1K":
            rows = list(scenario.rows)
            rows[number] = replace(row, quality="1K")
            yield replace(scenario, rows=tuple(rows))


def _halves(events: tuple[ScenarioEvent, ...]) -> Iterator[tuple[ScenarioEvent, ...]]:
    others = [one for one in events if not isinstance(one, Run)]
    if len(others) > 3:
        runs = tuple(one for one in events if isinstance(one, Run))
        middle = len(others) // 2
        yield (*runs, *others[:middle])
        yield (*runs, *others[middle:])


def _whole(events: tuple[ScenarioEvent, ...]) -> tuple[ScenarioEvent, ...]:
    """Drop the events of runs that are left out."""
    runs = {one.number for one in events if isinstance(one, Run)}
    return tuple(
        one for one in events if not isinstance(one, Kill | Stop | ClockStep) or one.run in runs
    )


def _without_run(events: tuple[ScenarioEvent, ...], number: int) -> tuple[ScenarioEvent, ...]:
    return _whole(
        tuple(
            replace(one, after=None) if isinstance(one, Run) and one.after == number else one
            for one in events
            if not (isinstance(one, Run) and one.number == number)
        )
    )


def _without_row(scenario: Scenario, gone: int) -> Scenario:
    def places(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - (n > gone) for n in numbers if n != gone)

    def without(one: ScenarioEvent) -> ScenarioEvent | None:
        if isinstance(one, Run):
            return replace(one, rows=places(one.rows), again=places(one.again))
        if isinstance(one, ForgedCallback):
            if gone in (one.about, one.names):
                return None
            about, names = places((one.about, one.names))
            return replace(one, about=about, names=names)
        return one

    rows: tuple[Row, ...] = tuple(row for n, row in enumerate(scenario.rows) if n != gone)
    events = tuple(one for each in scenario.events if (one := without(each)) is not None)
    return replace(scenario, rows=rows, events=events)


def _plainer(server: Server, plain: Server) -> Iterator[Server]:
    for field in fields(server):
        if getattr(server, field.name) != getattr(plain, field.name):
            yield replace(server, **{field.name: getattr(plain, field.name)})


def _plainer_decision(one: ScenarioEvent) -> Iterator[ScenarioEvent]:
    match one:
        case Run():
            plain = Run(one.number, one.rows)
            for field in fields(one):
                if getattr(one, field.name) != getattr(plain, field.name):
                    yield replace(one, **{field.name: getattr(plain, field.name)})
        case ScriptedFault():
            if one.n > 1:
                yield replace(one, n=1)
            if one.at_s:
                yield replace(one, at_s=0.0)
            if one.arg is not None:
                yield replace(one, arg=None)
        case FaultRate() if one.share < 1:
            yield replace(one, share=1.0)

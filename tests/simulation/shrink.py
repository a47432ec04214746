"""Makes a failing story as short as possible: leaves parts out while the same failure remains."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from dataclasses import fields, replace

from tests.simulation.play import StoryResult, play
from tests.simulation.story import (
    Decision,
    ForgedCall,
    Kill,
    Rate,
    Row,
    Run,
    Server,
    Step,
    Stop,
    Story,
    Strike,
)


def shrink(told: StoryResult, *, within_s: float = 90.0) -> StoryResult:
    """Return the shortest story with the same failure that was found within a time."""
    like = _kind(told)
    until_s = time.monotonic() + within_s
    shorter = True
    while shorter:
        shorter = False
        for story in _shorter(told.story):
            if time.monotonic() > until_s:
                return told
            found = play(story)
            if found.failures and _kind(found) == like:
                told, shorter = found, True
                break
    return told


def _kind(told: StoryResult) -> str:
    """What a failure says, without its numbers and names."""
    return re.sub(r"'[^']*'|[0-9a-f]{6,}|task-[\w-]+|\d+", "#", told.failures[0])[:60]


def _shorter(story: Story) -> Iterator[Story]:  # noqa: C901 - one after the other
    decisions = story.decisions
    for half in _halves(decisions):
        yield replace(story, decisions=_whole(half))
    for one in decisions:
        if not isinstance(one, Run):
            yield replace(story, decisions=tuple(each for each in decisions if each is not one))
    for run in story.runs:
        if len(story.runs) > 1:
            yield replace(story, decisions=_without_run(decisions, run.number))
    for number in range(len(story.rows)):
        if len(story.rows) > 1:
            yield _without_row(story, number)
    yield from (replace(story, server=server) for server in _plainer(story.server, Server()))
    for place, one in enumerate(decisions):
        for plainer in _plainer_decision(one):
            yield replace(story, decisions=(*decisions[:place], plainer, *decisions[place + 1 :]))
    for number, row in enumerate(story.rows):
        if row.quality != "1K":
            rows = list(story.rows)
            rows[number] = replace(row, quality="1K")
            yield replace(story, rows=tuple(rows))


def _halves(decisions: tuple[Decision, ...]) -> Iterator[tuple[Decision, ...]]:
    others = [one for one in decisions if not isinstance(one, Run)]
    if len(others) > 3:
        runs = tuple(one for one in decisions if isinstance(one, Run))
        middle = len(others) // 2
        yield (*runs, *others[:middle])
        yield (*runs, *others[middle:])


def _whole(decisions: tuple[Decision, ...]) -> tuple[Decision, ...]:
    """Leave out what is about a run that is not there."""
    runs = {one.number for one in decisions if isinstance(one, Run)}
    return tuple(
        one for one in decisions if not isinstance(one, Kill | Stop | Step) or one.run in runs
    )


def _without_run(decisions: tuple[Decision, ...], number: int) -> tuple[Decision, ...]:
    return _whole(
        tuple(
            replace(one, after=None) if isinstance(one, Run) and one.after == number else one
            for one in decisions
            if not (isinstance(one, Run) and one.number == number)
        )
    )


def _without_row(story: Story, gone: int) -> Story:
    def places(numbers: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(n - (n > gone) for n in numbers if n != gone)

    def without(one: Decision) -> Decision | None:
        if isinstance(one, Run):
            return replace(one, rows=places(one.rows), again=places(one.again))
        if isinstance(one, ForgedCall):
            if gone in (one.about, one.names):
                return None
            about, names = places((one.about, one.names))
            return replace(one, about=about, names=names)
        return one

    rows: tuple[Row, ...] = tuple(row for n, row in enumerate(story.rows) if n != gone)
    decisions = tuple(one for each in story.decisions if (one := without(each)) is not None)
    return replace(story, rows=rows, decisions=decisions)


def _plainer(server: Server, plain: Server) -> Iterator[Server]:
    for field in fields(server):
        if getattr(server, field.name) != getattr(plain, field.name):
            yield replace(server, **{field.name: getattr(plain, field.name)})


def _plainer_decision(one: Decision) -> Iterator[Decision]:
    match one:
        case Run():
            plain = Run(one.number, one.rows)
            for field in fields(one):
                if getattr(one, field.name) != getattr(plain, field.name):
                    yield replace(one, **{field.name: getattr(plain, field.name)})
        case Strike():
            if one.n > 1:
                yield replace(one, n=1)
            if one.at_s:
                yield replace(one, at_s=0.0)
            if one.arg is not None:
                yield replace(one, arg=None)
        case Rate() if one.share < 1:
            yield replace(one, share=1.0)

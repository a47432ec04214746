"""When images that are paid for and were not collected are salvaged."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone
from itertools import pairwise

from krea_dagster.application.salvage_schedule import AGES, due, past_last_age
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from tests.engine.harness import make_request

NOW = datetime(2026, 11, 2, 12, 0, tzinfo=timezone.utc)


EVER = datetime(1970, 1, 1, tzinfo=timezone.utc)


TICK = timedelta(minutes=5)


HOUR = timedelta(hours=1)


def left(age: timedelta, seed: int = 1) -> Record:
    return Record(make_request(seed=seed), State.SUBMITTED, "p", submitted_at=NOW - age)


def runs(until: timedelta, *, start: timedelta = timedelta(0)) -> list[timedelta]:
    """The ages at which ticks every five minutes start a salvage of one task that never ends."""
    task, since, found, age = left(timedelta(0)), EVER, [], start
    while age <= until:
        if due([task], since, NOW + age):
            found.append(age)
            since = NOW + age
        age += TICK
    return found


def test_an_image_is_salvaged_immediately() -> None:
    assert due([left(timedelta(0))], EVER, NOW)
    assert due([left(timedelta(minutes=1))], NOW - TICK, NOW), "since the last salvage"


def test_a_task_that_does_not_end_is_salvaged_at_growing_pauses_and_then_no_more() -> None:
    day = runs(24 * HOUR)
    assert len(day) == 16, "there are 288 ticks in a day"
    pauses = [after - before for before, after in pairwise(day)]
    assert pauses[0] == TICK
    assert max(pauses) <= 4 * HOUR + TICK
    assert len(runs(30 * 24 * HOUR)) == len(AGES), "not for ever"
    assert runs(30 * 24 * HOUR)[-1] == 48 * HOUR


def test_pauses_are_shorter_than_a_link_lives() -> None:
    assert all(after - before <= 4 * HOUR for before, after in pairwise(AGES))


def test_each_task_is_salvaged_by_its_own_age() -> None:
    old, new = left(10 * HOUR, 1), left(timedelta(0), 2)
    assert due([old, new], NOW - TICK, NOW) == [new]


def test_an_old_task_is_salvaged_once_after_the_daemon_was_down() -> None:
    assert due([left(99 * 24 * HOUR)], EVER, NOW)
    assert not due([left(99 * 24 * HOUR)], NOW - TICK, NOW)
    assert due([left(49 * HOUR)], NOW - 3 * HOUR, NOW), "the daemon was down at its last look"


def test_with_collect_later_young_tasks_are_left_to_the_runs() -> None:
    assert not due([left(HOUR - TICK)], EVER, NOW, first=HOUR)
    assert due([left(HOUR)], NOW - TICK, NOW, first=HOUR)


def test_the_last_age_is_passed_once() -> None:
    assert past_last_age([left(48 * HOUR)], NOW - TICK, NOW)
    assert not past_last_age([left(48 * HOUR + TICK)], NOW - TICK, NOW)
    assert not past_last_age([left(47 * HOUR)], EVER, NOW)

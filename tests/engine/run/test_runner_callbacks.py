"""Runs whose purchases name an address to call: what is asked, when, and what a call may decide.

The calls are written into the journal as the receiver writes them. Over TLS, from the emulator
to a receiver of its own process, it is shown in tests/callbacks/test_runs.py.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest
from sqlalchemy import select

from krea_dagster.engine.journal import schema
from krea_dagster.engine.policy import LEFT_AT_SERVER
from krea_dagster.engine.run.runner import Runner, Wanted
from krea_dagster.engine.states import Event
from krea_dagster.models import ImageRequest
from tests.engine.harness import (
    ClockAhead,
    House,
    as_wanted,
    asked,
    house,
    rows,
    several,
    until,
)

pytestmark = pytest.mark.anyio


def url_of(request_key: str) -> str:
    return f"https://hooks.example.com/krea/{request_key}"


def listening(home: House, run_id: str = "run-1", **options: Any) -> Runner:
    return replace(home.runner(run_id, **options), callback_url_of=url_of)


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path) as home:
        yield home


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[House]:
    """Tasks that never end by themselves, so that what is asked is asked for a reason."""
    with house(tmp_path, latency_s=3600.0) as home:
        yield home


def reads(home: House) -> int:
    """Calls that asked about tasks, one or many at once."""
    books = home.emulator.stats()
    return int(books["reads"] + books["batch_reads"])


def submitted(home: House, requests: list[ImageRequest]) -> bool:
    known = home.journal.records([request.request_key for request in requests])
    return len(known) == len(requests) and all(one.task_id for one in known.values())


async def called_about(home: House, requests: list[ImageRequest]) -> None:
    """Write down a call about each, once all are submitted."""
    await until(lambda: submitted(home, requests))
    home.journal.calls.remember([(request.request_key, None) for request in requests])


# -- what is sent -----------------------------------------------------------------------------


async def test_the_address_is_on_disk_with_the_intent_and_a_repeat_is_sent_with_the_same(
    home: House,
) -> None:
    """Other settings at the repeat: under the same key another address would be a conflict."""
    request = asked()
    home.emulator.world.script("drop_after_create", 1)
    held = await listening(home, on_unknown="hold").run(as_wanted([request]))
    assert home.states([request]) == ["unknown"]
    assert held.left
    assert [row["callback_url"] for row in rows(home.url, schema.submissions)] == [
        url_of(request.request_key)
    ]
    moved = replace(home.runner("run-2"), callback_url_of=lambda key: f"https://new.example/{key}")
    await moved.run(as_wanted([request]))
    assert home.states([request]) == ["stored"]
    assert Event.REPLAYING in home.events(request)
    assert home.agree()["creates"] == 1


async def test_a_purchase_after_a_failed_one_names_the_present_address(home: House) -> None:
    request = asked()
    home.emulator.world.script("fail", 1, arg="service_error")
    await home.run([request])
    numbered = rows(home.url, schema.submissions)
    assert [row["callback_url"] for row in numbered] == [None, None]

    home.emulator.world.script("fail", 1, arg="content_policy_violation")
    other = asked(seed=9)
    await home.run([other])
    again = listening(home, "run-2", ask_again=frozenset({"content_policy_violation"}))
    running = asyncio.create_task(again.run(as_wanted([other])))
    await called_about(home, [other])
    await running
    with home.journal.reading() as connection:
        urls = connection.execute(
            select(schema.submissions.c.callback_url)
            .where(schema.submissions.c.request_key == other.request_key)
            .order_by(schema.submissions.c.number)
        ).scalars()
        assert list(urls) == [None, url_of(other.request_key)]


async def test_a_row_with_an_address_of_its_own_is_polled_as_ever(home: House) -> None:
    """Its callback goes elsewhere, so nobody would tell this run."""
    request = asked()
    own = "https://own.example.com/hook"
    runner = listening(home)
    report = await runner.run([Wanted(request, "p", callback_url=own)])
    assert home.states([request]) == ["stored"]
    assert home.record(request).callback_url == own
    assert report.missed_callbacks == 0


# -- what is asked ----------------------------------------------------------------------------


async def test_a_task_is_asked_about_when_it_is_called_about_and_once(home: House) -> None:
    requests = several(20)
    running = asyncio.create_task(listening(home).run(as_wanted(requests)))
    await called_about(home, requests)
    report = await running
    assert home.states(requests) == ["stored"] * 20
    assert report.asked == 20
    assert report.missed_callbacks == 0
    home.agree()


async def test_calls_that_come_too_early_or_twice_change_nothing_but_a_question(
    slow: House,
) -> None:
    request = asked()
    running = asyncio.create_task(listening(slow).run(as_wanted([request])))
    await called_about(slow, [request])
    await until(lambda: reads(slow) == 1)
    assert slow.states([request]) == ["submitted"]
    for _ in range(5):
        slow.journal.calls.remember([(request.request_key, "task-unified-forged")] * 3)
        await anyio.sleep(0.2)
    assert reads(slow) <= 2, "no more than one question in two seconds"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_task_whose_call_is_missing_is_swept_and_counted(home: House) -> None:
    requests = several(3)
    # Its median is 20 ms, so that the sweep comes after some five seconds.
    report = await listening(home).run(as_wanted(requests))
    assert home.states(requests) == ["stored"] * 3
    assert report.missed_callbacks == 3
    assert report.asked == 3


async def test_what_was_called_about_while_nobody_ran_is_asked_about_at_once(home: House) -> None:
    requests = several(4)
    await listening(home, wait=False).run(as_wanted(requests))
    assert home.states(requests) == ["submitted"] * 4
    home.journal.calls.remember([(request.request_key, None) for request in requests])
    report = await listening(home, "run-2").run(as_wanted(requests))
    assert home.states(requests) == ["stored"] * 4
    assert (report.asked, report.missed_callbacks) == (4, 0)
    assert report.seconds < 4.0, "not by the sweep"


# -- an unknown outcome that is called about --------------------------------------------------


async def _lost(home: House) -> tuple[ImageRequest, str]:
    """A purchase whose answer was lost, under the policy hold, and the task that it made."""
    request = asked()
    home.emulator.world.script("drop_after_create", 1)
    await listening(home, on_unknown="hold").run(as_wanted([request]))
    assert home.states([request]) == ["unknown"]
    (task,) = home.emulator.stats()["tasks"]
    return request, task["task_id"]


async def test_under_hold_a_called_task_finds_its_row_once_evolink_confirms_it(
    home: House,
) -> None:
    request, task_id = await _lost(home)
    home.journal.calls.remember([(request.request_key, task_id)])
    report = await listening(home, "run-2", on_unknown="hold").run(as_wanted([request]))
    assert home.states([request]) == ["stored"]
    assert home.record(request).task_id == task_id
    assert report.posts == 0, "nothing is sent again under hold"
    (accepted,) = [
        data for _, event, data in home.journal.history(request.request_key)
        if event is Event.ACCEPTED
    ]  # fmt: skip
    assert accepted["resolved_by"] == "a callback, confirmed by EvoLink"


@pytest.mark.parametrize("claimed", ["task-unified-0000000000-nobodys1", "no task at all/../.."])
async def test_a_claimed_task_that_evolink_does_not_know_is_left_to_a_person(
    home: House, claimed: str
) -> None:
    request, _ = await _lost(home)
    home.journal.calls.remember([(request.request_key, claimed)])
    report = await listening(home, "run-2", on_unknown="hold").run(as_wanted([request]))
    assert home.states([request]) == ["unknown"]
    assert "a person decides" in report.left[request.request_key]


async def test_a_claimed_task_of_another_row_or_another_time_is_not_taken(home: House) -> None:
    request, task_id = await _lost(home)
    other = asked(seed=11)
    await home.run([other], "run-2")
    taken = home.record(other).task_id
    home.journal.calls.remember([(request.request_key, taken)])
    await listening(home, "run-3", on_unknown="hold").run(as_wanted([request]))
    assert home.states([request, other]) == ["unknown", "stored"]

    # A purchase that was sent a day after the task that is claimed for it.
    late = asked(seed=12)
    home.emulator.world.script("drop_after_create", 1)
    tomorrow = ClockAhead(timedelta(days=1))
    await listening(home, "run-4", on_unknown="hold", clock=tomorrow).run(as_wanted([late]))
    home.journal.calls.remember([(late.request_key, task_id)])
    report = await listening(home, "run-5", on_unknown="hold").run(as_wanted([late]))
    assert home.states([late]) == ["unknown"]
    assert "older than the purchase" in report.left[late.request_key]


async def test_a_claimed_task_that_fails_is_no_proof_that_the_purchase_cost_nothing(
    tmp_path: Path,
) -> None:
    """It may be another row's: this row's own task may be paid for."""
    with house(tmp_path, latency_s=0.3) as home:
        one, other = several(2)
        home.emulator.world.script("fail", arg="service_error")
        home.emulator.world.script("drop_after_create", n=2)
        await home.run([one], on_unknown="hold")
        await home.run([other], "run-2", on_unknown="hold")
        (failing, _) = home.emulator.stats()["tasks"]
        home.journal.calls.remember([(other.request_key, failing["task_id"])])
        report = await home.run([other], "run-3", on_unknown="hold")
        assert home.states([other]) == ["unknown"]
        assert "it is failed" in report.left[other.request_key]
        assert home.emulator.stats()["creates"] == 2


async def test_under_replay_the_repeat_tells_and_no_claim_is_believed(home: House) -> None:
    request, task_id = await _lost(home)
    other = asked(seed=11)
    await home.run([other], "run-2")
    home.journal.calls.remember([(request.request_key, home.record(other).task_id)])
    await listening(home, "run-3").run(as_wanted([request]))
    assert home.record(request).task_id == task_id
    assert home.agree()["creates"] == 2


# -- runs that wait for nothing ---------------------------------------------------------------


async def test_a_run_that_does_not_wait_submits_and_ends(slow: House) -> None:
    requests = several(10)
    report = await slow.runner(wait=False).run(as_wanted(requests))
    assert slow.states(requests) == ["submitted"] * 10
    assert set(report.left.values()) == {LEFT_AT_SERVER}
    assert (report.posts, reads(slow)) == (10, 0)
    again = await slow.runner("run-2", wait=False).run(as_wanted(requests))
    assert again.posts == 0, "what is at the server is not bought again"
    slow.agree()


async def test_the_next_run_collects_what_has_ended_and_buys_nothing(home: House) -> None:
    requests = several(10)
    await home.runner(wait=False).run(as_wanted(requests))
    await anyio.sleep(0.1)  # the emulator's tasks take 10 ms
    report = await home.runner("run-2", wait=False).run(as_wanted(requests))
    assert home.states(requests) == ["stored"] * 10
    assert report.posts == 0
    home.agree()


async def test_it_leaves_what_the_server_has_no_place_for_and_goes_on_later(home: House) -> None:
    requests = several(20)
    first = await home.runner(wait=False, max_in_flight=8).run(as_wanted(requests))
    assert first.posts == 8
    assert sorted(set(first.left.values())) == [
        LEFT_AT_SERVER,
        "not bought yet: the server has as many tasks as it takes",
    ]
    for number in range(2, 5):
        await anyio.sleep(0.1)
        await home.runner(f"run-{number}", wait=False, max_in_flight=8).run(as_wanted(requests))
    assert home.states(requests) == ["stored"] * 20
    assert home.agree()["creates"] == 20


async def test_a_server_that_refuses_more_tasks_ends_such_a_run_within_seconds(
    tmp_path: Path,
) -> None:
    with house(tmp_path, latency_s=3600.0, max_concurrent=4) as home:
        requests = several(12)
        report = await home.runner(wait=False).run(as_wanted(requests))
        assert home.states(requests).count("submitted") == 4
        assert home.states(requests).count("planned") == 8
        assert report.seconds < 30.0
        home.agree()


async def test_it_repeats_an_unknown_purchase_before_it_ends(home: House) -> None:
    request = asked()
    home.emulator.world.script("drop_after_create", 1)
    await home.runner(wait=False).run(as_wanted([request]))
    assert home.states([request]) == ["submitted"]
    assert home.agree()["creates"] == 1


async def test_an_unknown_purchase_keeps_no_run_waiting_for_a_place(home: House) -> None:
    """Its repeat needs none: all places are taken, and one of them may be its own."""
    home.emulator.world.latency_s = 3600.0
    requests = several(8)
    home.emulator.world.script("drop_after_create", 1)
    with anyio.fail_after(20.0):
        report = await home.runner(wait=False, max_in_flight=4).run(as_wanted(requests))
    assert home.states(requests).count("unknown") == 0
    assert report.left_for_room == home.states(requests).count("planned") > 0
    assert home.agree()["creates"] == home.states(requests).count("submitted")

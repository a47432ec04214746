"""Runs whose purchases have a callback address: which tasks are read, and which claims are used.

The callbacks are written into the journal as the receiver writes them. Over TLS, from the emulator
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
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.run.runner import Runner
from krea_dagster.engine.states import Event
from krea_dagster.models import ImageRequest
from tests.engine.harness import (
    ClockAhead,
    EngineHarness,
    make_request,
    make_requests,
    open_harness,
    rows,
    to_requested,
    wait_until,
)

pytestmark = pytest.mark.anyio


def url_of(request_key: str) -> str:
    return f"https://hooks.example.com/krea/{request_key}"


def listening(engine: EngineHarness, run_id: str = "run-1", **options: Any) -> Runner:
    return engine.runner(run_id, **options, callback_url_of=url_of)


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[EngineHarness]:
    """Tasks that never end, so that each read has a reason."""
    with open_harness(tmp_path, latency_s=3600.0) as engine:
        yield engine


def reads(engine: EngineHarness) -> int:
    """Calls that read tasks, one or many at once."""
    stats = engine.emulator.stats()
    return int(stats["reads"] + stats["batch_reads"])


def submitted(engine: EngineHarness, requests: list[ImageRequest]) -> bool:
    known = engine.journal.records([request.request_key for request in requests])
    return len(known) == len(requests) and all(one.task_id for one in known.values())


async def called_about(engine: EngineHarness, requests: list[ImageRequest]) -> None:
    """Record a callback for each request, once all are submitted."""
    await wait_until(lambda: submitted(engine, requests))
    engine.journal.callbacks.add([(request.request_key, None) for request in requests])


# -- what is sent -----------------------------------------------------------------------------


async def test_the_address_is_on_disk_with_the_intent_and_a_repeat_is_sent_with_the_same(
    engine: EngineHarness,
) -> None:
    """Other settings at the repeat: under the same key another address would be a conflict."""
    request = make_request()
    engine.emulator.world.script("drop_after_create", 1)
    held = await listening(engine, on_unknown="hold").run(to_requested([request]))
    assert engine.states([request]) == ["unknown"]
    assert held.left
    assert [row["callback_url"] for row in rows(engine.url, schema.submissions)] == [
        url_of(request.request_key)
    ]
    moved = replace(
        engine.runner("run-2"), callback_url_of=lambda key: f"https://new.example/{key}"
    )
    await moved.run(to_requested([request]))
    assert engine.states([request]) == ["stored"]
    assert Event.REPLAYING in engine.events(request)
    assert engine.assert_accounts_agree()["creates"] == 1


async def test_a_purchase_after_a_failed_one_names_the_present_address(
    engine: EngineHarness,
) -> None:
    request = make_request()
    engine.emulator.world.script("fail", 1, arg="service_error")
    await engine.run([request])
    numbered = rows(engine.url, schema.submissions)
    assert [row["callback_url"] for row in numbered] == [None, None]

    engine.emulator.world.script("fail", 1, arg="content_policy_violation")
    other = make_request(seed=9)
    await engine.run([other])
    again = listening(engine, "run-2", retry_codes=frozenset({"content_policy_violation"}))
    running = asyncio.create_task(again.run(to_requested([other])))
    await called_about(engine, [other])
    await running
    with engine.journal.database.read() as connection:
        urls = connection.execute(
            select(schema.submissions.c.callback_url)
            .where(schema.submissions.c.request_key == other.request_key)
            .order_by(schema.submissions.c.number)
        ).scalars()
        assert list(urls) == [None, url_of(other.request_key)]


async def test_a_row_with_its_own_callback_address_is_polled(engine: EngineHarness) -> None:
    """Its callback goes elsewhere, so this run does not get it."""
    request = make_request()
    own = "https://own.example.com/hook"
    runner = listening(engine)
    report = await runner.run([RequestedImage(request, "p", callback_url=own)])
    assert engine.states([request]) == ["stored"]
    assert engine.record(request).callback_url == own
    assert report.missed_callbacks == 0


# -- reads ------------------------------------------------------------------------------------


async def test_a_task_is_read_once_when_its_callback_comes(engine: EngineHarness) -> None:
    requests = make_requests(20)
    running = asyncio.create_task(listening(engine).run(to_requested(requests)))
    await called_about(engine, requests)
    report = await running
    assert engine.states(requests) == ["stored"] * 20
    assert report.tasks_read == 20
    assert report.missed_callbacks == 0
    engine.assert_accounts_agree()


async def test_early_or_doubled_callbacks_only_cost_a_read(slow: EngineHarness) -> None:
    request = make_request()
    running = asyncio.create_task(listening(slow).run(to_requested([request])))
    await called_about(slow, [request])
    await wait_until(lambda: reads(slow) == 1)
    assert slow.states([request]) == ["submitted"]
    for _ in range(5):
        slow.journal.callbacks.add([(request.request_key, "task-unified-forged")] * 3)
        await anyio.sleep(0.2)
    assert reads(slow) <= 2, "no more than one question in two seconds"
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running


async def test_a_missing_callback_is_replaced_by_a_read_and_counted(engine: EngineHarness) -> None:
    requests = make_requests(3)
    # Its median is 20 ms, so the timeout comes after about five seconds.
    report = await listening(engine).run(to_requested(requests))
    assert engine.states(requests) == ["stored"] * 3
    assert report.missed_callbacks == 3
    assert report.tasks_read == 3


async def test_tasks_whose_callback_came_between_runs_are_read_at_once(
    engine: EngineHarness,
) -> None:
    requests = make_requests(4)
    await listening(engine, wait=False).run(to_requested(requests))
    assert engine.states(requests) == ["submitted"] * 4
    engine.journal.callbacks.add([(request.request_key, None) for request in requests])
    report = await listening(engine, "run-2").run(to_requested(requests))
    assert engine.states(requests) == ["stored"] * 4
    assert (report.tasks_read, report.missed_callbacks) == (4, 0)


# -- callbacks for unknown outcomes -----------------------------------------------------------


async def _lost(engine: EngineHarness) -> tuple[ImageRequest, str]:
    """A purchase whose answer was lost, under the policy hold, and the task that it made."""
    request = make_request()
    engine.emulator.world.script("drop_after_create", 1)
    await listening(engine, on_unknown="hold").run(to_requested([request]))
    assert engine.states([request]) == ["unknown"]
    (task,) = engine.emulator.stats()["tasks"]
    return request, task["task_id"]


async def test_under_hold_a_claimed_task_is_taken_once_evolink_confirms_it(
    engine: EngineHarness,
) -> None:
    request, task_id = await _lost(engine)
    engine.journal.callbacks.add([(request.request_key, task_id)])
    report = await listening(engine, "run-2", on_unknown="hold").run(to_requested([request]))
    assert engine.states([request]) == ["stored"]
    assert engine.record(request).task_id == task_id
    assert report.posts == 0, "nothing is sent again under hold"
    (accepted,) = [
        data for _, event, data in engine.journal.history(request.request_key)
        if event is Event.ACCEPTED
    ]  # fmt: skip
    assert accepted["resolved_by"] == "a callback, confirmed by EvoLink"


@pytest.mark.parametrize("claimed", ["task-unified-0000000000-nobodys1", "no task at all/../.."])
async def test_a_claimed_task_that_evolink_does_not_know_is_left_to_a_person(
    engine: EngineHarness, claimed: str
) -> None:
    request, _ = await _lost(engine)
    engine.journal.callbacks.add([(request.request_key, claimed)])
    report = await listening(engine, "run-2", on_unknown="hold").run(to_requested([request]))
    assert engine.states([request]) == ["unknown"]
    assert "a person decides" in report.left[request.request_key]


async def test_a_claimed_task_of_another_row_or_another_time_is_not_taken(
    engine: EngineHarness,
) -> None:
    request, task_id = await _lost(engine)
    other = make_request(seed=11)
    await engine.run([other], "run-2")
    taken = engine.record(other).task_id
    engine.journal.callbacks.add([(request.request_key, taken)])
    await listening(engine, "run-3", on_unknown="hold").run(to_requested([request]))
    assert engine.states([request, other]) == ["unknown", "stored"]

    # A purchase that was sent a day after the claimed task was created.
    late = make_request(seed=12)
    engine.emulator.world.script("drop_after_create", 1)
    tomorrow = ClockAhead(timedelta(days=1))
    await listening(engine, "run-4", on_unknown="hold", clock=tomorrow).run(to_requested([late]))
    engine.journal.callbacks.add([(late.request_key, task_id)])
    report = await listening(engine, "run-5", on_unknown="hold").run(to_requested([late]))
    assert engine.states([late]) == ["unknown"]
    assert "older than the purchase" in report.left[late.request_key]


async def test_a_claimed_task_that_failed_does_not_prove_that_the_purchase_cost_nothing(
    tmp_path: Path,
) -> None:
    """It may be another row's task, while this row's own task is paid."""
    with open_harness(tmp_path, latency_s=0.3) as engine:
        one, other = make_requests(2)
        engine.emulator.world.script("fail", arg="service_error")
        engine.emulator.world.script("drop_after_create", n=2)
        await engine.run([one], on_unknown="hold")
        await engine.run([other], "run-2", on_unknown="hold")
        (failing, _) = engine.emulator.stats()["tasks"]
        engine.journal.callbacks.add([(other.request_key, failing["task_id"])])
        report = await engine.run([other], "run-3", on_unknown="hold")
        assert engine.states([other]) == ["unknown"]
        assert "it is failed" in report.left[other.request_key]
        assert engine.emulator.stats()["creates"] == 2


async def test_under_replay_the_repeat_decides_and_no_claim_is_used(engine: EngineHarness) -> None:
    request, task_id = await _lost(engine)
    other = make_request(seed=11)
    await engine.run([other], "run-2")
    engine.journal.callbacks.add([(request.request_key, engine.record(other).task_id)])
    await listening(engine, "run-3").run(to_requested([request]))
    assert engine.record(request).task_id == task_id
    assert engine.assert_accounts_agree()["creates"] == 2


# -- runs that do not wait --------------------------------------------------------------------


async def test_a_run_that_does_not_wait_submits_and_ends(slow: EngineHarness) -> None:
    requests = make_requests(10)
    report = await slow.runner(wait=False).run(to_requested(requests))
    assert slow.states(requests) == ["submitted"] * 10
    assert set(report.left.values()) == {LEFT_AT_SERVER}
    assert (report.posts, reads(slow)) == (10, 0)
    again = await slow.runner("run-2", wait=False).run(to_requested(requests))
    assert again.posts == 0, "what is at the server is not bought again"
    slow.assert_accounts_agree()


async def test_the_next_run_collects_what_has_ended_and_buys_nothing(engine: EngineHarness) -> None:
    requests = make_requests(10)
    await engine.run(requests, wait=False)
    await anyio.sleep(0.1)  # the emulator's tasks take 10 ms
    report = await engine.run(requests, "run-2", wait=False)
    assert engine.states(requests) == ["stored"] * 10
    assert report.posts == 0
    engine.assert_accounts_agree()


async def test_a_run_that_does_not_wait_leaves_requests_without_a_place_to_a_later_run(
    engine: EngineHarness,
) -> None:
    requests = make_requests(20)
    first = await engine.run(requests, wait=False, max_in_flight=8)
    assert first.posts == 8
    assert sorted(set(first.left.values())) == [
        LEFT_AT_SERVER,
        "not bought yet: the server has as many tasks as it takes",
    ]
    for number in range(2, 5):
        await anyio.sleep(0.1)
        await engine.run(requests, f"run-{number}", wait=False, max_in_flight=8)
    assert engine.states(requests) == ["stored"] * 20
    assert engine.assert_accounts_agree()["creates"] == 20


async def test_a_server_that_refuses_more_tasks_ends_a_run_that_does_not_wait(
    tmp_path: Path,
) -> None:
    with open_harness(tmp_path, latency_s=3600.0, max_concurrent=4) as engine:
        requests = make_requests(12)
        await engine.run(requests, wait=False)
        assert engine.states(requests).count("submitted") == 4
        assert engine.states(requests).count("planned") == 8
        engine.assert_accounts_agree()


async def test_a_run_that_does_not_wait_repeats_an_unknown_purchase(engine: EngineHarness) -> None:
    request = make_request()
    engine.emulator.world.script("drop_after_create", 1)
    await engine.run([request], wait=False)
    assert engine.states([request]) == ["submitted"]
    assert engine.assert_accounts_agree()["creates"] == 1


async def test_an_unknown_purchase_does_not_keep_a_run_waiting_for_a_place(
    engine: EngineHarness,
) -> None:
    """Its repeat needs none: all places are taken, and one of them may be its own."""
    engine.emulator.world.latency_s = 3600.0
    requests = make_requests(8)
    engine.emulator.world.script("drop_after_create", 1)
    with anyio.fail_after(60):
        report = await engine.run(requests, wait=False, max_in_flight=4)
    assert engine.states(requests).count("unknown") == 0
    assert report.left_for_room == engine.states(requests).count("planned") > 0
    assert engine.assert_accounts_agree()["creates"] == engine.states(requests).count("submitted")

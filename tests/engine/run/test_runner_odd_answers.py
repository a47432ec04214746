"""Strange answers about money or a task affect only their row, and are verified.

Of the kinds that an attacker's reading found: each would have bought twice, lost an image, or ended
the run of all other rows.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.engine.budget import Caps, is_doubtful
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.resolution import HasTask
from krea_dagster.engine.run.latency import Latencies
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.run.scheduler import UNANSWERED_UNDER_CAP
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import ConfigError, RunStopped
from tests.engine.harness import (
    NOW,
    ClockAhead,
    EngineHarness,
    JournalWriter,
    make_request,
    make_requests,
    open_harness,
    to_requested,
)

pytestmark = pytest.mark.anyio


# -- failures ---------------------------------------------------------------------------------


async def test_a_failure_in_a_batch_read_is_confirmed_before_anything_is_bought_again(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("batch_failed", n=5)
    report = await engine.run(make_requests(6))
    assert (report.posts, report.progress.delivered) == (6, 6)
    assert engine.assert_accounts_agree()["creates"] == 6


async def test_a_failed_task_that_is_completed_after_the_pause_is_not_bought_again(
    engine: EngineHarness,
) -> None:
    with anyio.fail_after(60):
        engine.emulator.world.script("slow_task", n=1, arg=0.2)
        # Its single reads say failed, until the pause is over.
        writer = JournalWriter(engine.journal, "earlier")
        async with KreaClient("emulator", base_url=engine.emulator.url) as client:
            key = f"krea-{make_request().request_key}-1"
            bought = await client.submit(make_request(), idempotency_key=key)
        writer.plan(make_request())
        writer.write(make_request(), Event.SUBMITTING)
        writer.write(make_request(), Event.ACCEPTED, task_id=bought.task_id)
        writer.write(make_request(), Event.FAILED)
        engine.journal.claims.release(writer.owner.owner)
        report = await engine.run([make_request()])
    record = engine.record(make_request())
    assert (record.state, record.task_id, record.charged_units) == (
        State.STORED,
        bought.task_id,
        4500,
    )
    assert report.posts == 0
    assert engine.assert_accounts_agree()["creates"] == 1


async def test_a_failed_task_that_cannot_be_read_again_is_left_and_not_bought_again(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("fail", n=3, arg="service_error")
    await engine.run([make_request()], task_tries=1)
    engine.emulator.world.script("read_500", n=50)
    report = await engine.run([make_request()], "run-2", task_tries=3)
    assert report.posts == 0
    assert "cannot be read" in report.left[make_request().request_key]


async def test_a_batch_read_that_disappears_leaves_no_task_unread(tmp_path: Path) -> None:
    scripted: list[int] = []
    with open_harness(tmp_path, latency_s=1.0, latency_jitter=0.5) as engine:

        def on_progress(progress: Progress) -> None:
            if progress.delivered >= 20 and not scripted:
                scripted.append(progress.delivered)
                engine.emulator.world.script("no_batch", n=1000)

        runner = engine.runner(max_in_flight=40, on_progress=on_progress)
        ready = replace(runner, latencies=Latencies.known({"1K": 1.0}))
        with anyio.fail_after(60):
            report = await ready.run(to_requested(make_requests(120)))
        assert scripted
        assert report.progress.delivered == 120
        assert engine.assert_accounts_agree()["creates"] == 120


# -- ids --------------------------------------------------------------------------------------


async def test_a_task_id_of_another_purchase_affects_only_its_row(engine: EngineHarness) -> None:
    requests = make_requests(5)
    await engine.run(requests[:1])
    engine.emulator.world.script("repeated_id", match="")
    report = await engine.run(requests, "run-2", max_in_flight=1)
    states = engine.states(requests)
    assert sorted(states) == ["stored"] * 4 + ["unknown"]
    (why,) = report.left.values()
    assert "belongs to the purchase" in why
    assert engine.emulator.stats()["bodies_bought_more_than_once"] == 0


async def test_a_task_id_of_the_rows_own_earlier_purchase_affects_only_its_row(
    engine: EngineHarness,
) -> None:
    requests = make_requests(3)
    engine.emulator.world.script("fail", arg="service_error")
    await engine.run(requests[:1], task_tries=1)
    engine.emulator.world.script("repeated_id")
    report = await engine.run(requests[:1], "run-2")
    assert engine.states(requests[:1]) == ["unknown"]
    assert "belongs to the purchase" in report.left[requests[0].request_key]
    await engine.run(requests, "run-3")
    assert engine.states(requests) == ["stored"] * 3


async def test_a_purchase_sent_twice_whose_task_failed_is_bought_again_only_by_a_person(
    tmp_path: Path,
) -> None:
    """If the server does not recognise the key, the first POST may have a task too."""
    with open_harness(tmp_path, idempotency=False) as engine:
        await repeat_a_purchase_whose_task_fails(engine)
        assert engine.states([make_request()]) == ["failed"]
        again = await engine.run([make_request()], "run-3")
        assert "sent twice" in again.left[make_request().request_key]
        assert engine.emulator.stats()["creates"] == 2
        await engine.run([make_request()], "run-4", retry_codes=frozenset({"service_error"}))
        assert engine.states([make_request()]) == ["stored"], "a person may decide so"


async def test_a_purchase_whose_repeat_was_recognised_is_bought_again_after_its_task_failed(
    engine: EngineHarness,
) -> None:
    await repeat_a_purchase_whose_task_fails(engine)
    assert engine.states([make_request()]) == ["stored"]
    assert engine.emulator.stats()["creates"] == 2


async def repeat_a_purchase_whose_task_fails(engine: EngineHarness) -> None:
    """If the server recognises the repeat, there is one task; otherwise the second one fails."""
    script = engine.emulator.world.script
    honoured = engine.emulator.world.idempotency
    if honoured:
        script("fail", arg="service_error")
    script("html_200")
    await engine.run([make_request()], on_unknown="hold")
    assert engine.states([make_request()]) == ["unknown"]
    if not honoured:
        script("fail", arg="service_error")
    await engine.run([make_request()], "run-2")


async def test_a_decision_with_the_task_of_another_row_affects_only_its_row(
    engine: EngineHarness,
) -> None:
    requests = make_requests(4)
    await engine.run(requests[:1])
    engine.emulator.world.script("drop_before_create")
    await engine.run(requests[:2], "run-2", on_unknown="hold")
    task_id = str(engine.record(requests[0]).task_id)
    runner = engine.runner("run-3", on_unknown="hold")
    decided = replace(runner, resolutions={requests[1].request_key: HasTask(task_id)})
    report = await decided.run(to_requested(requests))
    assert engine.states(requests) == ["stored", "unknown", "stored", "stored"]
    assert "belongs to the purchase" in report.left[requests[1].request_key]


async def test_an_invalid_task_id_in_the_journal_does_not_end_the_run(
    engine: EngineHarness,
) -> None:
    """An earlier version let ``..`` in, by a decision or a callback."""
    requests = make_requests(4)
    writer = JournalWriter(engine.journal, "earlier")
    writer.plan(requests[0])
    writer.write(requests[0], Event.SUBMITTING)
    writer.write(requests[0], Event.ACCEPTED, task_id="..")
    engine.journal.claims.release(writer.owner.owner)
    report = await engine.run(requests, on_unknown="hold")
    assert engine.states(requests) == ["unknown", "stored", "stored", "stored"]
    assert list(report.left) == [requests[0].request_key]
    assert engine.journal.history(requests[0].request_key)[-1][2]["task_id"] == ".."


async def test_a_task_that_two_rows_claim_goes_to_one(engine: EngineHarness) -> None:
    requests = make_requests(2)
    engine.emulator.world.script("drop_after_create", n=2)
    await engine.run(requests, on_unknown="hold")
    (task, _) = engine.emulator.stats()["tasks"]
    engine.journal.callbacks.add([(one.request_key, task["task_id"]) for one in requests])
    with anyio.fail_after(60):
        report = await engine.run(requests, "run-2", on_unknown="hold")
    assert sorted(engine.states(requests)) == ["stored", "unknown"]
    (why,) = report.left.values()
    assert "belongs to the purchase" in why


# -- tasks that are not found -----------------------------------------------------------------


async def test_a_key_that_knows_none_of_the_tasks_stops_the_run_and_gives_up_no_task(
    engine: EngineHarness,
) -> None:
    requests = make_requests(4)
    engine.emulator.world.script("stuck", n=4)
    await engine.run(requests, patience_s=0.05)
    engine.emulator.world.set_rate("read_404", 1.0)
    engine.emulator.world.script("no_batch", n=1)
    wanted = [*requests, *make_requests(3, start=10)]
    report = await engine.run(wanted, "run-2", gone_after_s=3600.0, patience_s=20.0)
    assert isinstance(report.stopped, RunStopped)
    assert "is it a key of another account?" in str(report.stopped)
    assert engine.states(requests) == ["submitted"] * 4


async def test_lost_tasks_that_were_bought_with_this_key_do_not_stop_the_run(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("vanished", n=3)
    report = await engine.run(
        make_requests(12), max_in_flight=3, account_keys=frozenset({"mine"}), api_key="mine"
    )
    assert (report.posts, report.progress.delivered, report.stopped) == (12, 9, None)


async def test_a_lost_task_that_is_back_is_found_by_the_next_run(engine: EngineHarness) -> None:
    engine.emulator.world.set_rate("read_404", 1.0)
    await engine.run([make_request()], gone_after_s=0.0)
    assert engine.states([make_request()]) == ["expired"]
    assert engine.record(make_request()).task_id is not None
    engine.emulator.world.set_rate("read_404", 0.0)
    report = await engine.run([make_request()], "run-2")
    assert (report.posts, engine.states([make_request()])) == (0, ["stored"])


# -- prices -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("units", "doubtful"),
    [(4500, False), (18_000, False), (18_001, True), (1125, False), (1124, True), (10**16, True)],
)
def test_a_price_beyond_four_times_any_known_one_is_doubtful(units: int, doubtful: bool) -> None:
    assert is_doubtful(units, "1K", {}) is doubtful


def test_a_price_that_was_paid_before_counts_as_known() -> None:
    assert not is_doubtful(40_000, "1K", {"1K": 10_000})
    assert is_doubtful(40_001, "1K", {"1K": 10_000})


async def test_one_implausible_price_is_reported_and_not_used(engine: EngineHarness) -> None:
    requests = make_requests(6)
    engine.emulator.world.script("price", arg=50)
    runner = engine.runner()
    report = await replace(runner, caps=Caps(day_units=10 * 4500)).run(to_requested(requests))
    assert engine.states(requests) == ["stored"] * 6
    assert "far from the 0.45 that were expected" in " ".join(report.price_increases)
    assert engine.journal.prices.highest() == {"1K": 4500}
    charges = sorted(str(one.charged_units) for one in engine.journal.charges())
    assert charges == ["4500"] * 5 + ["None"]
    assert engine.journal.commitment("run:run-1").committed_units == 6 * 4500
    later = await engine.run(make_requests(10), "run-2", caps=Caps(day_units=10 * 4500))
    assert later.caps_reached == ()


async def test_a_price_that_a_person_accepts_is_charged_and_used(engine: EngineHarness) -> None:
    engine.emulator.world.script("price", arg=3)
    await engine.run(make_requests(2), max_in_flight=1)
    units, settled = engine.journal.prices.accept("1K", NOW)
    assert (units, settled) == (30_000, 1)
    assert engine.journal.prices.highest() == {"1K": 30_000}
    assert sorted(one.charged_units or 0 for one in engine.journal.charges()) == [4500, 30_000]
    commitment = engine.journal.commitment("run:run-1")
    assert (commitment.committed_units, commitment.spent_units) == (34_500, 34_500)
    with pytest.raises(ConfigError, match="no price of 1K waits"):
        engine.journal.prices.accept("1K", NOW)


async def test_several_implausible_prices_in_a_row_end_the_buying(engine: EngineHarness) -> None:
    engine.emulator.world.script("price", n=100, arg=99)
    report = await engine.run(make_requests(20), max_in_flight=2)
    assert isinstance(report.stopped, RunStopped)
    assert report.posts <= 3 + 2
    assert "krea-dagster accept price 1K" in str(report.stopped)


async def test_doubtful_prices_stop_later_runs_until_a_person_has_decided(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("price", n=3, arg=99)
    first = await engine.run(make_requests(20), max_in_flight=1)
    assert (first.posts, engine.emulator.stats()["creates"]) == (3, 3)
    for run in ("run-2", "run-3"):
        report = await engine.run(make_requests(20), run)
        assert report.posts == 0
        assert "krea-dagster accept price 1K" in str(report.stopped)
    engine.journal.prices.dismiss("1K")
    report = await engine.run(make_requests(20), "run-4")
    assert (report.posts, report.stopped) == (17, None)
    assert engine.journal.prices.highest() == {"1K": 4500}


async def test_a_price_that_is_right_again_ends_the_doubt(engine: EngineHarness) -> None:
    for run in range(4):
        engine.emulator.world.script("price", n=2, arg=99)
        report = await engine.run(make_requests(4, start=4 * run), f"run-{run}", max_in_flight=1)
        assert (report.posts, report.stopped) == (4, None)


async def test_a_price_is_not_accepted_while_a_run_has_purchases_at_it(
    engine: EngineHarness,
) -> None:
    writer = JournalWriter(engine.journal, "at work")
    writer.plan(make_request())
    writer.write(make_request(), Event.SUBMITTING)
    writer.write(make_request(), Event.ACCEPTED, reserved_units=90_000)
    with (
        closing(Journal(engine.url)) as other,
        pytest.raises(ConfigError, match="a run is working with purchases at that price"),
    ):
        other.prices.accept("1K", NOW)
    engine.journal.claims.release(writer.owner.owner)
    units, _ = engine.journal.prices.accept("1K", NOW)
    assert units == 90_000


@pytest.mark.parametrize("number", [5, 30])
async def test_if_the_price_rises_a_cap_is_passed_by_a_few_purchases_at_most(
    engine: EngineHarness, number: int
) -> None:
    """Those without an answer when the first one returned the new price."""
    cap, rise = 10 * 4500, 17_000 - 4500
    engine.emulator.world.script("price", n=100, arg=1.7)
    runner = engine.runner(max_in_flight=16)
    await replace(runner, caps=Caps(day_units=cap)).run(to_requested(make_requests(number)))
    billed = sum(task["reserved_units"] for task in engine.emulator.stats()["tasks"])
    assert billed <= cap + UNANSWERED_UNDER_CAP * rise


# -- another account, another clock -----------------------------------------------------------


async def test_with_the_key_of_another_account_nothing_is_repeated_and_nothing_given_up(
    engine: EngineHarness,
) -> None:
    requests = make_requests(6)
    engine.emulator.world.script("drop_after_create", n=3)
    mine = engine.runner(on_unknown="hold", api_key="mine")
    await mine.run(to_requested(requests[:3]))
    engine.emulator.world.script("stuck", n=3)
    await engine.run(requests[3:], "run-2", patience_s=0.05, api_key="mine")
    engine.emulator.world.set_rate("read_404", 1.0)
    foreign = engine.runner("run-3", account_keys=frozenset({"theirs"}), gone_after_s=0.0)
    report = await replace(foreign, api_key="theirs").run(to_requested(requests))
    assert report.posts == 0
    assert engine.states(requests) == ["unknown"] * 3 + ["submitted"] * 3
    assert engine.emulator.stats()["creates"] == 6
    engine.emulator.world.set_rate("read_404", 0.0)
    both = engine.runner("run-4", account_keys=frozenset({"mine", "theirs"}), patience_s=0.05)
    await replace(both, api_key="theirs").run(to_requested(requests))
    assert engine.states(requests)[:3] == ["stored"] * 3
    assert engine.emulator.stats()["creates"] == 6


async def test_an_unknown_outcome_from_a_clock_ahead_is_not_repeated(engine: EngineHarness) -> None:
    engine.emulator.world.script("drop_after_create", n=3)
    ahead = engine.runner(clock=ClockAhead(timedelta(hours=30)), on_unknown="hold")
    await ahead.run(to_requested(make_requests(3)))
    report = await engine.run(make_requests(3), "run-2")
    assert report.posts == 0
    assert all("ahead of this clock" in why for why in report.left.values())


# -- stops ------------------------------------------------------------------------------------


async def test_a_purchase_that_was_not_sent_is_not_unknown_when_a_run_is_stopped(
    engine: EngineHarness,
) -> None:
    """The intent waits for the journal for longer than a stop waits for an answer."""
    free = threading.Event()

    class Busy(Journal):
        def append(self, changes: Any, **options: Any) -> Any:
            if changes[0].event is Event.SUBMITTING:
                free.wait(10)
            return super().append(changes, **options)

    with closing(Busy(engine.url)) as busy:
        task = asyncio.ensure_future(engine.run(make_requests(2), grace_s=0.01, journal=busy))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.sleep(0.2)
        free.set()
        with pytest.raises(asyncio.CancelledError), anyio.fail_after(60):
            await task
    assert engine.states(make_requests(2)) == ["planned", "planned"]
    assert engine.emulator.stats()["creates"] == 0


# -- files ------------------------------------------------------------------------------------


async def test_one_file_for_several_prompts_is_reported(engine: EngineHarness) -> None:
    engine.emulator.world.script("same_file", n=3)
    report = await engine.run(make_requests(3))
    (said,) = report.same_files
    assert said.startswith("3 requests got one and the same file")

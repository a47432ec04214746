"""The account, a stop or an outage ends a run early, and the next one goes on."""

# ruff: noqa: ARG002 - doubles take all that their interface gives them

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import anyio
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.policy import REPEATABLE_TASK_ERRORS
from krea_dagster.engine.resolution import HasTask, Lost, NotBought, SendAgain
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import DownloadedFile
from krea_dagster.errors import (
    AccountStopped,
    KeyRejected,
    ModelDenied,
    NoUsableBody,
    OutOfCredits,
    TaskNotFound,
    TryLater,
)
from krea_dagster.models import AccountCredits, ImageRequest, Submission, Task, TaskFailure
from tests.engine.harness import (
    EngineHarness,
    make_request,
    make_requests,
    open_harness,
    rows,
    to_requested,
    wait_until,
)

pytestmark = pytest.mark.anyio


# -- the account ------------------------------------------------------------------------------


async def test_an_empty_account_stops_buying_and_paid_images_are_finished(
    engine: EngineHarness,
) -> None:
    requests = make_requests(6)
    engine.emulator.world.set_quota(3 * 0.45)
    report = await engine.run(requests, max_in_flight=2)
    assert isinstance(report.stopped, OutOfCredits)
    assert Counter(engine.states(requests)) == {"stored": 3, "deferred": 3}
    assert report.progress == Progress(total=6, delivered=3, left=3, charged_units=3 * 4500)
    assert len(report.left) == 3
    assert all("account stopped the run" in reason for reason in report.left.values())
    # Those under way were refused too; the others were not sent.
    assert engine.assert_accounts_agree()["submit_posts"] <= 5

    engine.emulator.world.set_quota(None)
    topped_up = await engine.run(requests, "run-2")
    assert topped_up.progress == Progress(total=6, reused=3, delivered=3, charged_units=3 * 4500)
    assert engine.assert_accounts_agree()["creates"] == 6


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("unauthorized", KeyRejected),
        ("insufficient_quota", OutOfCredits),
        ("model_denied", ModelDenied),
    ],
)
async def test_an_answer_about_the_account_stops_buying_for_all(
    engine: EngineHarness, fault: str, error: type[AccountStopped]
) -> None:
    engine.emulator.world.script(fault, 100)
    report = await engine.run(make_requests(20), max_in_flight=2)
    assert isinstance(report.stopped, error)
    assert set(engine.states(make_requests(20))) == {"deferred"}
    record = engine.record(make_request(seed=1))
    assert record.error_code
    assert record.error_message
    assert engine.assert_accounts_agree()["submit_posts"] <= 3


async def test_an_unknown_outcome_stays_unknown_when_its_repeat_finds_an_empty_account(
    engine: EngineHarness,
) -> None:
    """The refusal of the repeat does not show that the first was refused."""
    engine.emulator.world.script("drop_after_create")
    engine.emulator.world.script("insufficient_quota")
    report = await engine.run([make_request()])
    assert engine.record(make_request()).state is State.UNKNOWN
    assert report.progress.left == 1
    again = await engine.run([make_request()], "run-2")
    assert (again.posts, again.progress.delivered) == (1, 1)
    assert engine.assert_accounts_agree()["creates"] == 1


@pytest.mark.parametrize("fault", ["content_refused", "too_large_413", "429"])
async def test_an_unknown_outcome_stays_unknown_if_its_repeat_is_refused(
    engine: EngineHarness, fault: str
) -> None:
    engine.emulator.world.script("reset_after_create")
    engine.emulator.world.script(fault, 100_000, arg=0 if fault == "429" else None)
    report = await engine.run([make_request()], replay_tries=2, patience_s=1.0)
    record = engine.record(make_request())
    assert (record.state, record.charged_units) == (State.UNKNOWN, None)
    assert make_request().request_key in report.left
    assert engine.assert_accounts_agree()["creates"] == 1


# -- unknown outcomes -------------------------------------------------------------------------


async def test_a_purchase_that_was_cut_off_is_found_again_by_its_key(engine: EngineHarness) -> None:
    engine.emulator.world.script("drop_after_create")
    report = await engine.run([make_request()])
    assert (report.posts, report.progress.delivered) == (2, 1)
    assert engine.assert_accounts_agree()["replays"] == 1
    accepted = next(
        data
        for _, event, data in engine.journal.history(make_request().request_key)
        if event is Event.ACCEPTED
    )
    assert accepted["replayed"] is True


async def test_under_hold_an_unknown_outcome_is_posted_once_and_kept_for_a_person(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("drop_after_create", match="a fox")
    report = await engine.run([make_request(), make_request("a hen")], on_unknown="hold")
    assert engine.states([make_request(), make_request("a hen")]) == ["unknown", "stored"]
    assert "a person decides" in report.left[make_request().request_key]
    await engine.run([make_request(), make_request("a hen")], "run-2", on_unknown="hold")
    assert engine.assert_accounts_agree()["submit_posts"] == 2


async def test_a_server_without_idempotency_sells_a_repeat_again(tmp_path: Path) -> None:
    """Why hold exists: the server has two tasks, and the journal knows one."""
    with open_harness(tmp_path, idempotency=False) as engine:
        engine.emulator.world.script("drop_after_create")
        await engine.run([make_request()])
        stats = engine.emulator.stats()
        assert (stats["creates"], stats["bodies_bought_more_than_once"]) == (2, 1)
        assert engine.record(make_request()).task_id == stats["tasks"][1]["task_id"]


async def test_a_first_post_with_an_idempotency_conflict_created_nothing(
    engine: EngineHarness,
) -> None:
    async with KreaClient("emulator", base_url=engine.emulator.url) as client:
        key = f"krea-{make_request().request_key}-1"
        await client.submit(make_request("another body"), idempotency_key=key)
    report = await engine.run([make_request()])
    record = engine.record(make_request())
    assert (record.state, record.submissions) == (State.STORED, 2)
    assert (report.posts, report.progress.left) == (2, 0)
    assert [charge.charged_units for charge in engine.journal.charges()] == [0, 4500]


async def _left_unknown(engine: EngineHarness) -> str:
    """Leave an outcome unknown whose task exists; returns the task's id."""
    engine.emulator.world.script("drop_after_create")
    await engine.run([make_request()], on_unknown="hold")
    (task,) = engine.assert_accounts_agree()["tasks"]
    return str(task["task_id"])


async def test_a_person_who_finds_the_task_has_its_image_without_a_purchase(
    engine: EngineHarness,
) -> None:
    task_id = await _left_unknown(engine)
    decided = {make_request().request_key: HasTask(task_id)}
    report = await engine.run([make_request()], "run-2", on_unknown="hold", resolutions=decided)
    assert (report.posts, report.progress.delivered) == (0, 1)
    assert engine.record(make_request()).task_id == task_id


async def test_a_repeat_that_a_person_decides_gets_the_same_task(engine: EngineHarness) -> None:
    task_id = await _left_unknown(engine)
    decided = {make_request().request_key: SendAgain()}
    report = await engine.run([make_request()], "run-2", on_unknown="hold", resolutions=decided)
    assert (report.posts, report.progress.delivered) == (1, 1)
    assert engine.record(make_request()).task_id == task_id
    engine.assert_accounts_agree()


async def test_a_purchase_declared_as_not_charged_is_bought_under_the_next_key(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("drop_before_create")
    await engine.run([make_request()], on_unknown="hold")
    decided = {make_request().request_key: NotBought()}
    await engine.run([make_request()], "run-2", on_unknown="hold", resolutions=decided)
    record = engine.record(make_request())
    assert (record.state, record.submissions) == (State.STORED, 2)
    first, second = engine.journal.charges()
    assert (first.charged_units, first.committed_units) == (0, 0)
    assert (second.number, second.charged_units) == (2, 4500)
    assert engine.assert_accounts_agree()["creates"] == 1


async def test_a_purchase_declared_as_lost_ends_without_another(engine: EngineHarness) -> None:
    await _left_unknown(engine)
    decided = {make_request().request_key: Lost()}
    report = await engine.run([make_request()], "run-2", resolutions=decided)
    assert (report.posts, engine.record(make_request()).state) == (0, State.EXPIRED)


# -- failed tasks -----------------------------------------------------------------------------


async def test_a_task_that_failed_for_lack_of_capacity_is_bought_again_under_a_new_key(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("fail", arg="resource_exhausted")
    report = await engine.run([make_request()], task_error_waits={"resource_exhausted": (0.0, 0.1)})
    assert report.progress == Progress(total=1, delivered=1, charged_units=4500)
    first, second = engine.assert_accounts_agree()["tasks"]
    assert first["idempotency_key"].endswith("-1")
    assert second["idempotency_key"].endswith("-2")


async def test_a_task_that_always_fails_is_bought_three_times_for_nothing(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("fail", 10, arg="service_error")
    report = await engine.run([make_request()], task_error_waits={"service_error": (0.0, 0.1)})
    assert (report.posts, report.progress) == (3, Progress(total=1, failed=1))
    assert engine.assert_accounts_agree()["charged_units"] == 0


class FakeClient:
    """A client with the answers of a test, which no server can be made to give."""

    batch_supported: bool | None = False

    def __init__(self, answer: Callable[[str], Task]) -> None:
        self._answer = answer
        self.posts: list[str] = []

    async def submit(
        self, request: ImageRequest, *, idempotency_key: str, callback_url: str | None = None
    ) -> Submission:
        self.posts.append(idempotency_key)
        task_id = f"task-unified-{len(self.posts)}"
        return Submission(task_id, "pending", 4500, None, None, replayed=False, answer={})

    async def task(self, task_id: str) -> Task:
        return self._answer(task_id)

    async def tasks(self, task_ids: Sequence[str]) -> dict[str, Task]:
        raise AssertionError("single reads only")

    async def credits(self) -> AccountCredits:
        now = datetime.now(timezone.utc)
        return AccountCredits(0, 0, None, None, token_unlimited=True, read_at=now)

    async def download(
        self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
    ) -> DownloadedFile:
        raise NoUsableBody("503")

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[FakeClient]:
        yield self


@pytest.mark.parametrize("code", REPEATABLE_TASK_ERRORS)
async def test_a_cancelled_task_is_never_bought_again_for_any_code(
    engine: EngineHarness, code: str
) -> None:
    """Whether it was charged is not known."""

    def cancelled(task_id: str) -> Task:
        return Task(task_id, "cancelled", 0, failure=TaskFailure(code, "sorry"))

    client = FakeClient(cancelled)
    report = await engine.run([make_request()], connect=client.connected)
    record = engine.record(make_request())
    assert (record.state, record.error_code) == (State.FAILED, "request_cancelled")
    assert code in (record.error_message or "")
    assert (record.charged_units, len(client.posts), report.progress.failed) == (None, 1, 1)


async def test_a_cancelled_task_that_a_person_requests_again_stays_committed(
    engine: EngineHarness,
) -> None:
    """The first one may have been charged, so the caps count both."""
    engine.emulator.world.script("cancelled")
    await engine.run([make_request()])
    report = await engine.run(
        [make_request()], "run-2", retry_codes=frozenset({"request_cancelled"})
    )
    assert report.progress.delivered == 1
    day = next(scope for scope in committed(engine) if scope.startswith("day:"))
    assert committed(engine)[day] == 2 * 4500 == sum(charged(engine))


def committed(engine: EngineHarness) -> dict[str, int]:
    return {row["scope"]: row["committed_units"] for row in rows(engine.url, schema.commitments)}


def charged(engine: EngineHarness) -> list[int]:
    return [row["committed_units"] for row in rows(engine.url, schema.submissions)]


async def test_a_download_that_fails_while_the_task_cannot_be_read_keeps_its_link(
    engine: EngineHarness,
) -> None:
    answered: list[str] = []

    def once(task_id: str) -> Task:
        answered.append(task_id)
        if len(answered) > 1:
            raise TaskNotFound("gone", status=404, code="task_not_found")
        return Task(task_id, "completed", 100, ("https://files.test/a.png",))

    client = FakeClient(once)
    report = await engine.run([make_request()], connect=client.connected)
    record = engine.record(make_request())
    assert (record.state, record.result_url) == (State.COMPLETED, "https://files.test/a.png")
    assert report.left[make_request().request_key].startswith("not stored")


# -- too many requests ------------------------------------------------------------------------


async def test_retry_after_pauses_the_whole_run(engine: EngineHarness) -> None:
    """No row is posted before the second is over."""
    engine.emulator.world.script("429", arg=1)
    started_s = time.monotonic()
    report = await engine.run(make_requests(4), max_in_flight=1)
    assert time.monotonic() - started_s >= 1.0
    assert (report.posts, report.progress.delivered) == (5, 4)
    events = [
        (at, event)
        for r in make_requests(4)
        for at, event, _ in engine.journal.history(r.request_key)
    ]
    turned_away = next(at for at, event in events if event is Event.TURNED_AWAY)
    later = [at for at, event in events if event is Event.SUBMITTING and at > turned_away]
    assert len(later) == 4
    assert min(later).timestamp() - turned_away.timestamp() >= 0.95


async def test_a_server_with_few_places_is_not_flooded(tmp_path: Path) -> None:
    """A rate-limited row keeps its place while it waits: no other is sent instead."""
    with open_harness(tmp_path, max_concurrent=2, latency_s=0.1) as engine:
        engine.emulator.world.set_rate("fail", 1.0, arg="invalid_parameters")
        report = await engine.run(make_requests(24), wait_scale=0.1)
        assert report.progress.failed == 24
        stats = engine.assert_accounts_agree()
        assert stats["creates"] == 24
        assert stats["submit_posts"] < 24 * 5


async def test_a_rate_limited_run_stops_only_after_its_patience_without_a_purchase(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("429_empty", 100_000)
    report = await engine.run(make_requests(2), patience_s=0.3)
    assert report.progress.left == 2
    assert all("has taken nothing for" in reason for reason in report.left.values())
    assert set(engine.states(make_requests(2))) <= {"planned", "deferred"}
    engine.emulator.world.forget_scripts()
    assert (await engine.run(make_requests(2), "run-2")).progress.delivered == 2


async def test_one_refusal_after_a_long_pause_does_not_stop_the_run(engine: EngineHarness) -> None:
    """The row waits for a slow task, longer than the patience; then it is rate-limited once."""
    engine.emulator.world.script("stuck", match="slow")
    engine.emulator.world.script("429_empty", match="late")
    report = await engine.run(
        [make_request("slow"), make_request("late")], patience_s=0.4, max_in_flight=1
    )
    assert engine.record(make_request("late")).state is State.STORED
    assert list(report.left) == [make_request("slow").request_key]


# -- an outage --------------------------------------------------------------------------------


async def test_a_server_that_cannot_be_reached_costs_nothing(tmp_path: Path) -> None:
    with open_harness(tmp_path) as engine:
        engine.emulator.stop()
        report = await engine.run(make_requests(2), outage_patience_s=0.3)
        assert report.progress == Progress(total=2, left=2)
        assert isinstance(report.stopped, TryLater)
        assert all("EvoLink's API was away" in reason for reason in report.left.values())
        assert engine.states(make_requests(2)) == ["planned", "planned"]
        assert report.posts <= 2, "no row is tried again and again"


async def test_an_outage_of_the_server_does_not_make_the_whole_table_unknown(
    engine: EngineHarness,
) -> None:
    """Each unknown outcome may be a charge, and under hold each needs a person."""
    engine.emulator.world.set_rate("500", 1.0)
    report = await engine.run(make_requests(40), on_unknown="hold", patience_s=0.3)
    states = engine.states(make_requests(40))
    assert states.count("unknown") < 30
    assert states.count("unknown") + states.count("planned") == 40
    assert report.stopped is not None
    assert report.stopped.code == "no_usable_answer"
    assert engine.emulator.stats()["submit_posts"] == states.count("unknown")


async def test_after_an_outage_the_rows_that_it_held_back_are_bought(engine: EngineHarness) -> None:
    engine.emulator.world.set_rate("500", 1.0)
    await engine.run(make_requests(20), patience_s=0.3)
    engine.emulator.world.set_rate("500", 0.0)
    await engine.run(make_requests(20))
    assert engine.states(make_requests(20)) == ["stored"] * 20
    assert engine.emulator.stats()["bodies_bought_more_than_once"] == 0


async def test_an_image_given_up_as_lost_is_collected_when_the_server_knows_it_after_all(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.set_rate("read_404", 1.0)
    await engine.run(make_requests(1), gone_after_s=0.0)
    assert engine.states(make_requests(1)) == ["expired"]
    engine.emulator.world.set_rate("read_404", 0.0)

    await engine.run(make_requests(1), "run-2")
    assert engine.states(make_requests(1)) == ["stored"]
    assert engine.record(make_requests(1)[0]).charged_units == 4500
    assert engine.assert_accounts_agree()["submit_posts"] == 1


# -- a stop -----------------------------------------------------------------------------------


async def _stopped(
    engine: EngineHarness, requests: Sequence[ImageRequest], when: Callable[[], bool]
) -> None:
    """Run until something has happened, then cancel."""
    task = asyncio.ensure_future(engine.run(requests, max_in_flight=4))
    await wait_until(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError), anyio.fail_after(60):
        await task


async def test_a_stopped_run_writes_its_answers_and_the_next_one_completes(
    engine: EngineHarness,
) -> None:
    requests = make_requests(7)
    await _stopped(engine, requests, lambda: engine.emulator.stats(tasks=False)["creates"] >= 2)
    stats = engine.assert_accounts_agree()
    assert 2 <= stats["creates"] < 7
    states = Counter(engine.states(requests))
    assert not {"submitting", "unknown"} & set(states)
    assert {record.claimed_by for record in engine.journal.all_records()} == {None}
    assert not [name for name in engine.files() if name.startswith(".partial")]
    report = await engine.run(requests, "run-2")
    assert report.posts == 7 - stats["creates"]
    assert engine.states(requests) == ["stored"] * 7
    assert engine.assert_accounts_agree()["creates"] == 7


async def test_a_stop_waits_for_the_answer_of_a_post_under_way(engine: EngineHarness) -> None:
    engine.emulator.world.script("delay_create", arg=0.5)
    await _stopped(engine, [make_request()], lambda: engine.emulator.stats()["creates"] == 1)
    (task,) = engine.assert_accounts_agree()["tasks"]
    record = engine.record(make_request())
    assert (record.state, record.task_id) == (State.SUBMITTED, task["task_id"])
    assert (await engine.run([make_request()], "run-2")).posts == 0


class Held(Journal):
    """A journal whose next events are held up until a test lets them through."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.reached = threading.Event()
        self.let_through = threading.Event()

    def append(self, changes: Sequence[Change], *args: Any, **who: Any) -> list[Any]:
        self.reached.set()
        self.let_through.wait(10)
        return super().append(changes, *args, **who)


async def test_a_stop_ends_submitting_at_once(engine: EngineHarness) -> None:
    """A request with only its intent written is not sent, and goes back to planned."""
    requests = make_requests(12)
    with closing(Held(engine.url)) as held:
        task = asyncio.ensure_future(engine.run(requests, journal=held))
        await wait_until(held.reached.is_set)
        task.cancel()
        await anyio.sleep(0.05)
        held.let_through.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert engine.assert_accounts_agree()["submit_posts"] == 0
    assert set(engine.states(requests)) == {"planned"}
    assert Event.TURNED_AWAY in engine.events(requests[0])
    assert (await engine.run(requests[:2], "run-2")).progress.delivered == 2


async def test_a_stop_does_not_wait_for_tasks_or_pauses(engine: EngineHarness) -> None:
    engine.emulator.world.script("stuck", 2, match="stuck")
    engine.emulator.world.script("429", 100, arg=3600)
    requests = [make_request("stuck 1"), make_request("stuck 2"), make_request("turned away")]

    def all_wait() -> bool:
        return bool(engine.emulator.stats(tasks=False)["submit_posts"])

    await _stopped(engine, requests, all_wait)
    assert not {"submitting", "unknown"} & set(engine.states(requests))


async def test_a_price_above_the_expected_one_is_reported_and_used(engine: EngineHarness) -> None:
    """Before an account's first answer the published price is expected; this one pays more."""
    runner = engine.runner()

    class PriceRaised(KreaClient):
        async def submit(self, *args: Any, **kwargs: Any) -> Submission:
            taken = await super().submit(*args, **kwargs)
            return replace(taken, credits_reserved_units=9000)

    client = PriceRaised("emulator", base_url=engine.emulator.url)
    report = await replace(runner, connect=lambda: client).run(to_requested(make_requests(1)))
    assert report.price_increases == ("1K costs 0.9 credits, and 0.45 were expected",)
    assert engine.journal.prices.highest() == {"1K": 9000}

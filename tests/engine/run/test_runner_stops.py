"""What ends a run early, and what the next one makes of it: the account, a stop, an outage."""

# ruff: noqa: ARG002 - doubles take all that their interface gives them

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
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
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import Fetched
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
from tests.engine.harness import House, as_wanted, asked, house, rows, several, until

pytestmark = pytest.mark.anyio


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path) as opened:
        yield opened


# -- the account ------------------------------------------------------------------------------


async def test_an_empty_account_stops_buying_and_what_is_paid_is_finished(home: House) -> None:
    requests = several(6)
    home.emulator.world.set_quota(3 * 0.45)
    report = await home.run(requests, max_in_flight=2)
    assert isinstance(report.stopped, OutOfCredits)
    assert Counter(home.states(requests)) == {"stored": 3, "deferred": 3}
    assert report.progress == Progress(total=6, delivered=3, left=3, charged_units=3 * 4500)
    assert len(report.left) == 3
    assert all("account stopped the run" in reason for reason in report.left.values())
    # Those under way were refused too; the others were not even asked for.
    assert home.agree()["submit_posts"] <= 5

    home.emulator.world.set_quota(None)
    topped_up = await home.run(requests, "run-2")
    assert topped_up.progress == Progress(total=6, reused=3, delivered=3, charged_units=3 * 4500)
    assert home.agree()["creates"] == 6


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("unauthorized", KeyRejected),
        ("insufficient_quota", OutOfCredits),
        ("model_denied", ModelDenied),
    ],
)
async def test_an_answer_that_concerns_the_account_stops_buying_for_all(
    home: House, fault: str, error: type[AccountStopped]
) -> None:
    home.emulator.world.script(fault, 100)
    report = await home.run(several(20), max_in_flight=2)
    assert isinstance(report.stopped, error)
    assert set(home.states(several(20))) == {"deferred"}
    record = home.record(asked(seed=1))
    assert record.error_code
    assert record.error_message
    assert home.agree()["submit_posts"] <= 3


async def test_an_unknown_outcome_stays_unknown_when_its_repeat_finds_an_empty_account(
    home: House,
) -> None:
    """That the repeat was refused does not say that the first was."""
    home.emulator.world.script("drop_after_create")
    home.emulator.world.script("insufficient_quota")
    report = await home.run([asked()])
    assert home.record(asked()).state is State.UNKNOWN
    assert report.progress.left == 1
    again = await home.run([asked()], "run-2")
    assert (again.posts, again.progress.delivered) == (1, 1)
    assert home.agree()["creates"] == 1


@pytest.mark.parametrize("fault", ["content_refused", "too_large_413", "429"])
async def test_an_unknown_outcome_stays_unknown_whatever_refuses_its_repeat(
    home: House, fault: str
) -> None:
    home.emulator.world.script("reset_after_create")
    home.emulator.world.script(fault, 100_000, arg=0 if fault == "429" else None)
    report = await home.run([asked()], replay_tries=2, patience_s=1.0)
    record = home.record(asked())
    assert (record.state, record.charged_units) == (State.UNKNOWN, None)
    assert asked().request_key in report.left
    assert home.agree()["creates"] == 1


# -- unknown outcomes -------------------------------------------------------------------------


async def test_a_purchase_that_was_cut_off_is_found_again_by_its_key(home: House) -> None:
    home.emulator.world.script("drop_after_create")
    report = await home.run([asked()])
    assert (report.posts, report.progress.delivered) == (2, 1)
    assert home.agree()["replays"] == 1
    accepted = next(
        data
        for _, event, data in home.journal.history(asked().request_key)
        if event is Event.ACCEPTED
    )
    assert accepted["replayed"] is True


async def test_under_hold_an_unknown_outcome_is_posted_once_and_kept_for_a_person(
    home: House,
) -> None:
    home.emulator.world.script("drop_after_create", match="a fox")
    report = await home.run([asked(), asked("a hen")], on_unknown="hold")
    assert home.states([asked(), asked("a hen")]) == ["unknown", "stored"]
    assert "a person decides" in report.left[asked().request_key]
    await home.run([asked(), asked("a hen")], "run-2", on_unknown="hold")
    assert home.agree()["submit_posts"] == 2


async def test_a_server_that_knows_no_idempotency_sells_a_repeat_again(tmp_path: Path) -> None:
    """Why hold exists: the books show it, and the journal knows the task that it was told."""
    with house(tmp_path, idempotency=False) as home:
        home.emulator.world.script("drop_after_create")
        await home.run([asked()])
        books = home.emulator.stats()
        assert (books["creates"], books["bodies_bought_more_than_once"]) == (2, 1)
        assert home.record(asked()).task_id == books["tasks"][1]["task_id"]


async def test_a_first_post_whose_key_the_server_knows_for_another_body_created_nothing(
    home: House,
) -> None:
    async with KreaClient("emulator", base_url=home.emulator.url) as client:
        key = f"krea-{asked().request_key}-1"
        await client.submit(asked("another body"), idempotency_key=key)
    report = await home.run([asked()])
    record = home.record(asked())
    assert (record.state, record.submissions) == (State.STORED, 2)
    assert (report.posts, report.progress.left) == (2, 0)
    assert [charge.charged_units for charge in home.journal.charges()] == [0, 4500]


async def _left_unknown(home: House) -> str:
    """Leave an outcome unknown whose task exists; returns the task's id."""
    home.emulator.world.script("drop_after_create")
    await home.run([asked()], on_unknown="hold")
    (task,) = home.agree()["tasks"]
    return str(task["task_id"])


async def test_a_person_who_finds_the_task_has_its_image_without_a_purchase(home: House) -> None:
    task_id = await _left_unknown(home)
    decided = {asked().request_key: HasTask(task_id)}
    runner = replace(home.runner("run-2", on_unknown="hold"), resolutions=decided)
    report = await runner.run(as_wanted([asked()]))
    assert (report.posts, report.progress.delivered) == (0, 1)
    assert home.record(asked()).task_id == task_id


async def test_a_person_who_has_it_sent_again_gets_the_same_task(home: House) -> None:
    task_id = await _left_unknown(home)
    decided = {asked().request_key: SendAgain()}
    runner = replace(home.runner("run-2", on_unknown="hold"), resolutions=decided)
    report = await runner.run(as_wanted([asked()]))
    assert (report.posts, report.progress.delivered) == (1, 1)
    assert home.record(asked()).task_id == task_id
    home.agree()


async def test_what_a_person_says_was_not_charged_is_bought_under_the_next_key(
    home: House,
) -> None:
    home.emulator.world.script("drop_before_create")
    await home.run([asked()], on_unknown="hold")
    decided = {asked().request_key: NotBought()}
    runner = replace(home.runner("run-2", on_unknown="hold"), resolutions=decided)
    await runner.run(as_wanted([asked()]))
    record = home.record(asked())
    assert (record.state, record.submissions) == (State.STORED, 2)
    first, second = home.journal.charges()
    assert (first.charged_units, first.committed_units) == (0, 0)
    assert (second.number, second.charged_units) == (2, 4500)
    assert home.agree()["creates"] == 1


async def test_a_person_who_gives_it_up_ends_it_without_a_purchase(home: House) -> None:
    await _left_unknown(home)
    decided = {asked().request_key: Lost()}
    runner = replace(home.runner("run-2"), resolutions=decided)
    report = await runner.run(as_wanted([asked()]))
    assert (report.posts, home.record(asked()).state) == (0, State.EXPIRED)


# -- failed tasks -----------------------------------------------------------------------------


async def test_a_task_that_failed_for_want_of_capacity_is_bought_again_under_a_new_key(
    home: House,
) -> None:
    home.emulator.world.script("fail", arg="resource_exhausted")
    report = await home.run([asked()], task_error_waits={"resource_exhausted": (0.0, 0.1)})
    assert report.progress == Progress(total=1, delivered=1, charged_units=4500)
    first, second = home.agree()["tasks"]
    assert first["idempotency_key"].endswith("-1")
    assert second["idempotency_key"].endswith("-2")


async def test_a_task_that_always_fails_is_bought_three_times_for_nothing(home: House) -> None:
    home.emulator.world.script("fail", 10, arg="service_error")
    report = await home.run([asked()], task_error_waits={"service_error": (0.0, 0.1)})
    assert (report.posts, report.progress) == (3, Progress(total=1, failed=1))
    assert home.agree()["charged_units"] == 0


class Told:
    """A client that answers what a test says, where no server can be made to say it."""

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
    ) -> Fetched:
        raise NoUsableBody("503")

    @asynccontextmanager
    async def connected(self) -> AsyncIterator[Told]:
        yield self


@pytest.mark.parametrize("code", REPEATABLE_TASK_ERRORS)
async def test_a_cancelled_task_is_never_bought_again_whatever_code_it_carries(
    home: House, code: str
) -> None:
    """Whether it was charged is not known."""

    def cancelled(task_id: str) -> Task:
        return Task(task_id, "cancelled", 0, failure=TaskFailure(code, "sorry"))

    client = Told(cancelled)
    report = await replace(home.runner(), connect=client.connected).run(as_wanted([asked()]))
    record = home.record(asked())
    assert (record.state, record.error_code) == (State.FAILED, "request_cancelled")
    assert code in (record.error_message or "")
    assert (record.charged_units, len(client.posts), report.progress.failed) == (None, 1, 1)


async def test_a_cancelled_task_that_a_person_asks_for_again_stays_committed(home: House) -> None:
    """The first one may have been charged, so the caps go on to count it beside the second."""
    home.emulator.world.script("cancelled")
    await home.run([asked()])
    report = await home.run([asked()], "run-2", ask_again=frozenset({"request_cancelled"}))
    assert report.progress.delivered == 1
    day = next(scope for scope in committed(home) if scope.startswith("day:"))
    assert committed(home)[day] == 2 * 4500 == sum(charged(home))


def committed(home: House) -> dict[str, int]:
    return {row["scope"]: row["committed_units"] for row in rows(home.url, schema.commitments)}


def charged(home: House) -> list[int]:
    return [row["committed_units"] for row in rows(home.url, schema.submissions)]


async def test_a_download_that_fails_while_the_task_cannot_be_read_keeps_its_link(
    home: House,
) -> None:
    answered: list[str] = []

    def once(task_id: str) -> Task:
        answered.append(task_id)
        if len(answered) > 1:
            raise TaskNotFound("gone", status=404, code="task_not_found")
        return Task(task_id, "completed", 100, ("https://files.test/a.png",))

    client = Told(once)
    report = await replace(home.runner(), connect=client.connected).run(as_wanted([asked()]))
    record = home.record(asked())
    assert (record.state, record.result_url) == (State.COMPLETED, "https://files.test/a.png")
    assert report.left[asked().request_key].startswith("not stored")


# -- too many requests ------------------------------------------------------------------------


async def test_retry_after_is_honoured_by_the_whole_run(home: House) -> None:
    """Nobody posts before the second is over, also not for another row."""
    home.emulator.world.script("429", arg=1)
    started_s = time.monotonic()
    report = await home.run(several(4), max_in_flight=1)
    assert time.monotonic() - started_s >= 1.0
    assert (report.posts, report.progress.delivered) == (5, 4)
    events = [
        (at, event) for r in several(4) for at, event, _ in home.journal.history(r.request_key)
    ]
    turned_away = next(at for at, event in events if event is Event.TURNED_AWAY)
    later = [at for at, event in events if event is Event.SUBMITTING and at > turned_away]
    assert len(later) == 4
    assert min(later).timestamp() - turned_away.timestamp() >= 0.95


async def test_a_server_with_room_for_few_is_not_flooded(tmp_path: Path) -> None:
    """A row that is turned away keeps its place while it waits: no other is sent instead."""
    with house(tmp_path, max_concurrent=2, latency_s=0.1) as home:
        home.emulator.world.set_rate("fail", 1.0, arg="invalid_parameters")
        report = await home.run(several(24), wait_scale=0.1)
        assert report.progress.failed == 24
        books = home.agree()
        assert books["creates"] == 24
        assert books["submit_posts"] < 24 * 5


async def test_a_request_is_given_up_only_after_patience_without_a_single_purchase(
    home: House,
) -> None:
    home.emulator.world.script("429_empty", 100_000)
    report = await home.run(several(2), patience_s=0.3)
    assert report.progress.left == 2
    assert all("has taken nothing for" in reason for reason in report.left.values())
    assert set(home.states(several(2))) <= {"planned", "deferred"}
    home.emulator.world.forget_scripts()
    assert (await home.run(several(2), "run-2")).progress.delivered == 2


async def test_one_refusal_after_a_long_quiet_is_no_reason_to_give_up(home: House) -> None:
    """The row waits for a task that is slow, longer than patience; then it is turned away once."""
    home.emulator.world.script("stuck", match="slow")
    home.emulator.world.script("429_empty", match="late")
    report = await home.run([asked("slow"), asked("late")], patience_s=0.4, max_in_flight=1)
    assert home.record(asked("late")).state is State.STORED
    assert list(report.left) == [asked("slow").request_key]


# -- an outage --------------------------------------------------------------------------------


async def test_a_server_that_cannot_be_reached_costs_nothing(tmp_path: Path) -> None:
    with house(tmp_path) as home:
        home.emulator.stop()
        report = await home.run(several(2), outage_patience_s=0.3)
        assert report.progress == Progress(total=2, left=2)
        assert isinstance(report.stopped, TryLater)
        assert all("EvoLink's API was away" in reason for reason in report.left.values())
        assert home.states(several(2)) == ["planned", "planned"]
        assert report.posts <= 2, "no row is tried again and again"


async def test_an_outage_of_the_server_does_not_make_the_whole_table_unknown(home: House) -> None:
    """Each unknown outcome may be a charge, and under hold each needs a person."""
    home.emulator.world.set_rate("500", 1.0)
    report = await home.run(several(40), on_unknown="hold", patience_s=0.3)
    states = home.states(several(40))
    assert states.count("unknown") < 30
    assert states.count("unknown") + states.count("planned") == 40
    assert report.stopped is not None
    assert report.stopped.code == "no_usable_answer"
    assert home.emulator.stats()["submit_posts"] == states.count("unknown")


async def test_after_an_outage_what_it_kept_back_is_bought(home: House) -> None:
    home.emulator.world.set_rate("500", 1.0)
    await home.run(several(20), patience_s=0.3)
    home.emulator.world.set_rate("500", 0.0)
    await home.run(several(20))
    assert home.states(several(20)) == ["stored"] * 20
    assert home.emulator.stats()["bodies_bought_more_than_once"] == 0


async def test_what_was_given_up_as_lost_is_collected_when_the_server_knows_it_after_all(
    home: House,
) -> None:
    home.emulator.world.set_rate("read_404", 1.0)
    await home.run(several(1), gone_after_s=0.0)
    assert home.states(several(1)) == ["expired"]
    home.emulator.world.set_rate("read_404", 0.0)

    await home.run(several(1), "run-2")
    assert home.states(several(1)) == ["stored"]
    assert home.record(several(1)[0]).charged_units == 4500
    assert home.agree()["submit_posts"] == 1


# -- a stop -----------------------------------------------------------------------------------


async def _stopped(home: House, requests: Sequence[ImageRequest], when: Callable[[], bool]) -> None:
    """Run until something has happened, then cancel."""
    task = asyncio.ensure_future(home.run(requests, max_in_flight=4))
    await until(when)
    task.cancel()
    with pytest.raises(asyncio.CancelledError), anyio.fail_after(15):
        await task


async def test_a_stopped_run_writes_what_it_knows_and_the_next_one_completes(
    home: House,
) -> None:
    requests = several(7)
    await _stopped(home, requests, lambda: home.emulator.stats(tasks=False)["creates"] >= 2)
    books = home.agree()
    assert 2 <= books["creates"] < 7
    states = Counter(home.states(requests))
    assert not {"submitting", "unknown"} & set(states)
    assert {record.claimed_by for record in home.journal.all_records()} == {None}
    assert not [name for name in home.files() if name.startswith(".partial")]
    report = await home.run(requests, "run-2")
    assert report.posts == 7 - books["creates"]
    assert home.states(requests) == ["stored"] * 7
    assert home.agree()["creates"] == 7


async def test_a_stop_waits_for_the_answer_of_a_post_under_way(home: House) -> None:
    home.emulator.world.script("delay_create", arg=0.5)
    await _stopped(home, [asked()], lambda: home.emulator.stats()["creates"] == 1)
    (task,) = home.agree()["tasks"]
    record = home.record(asked())
    assert (record.state, record.task_id) == (State.SUBMITTED, task["task_id"])
    assert (await home.run([asked()], "run-2")).posts == 0


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


async def test_a_stop_ends_submitting_at_once(home: House) -> None:
    """What had only its intent written is not sent any more, and goes back to planned."""
    requests = several(12)
    with closing(Held(home.url)) as held:
        runner = replace(home.runner(), journal=held)
        task = asyncio.ensure_future(runner.run(as_wanted(requests)))
        await until(held.reached.is_set)
        task.cancel()
        await anyio.sleep(0.05)
        held.let_through.set()
        with pytest.raises(asyncio.CancelledError):
            await task
    assert home.agree()["submit_posts"] == 0
    assert set(home.states(requests)) == {"planned"}
    assert Event.TURNED_AWAY in home.events(requests[0])
    assert (await home.run(requests[:2], "run-2")).progress.delivered == 2


async def test_a_stop_does_not_wait_for_tasks_or_pauses(home: House) -> None:
    home.emulator.world.script("stuck", 2, match="stuck")
    home.emulator.world.script("429", 100, arg=3600)
    requests = [asked("stuck 1"), asked("stuck 2"), asked("turned away")]

    def all_wait() -> bool:
        return bool(home.emulator.stats(tasks=False)["submit_posts"])

    started_s = time.monotonic()
    await _stopped(home, requests, all_wait)
    assert time.monotonic() - started_s < 5.0
    assert not {"submitting", "unknown"} & set(home.states(requests))


async def test_a_price_above_the_expected_one_is_reported_and_reckoned_with(home: House) -> None:
    """Before an account's first answer the published price is expected; this one pays more."""
    runner = home.runner()

    class Dearer(KreaClient):
        async def submit(self, *args: Any, **kwargs: Any) -> Submission:
            taken = await super().submit(*args, **kwargs)
            return replace(taken, credits_reserved_units=9000)

    client = Dearer("emulator", base_url=home.emulator.url)
    report = await replace(runner, connect=lambda: client).run(as_wanted(several(1)))
    assert report.dearer == ("1K costs 0.9 credits, and 0.45 were expected",)
    assert home.journal.highest_prices() == {"1K": 9000}

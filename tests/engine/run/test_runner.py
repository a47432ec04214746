"""A run: every request is bought once, fetched and verified, whatever ran before or beside it."""

# ruff: noqa: ARG002 - doubles take all that their interface gives them

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.run.progress import Progress
from krea_dagster.engine.run.runner import Wanted
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import JournalError
from tests.engine.harness import (
    NOW,
    ClockAhead,
    Hand,
    House,
    ServerClock,
    as_wanted,
    asked,
    house,
    rows,
    several,
    until,
)

pytestmark = pytest.mark.anyio


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    with house(tmp_path) as opened:
        yield opened


async def test_a_run_delivers_every_image_and_its_charge(home: House) -> None:
    requests = [*several(3), asked("a hen", quality="2K", size="1:1")]
    report = await home.run(requests)
    assert (report.new, report.posts, report.left, report.stopped) == (4, 4, {}, None)
    assert report.progress == Progress(total=4, delivered=4, charged_units=3 * 4500 + 18000)
    for request in requests:
        record = home.record(request)
        assert record.state is State.STORED
        assert record.image is not None
        assert (record.image.width, record.image.height) == request.pixels
        assert record.reserved_units == record.charged_units
        assert record.billing_rule == "per_call"
        assert record.run_id == "run-1"
        assert home.events(request) == [
            Event.PLANNED,
            Event.SUBMITTING,
            Event.ACCEPTED,
            Event.COMPLETED,
            Event.STORED,
        ]
    books = home.agree()
    assert books["creates"] == 4
    assert books["charged_units"] == report.progress.charged_units
    assert len(home.files()) == 4


async def test_the_file_is_the_picture_that_the_server_made(home: House) -> None:
    await home.run([asked()])
    (task,) = home.agree()["tasks"]
    image = home.record(asked()).image
    assert image is not None
    assert image.sha256 == task["file_sha256"]


async def test_the_intent_is_on_disk_before_the_post_and_the_answer_before_anything_else(
    home: House,
) -> None:
    await home.run([asked()])
    history = home.journal.history(asked().request_key)
    (task,) = home.agree()["tasks"]
    at = {event: when.timestamp() for when, event, _ in history}
    assert at[Event.SUBMITTING] <= task["created_at"] <= at[Event.ACCEPTED]
    kept = next(data for _, event, data in history if event is Event.ACCEPTED)
    assert kept["answer"]["id"] == task["task_id"]
    assert kept["answer"]["usage"]["credits_reserved"] == 0.45


async def test_a_second_run_over_the_same_rows_asks_nothing_and_buys_nothing(
    home: House,
) -> None:
    await home.run(several(3))
    before = home.emulator.stats()
    report = await home.run(several(3), "run-2")
    assert report.progress == Progress(total=3, reused=3)
    assert (report.new, report.posts, report.asked) == (0, 0, 0)
    assert home.emulator.stats() == before


async def test_a_second_run_buys_only_what_is_new_in_any_order(home: House) -> None:
    await home.run(several(2))
    report = await home.run([*reversed(several(3))], "run-2")
    assert report.progress == Progress(total=3, reused=2, delivered=1, charged_units=4500)
    assert home.agree()["submit_posts"] == 3
    assert [home.record(request).run_id for request in several(3)] == ["run-1", "run-1", "run-2"]


async def test_rows_that_ask_for_the_same_image_share_one_purchase(home: House) -> None:
    wanted = [Wanted(asked(), "a"), Wanted(asked(), "b", rows=2), Wanted(asked("a hen"), "b")]
    report = await home.runner().run(wanted)
    assert report.progress == Progress(total=4, delivered=4, charged_units=9000)
    assert home.agree()["creates"] == 2


async def test_a_run_of_nothing_opens_no_connection(home: House) -> None:
    home.emulator.stop()
    report = await home.run([])
    assert report.progress == Progress(total=0)


async def test_progress_ends_at_the_total_and_never_falls(home: House) -> None:
    seen: list[Progress] = []
    await home.run(several(40), on_progress=seen.append, max_in_flight=2)
    assert [p.ended for p in seen] == sorted(p.ended for p in seen)
    assert seen[-1].ended == seen[-1].total == 40
    assert max(p.in_flight for p in seen) == 2


async def test_never_more_tasks_are_at_the_server_than_allowed(tmp_path: Path) -> None:
    with house(tmp_path, max_concurrent=2) as home:
        report = await home.run(several(6), max_in_flight=2)
        assert (report.posts, report.progress.delivered) == (6, 6)
        assert home.agree()["refused"] == 0


# -- files ------------------------------------------------------------------------------------


async def test_a_missing_or_shortened_file_is_fetched_again_and_not_bought(
    home: House,
) -> None:
    requests = several(3)
    await home.run(requests)
    files = home.files()
    (home.folder / files[0]).unlink()
    (home.folder / files[1]).write_bytes(b"cut")
    report = await home.run(requests, "run-2")
    assert (report.posts, report.progress) == (0, Progress(total=3, reused=1, delivered=2))
    books = home.agree()
    assert (books["creates"], books["file_gets"]) == (3, 5)
    assert home.files() == files


async def test_a_missing_file_whose_link_is_dead_comes_by_a_fresh_link(tmp_path: Path) -> None:
    clock = ServerClock()
    with house(tmp_path, link_lifetime_s=3600, clock=clock) as home:
        await home.run([asked()])
        (home.folder / home.files()[0]).unlink()
        clock.move(3601)
        report = await home.run([asked()], "run-2")
        assert (report.posts, report.progress.delivered) == (0, 1)
        assert home.agree()["charged_units"] == 4500


async def test_an_image_of_which_neither_task_nor_link_is_left_is_paid_and_lost_and_says_so(
    tmp_path: Path,
) -> None:
    clock = ServerClock()
    with house(tmp_path, link_lifetime_s=3600, task_lifetime_s=3600, clock=clock) as home:
        await home.run([asked()])
        (home.folder / home.files()[0]).unlink()
        clock.move(3601)
        report = await home.run([asked()], "run-2", link_life_s=0.0)
        record = home.record(asked())
        assert record.state is State.EXPIRED
        assert (record.error_code, record.charged_units) == ("task_not_found", 4500)
        assert (report.posts, report.progress.failed) == (0, 1)
        again = await home.run([asked()], "run-3")
        assert (again.posts, again.progress.failed) == (0, 1)


# -- what a run before this one left ----------------------------------------------------------


async def test_a_task_that_an_earlier_run_left_is_collected_without_a_purchase(
    tmp_path: Path,
) -> None:
    clock = ServerClock()
    with house(tmp_path, clock=clock) as home:
        home.emulator.world.script("slow_task", arg=3600)
        first = await home.run([asked()], patience_s=0.05)
        assert first.progress.left == 1
        assert first.left[asked().request_key].startswith("detached: not finished")
        assert home.record(asked()).state is State.SUBMITTED
        clock.move(3601)
        second = await home.run([asked()], "run-2", patience_s=0.05)
        assert (second.posts, second.progress.delivered) == (0, 1)
        assert home.agree()["creates"] == 1


async def test_patience_counts_from_the_submission_and_not_from_the_run(home: House) -> None:
    home.emulator.world.script("stuck")
    await home.run([asked()], patience_s=0.05)
    later = ClockAhead(timedelta(hours=5))
    report = await home.run([asked()], "run-2", clock=later, patience_s=3600)
    assert report.asked == 1
    assert "detached: not finished 18" in report.left[asked().request_key]
    home.agree()


async def test_a_run_that_ended_between_post_and_answer_left_an_unknown_outcome(
    home: House,
) -> None:
    """It is repeated under the same key, and the server knows it again."""
    hand = Hand(home.journal, "run-1")
    hand.bring(asked(), State.SUBMITTING)
    home.journal.release(hand.owner.owner)
    clock = ClockAhead(NOW + timedelta(hours=22) - SystemClock().now())
    report = await home.run([asked()], "run-2", clock=clock)
    assert (report.posts, report.progress.delivered) == (1, 1)
    (task,) = home.agree()["tasks"]
    assert task["idempotency_key"] == f"krea-{asked().request_key}-1"
    assert Event.OUTCOME_UNKNOWN in home.events(asked())


async def test_after_23_hours_an_unknown_outcome_waits_for_a_person(home: House) -> None:
    hand = Hand(home.journal, "run-1")
    hand.bring(asked(), State.SUBMITTING)
    home.journal.release(hand.owner.owner)
    clock = ClockAhead(NOW + timedelta(hours=23, minutes=1) - SystemClock().now())
    report = await home.run([asked()], "run-2", clock=clock)
    assert report.posts == 0
    assert "a person decides" in report.left[asked().request_key]
    assert home.record(asked()).state is State.UNKNOWN


# -- runs beside each other -------------------------------------------------------------------


async def test_two_runs_over_the_same_rows_at_the_same_time_buy_nothing_twice(
    home: House,
) -> None:
    requests = several(6)
    with closing(Journal(home.url)) as other_journal:
        other = replace(home.runner("run-2"), journal=other_journal)
        first, second = await asyncio.gather(
            home.run(requests[:5]), other.run(as_wanted(requests[1:]))
        )
    assert home.states(requests) == ["stored"] * 6
    assert first.posts + second.posts == 6
    assert first.progress.delivered == second.progress.delivered == 5
    assert home.agree()["creates"] == 6


async def test_runs_that_wait_for_each_others_rows_end(home: House) -> None:
    """Whoever waits lets go of what it has finished."""
    one, two = several(2)
    key_of_two = {two.request_key}
    third = Hand(home.journal, "third")
    third.plan(two)
    b_holds_two = anyio.Event()

    class Patient(SystemClock):
        """Run A looks after what others hold only once B holds the second row."""

        async def sleep(self, seconds: float) -> None:
            if seconds == 1.0:
                await b_holds_two.wait()
            await super().sleep(seconds / 10)

    class Quick(SystemClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds / 20)

    def watch(progress: Progress) -> None:
        holder = home.record(two).claimed_by
        if holder is not None and holder != third.owner.owner:
            b_holds_two.set()

    with anyio.fail_after(10):
        async with anyio.create_task_group() as runs:
            runs.start_soon(home.runner("A", clock=Patient()).run, as_wanted([one, two]))
            await until(lambda: _holds(home, one))
            quick = home.runner("B", clock=Quick(), on_progress=watch)
            runs.start_soon(quick.run, as_wanted([one, two]))
            await anyio.sleep(0.05)
            assert home.journal.claim(key_of_two, third.owner.owner) == key_of_two
            home.journal.release(third.owner.owner)
    assert home.states([one, two]) == ["stored", "stored"]
    assert home.agree()["creates"] == 2


def _holds(home: House, request: Any) -> bool:
    found = home.journal.records([request.request_key])
    return bool(found) and found[request.request_key].claimed_by is not None


async def test_a_run_leaves_no_claim_behind(home: House) -> None:
    await home.run(several(2))
    assert {record.claimed_by for record in home.journal.all_records()} == {None}
    assert rows(home.url, schema.owners) == []


# -- caps -------------------------------------------------------------------------------------


async def test_a_cap_is_not_passed_by_purchases_at_the_same_time(home: House) -> None:
    runner = replace(home.runner(), caps=Caps(run_units=3 * 4500))
    report = await runner.run(as_wanted(several(8)))
    assert (report.posts, report.progress.delivered, report.progress.left) == (3, 3, 5)
    assert len(report.caps_reached) == 1
    assert home.agree()["creates"] == 3
    assert home.states(several(8)).count("deferred") == 5


async def test_the_cap_of_a_day_holds_for_all_of_its_runs_together(home: House) -> None:
    caps = Caps(day_units=3 * 4500)
    first, second = await asyncio.gather(
        replace(home.runner("run-1"), caps=caps).run(as_wanted(several(3))),
        replace(home.runner("run-2"), caps=caps).run(as_wanted(several(3, start=3))),
    )
    assert first.posts + second.posts == home.agree()["creates"] == 3


# -- the journal fails ------------------------------------------------------------------------


async def test_a_journal_that_fails_in_the_background_ends_the_run_as_a_journal_error(
    home: House,
) -> None:
    """Here at the heartbeat, which no request waits for."""

    class Failing(Journal):
        def heartbeat(self, owner: str) -> None:
            raise JournalError("disk full")

    class Hurried(SystemClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds / 100)

    home.emulator.world.script("stuck", n=3)
    with closing(Failing(home.url)) as failing:
        runner = replace(home.runner(clock=Hurried()), journal=failing)
        with anyio.fail_after(10), pytest.raises(JournalError, match="disk full"):
            await runner.run(as_wanted(several(3)))
    assert home.agree()["creates"] == 3


def _drop(home: House, table: str) -> None:
    with closing(sqlite3.connect(home.folder / "journal.db")) as connection:
        connection.execute(f"drop table if exists {table}")
        connection.commit()


async def test_when_the_journal_cannot_be_written_nothing_more_is_bought(home: House) -> None:
    def spoil(progress: Progress) -> None:
        if progress.delivered:
            _drop(home, "events")

    with anyio.fail_after(20), pytest.raises(JournalError):
        await home.run(several(8), on_progress=spoil, max_in_flight=1)
    books = home.emulator.stats()
    assert books["creates"] < 8
    assert books["bodies_bought_more_than_once"] == 0


async def test_what_was_turned_away_leaves_its_room_under_the_cap_to_the_next_try(
    home: House,
) -> None:
    """While it was reserved, another row found the cap full."""
    home.emulator.world.script("429_empty", 2)
    report = await replace(home.runner(), caps=Caps(run_units=2 * 4500)).run(as_wanted(several(4)))
    assert report.progress.delivered == 2
    assert home.agree()["creates"] == 2

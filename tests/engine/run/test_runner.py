"""A run: every request is bought once, fetched and verified, also after and next to other runs."""

# ruff: noqa: ARG002 - doubles take all that their interface gives them

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import anyio
import pytest

from krea_dagster.engine.budget import Caps
from krea_dagster.engine.clock import SystemClock
from krea_dagster.engine.journal import schema
from krea_dagster.engine.journal.changes import Change
from krea_dagster.engine.journal.claim_log import ClaimLog
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.run.report import Progress
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import ImageStore
from krea_dagster.errors import JournalError, PurchasesNotWritten
from tests.engine.harness import (
    NOW,
    ClockAhead,
    EngineHarness,
    JournalWriter,
    ServerClock,
    make_request,
    make_requests,
    open_harness,
    rows,
    to_requested,
    wait_until,
)

pytestmark = pytest.mark.anyio


async def test_a_run_delivers_every_image_and_its_charge(engine: EngineHarness) -> None:
    requests = [*make_requests(3), make_request("a hen", quality="2K", size="1:1")]
    report = await engine.run(requests)
    assert (report.new, report.posts, report.left, report.stopped) == (4, 4, {}, None)
    assert report.progress == Progress(total=4, delivered=4, charged_units=3 * 4500 + 18000)
    for request in requests:
        record = engine.record(request)
        assert record.state is State.STORED
        assert record.image is not None
        assert (record.image.width, record.image.height) == request.pixels
        assert record.reserved_units == record.charged_units
        assert record.billing_rule == "per_call"
        assert record.run_id == "run-1"
        assert engine.events(request) == [
            Event.PLANNED,
            Event.SUBMITTING,
            Event.ACCEPTED,
            Event.COMPLETED,
            Event.STORED,
        ]
    stats = engine.assert_accounts_agree()
    assert stats["creates"] == 4
    assert stats["charged_units"] == report.progress.charged_units
    assert len(engine.files()) == 4


async def test_the_file_is_the_image_that_the_server_made(engine: EngineHarness) -> None:
    await engine.run([make_request()])
    (task,) = engine.assert_accounts_agree()["tasks"]
    image = engine.record(make_request()).image
    assert image is not None
    assert image.sha256 == task["file_sha256"]


async def test_the_intent_is_on_disk_before_the_post_and_the_answer_before_anything_else(
    engine: EngineHarness,
) -> None:
    await engine.run([make_request()])
    history = engine.journal.history(make_request().request_key)
    (task,) = engine.assert_accounts_agree()["tasks"]
    at = {event: when.timestamp() for when, event, _ in history}
    assert at[Event.SUBMITTING] <= task["created_at"] <= at[Event.ACCEPTED]
    kept = next(data for _, event, data in history if event is Event.ACCEPTED)
    assert kept["answer"]["id"] == task["task_id"]
    assert kept["answer"]["usage"]["credits_reserved"] == 0.45


async def test_a_completed_task_is_written_together_with_its_stored_image(
    engine: EngineHarness,
) -> None:
    written: list[list[Event]] = []

    class ListeningJournal(Journal):
        def append(self, changes: Sequence[Change], **who: Any) -> Any:
            written.append([change.event for change in changes])
            return super().append(changes, **who)

    await engine.run([make_request()], journal=ListeningJournal(engine.url))
    assert written == [[Event.SUBMITTING], [Event.ACCEPTED], [Event.COMPLETED, Event.STORED]]


async def test_a_run_that_is_stopped_during_a_download_has_written_the_completed_task(
    engine: EngineHarness,
) -> None:
    fetching = asyncio.Event()

    class EndlessDownloads(ImageStore):
        async def fetch(self, *arguments: Any, **options: Any) -> Any:
            fetching.set()
            await asyncio.Event().wait()

    run = asyncio.create_task(
        engine.run([make_request()], images=EndlessDownloads(engine.images.storage))
    )
    await fetching.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    record = engine.record(make_request())
    assert (record.state, record.charged_units) == (State.COMPLETED, 4500)
    report = await engine.run([make_request()], "run-2")
    assert (report.posts, report.tasks_read, report.progress.delivered) == (0, 0, 1)


async def test_a_second_run_over_the_same_rows_reads_nothing_and_buys_nothing(
    engine: EngineHarness,
) -> None:
    await engine.run(make_requests(3))
    before = engine.emulator.stats()
    report = await engine.run(make_requests(3), "run-2")
    assert report.progress == Progress(total=3, reused=3)
    assert (report.new, report.posts, report.tasks_read) == (0, 0, 0)
    assert engine.emulator.stats() == before


async def test_a_second_run_buys_only_what_is_new_in_any_order(engine: EngineHarness) -> None:
    await engine.run(make_requests(2))
    report = await engine.run([*reversed(make_requests(3))], "run-2")
    assert report.progress == Progress(total=3, reused=2, delivered=1, charged_units=4500)
    assert engine.assert_accounts_agree()["submit_posts"] == 3
    assert [engine.record(request).run_id for request in make_requests(3)] == [
        "run-1",
        "run-1",
        "run-2",
    ]


async def test_rows_that_request_the_same_image_share_one_purchase(engine: EngineHarness) -> None:
    wanted = [
        RequestedImage(make_request(), "a"),
        RequestedImage(make_request(), "b", rows=2),
        RequestedImage(make_request("a hen"), "b"),
    ]
    report = await engine.runner().run(wanted)
    assert report.progress == Progress(total=4, delivered=4, charged_units=9000)
    assert engine.assert_accounts_agree()["creates"] == 2


async def test_a_run_without_requests_opens_no_connection(engine: EngineHarness) -> None:
    engine.emulator.stop()
    report = await engine.run([])
    assert report.progress == Progress(total=0)


async def test_progress_ends_at_the_total_and_never_falls(engine: EngineHarness) -> None:
    seen: list[Progress] = []
    await engine.run(make_requests(40), on_progress=seen.append, max_in_flight=2)
    assert [p.ended for p in seen] == sorted(p.ended for p in seen)
    assert seen[-1].ended == seen[-1].total == 40
    assert max(p.in_flight for p in seen) == 2


async def test_never_more_tasks_are_at_the_server_than_allowed(tmp_path: Path) -> None:
    with open_harness(tmp_path, max_concurrent=2) as engine:
        report = await engine.run(make_requests(6), max_in_flight=2)
        assert (report.posts, report.progress.delivered) == (6, 6)
        assert engine.assert_accounts_agree()["refused"] == 0


# -- files ------------------------------------------------------------------------------------


async def test_a_missing_or_shortened_file_is_fetched_again_and_not_bought(
    engine: EngineHarness,
) -> None:
    requests = make_requests(3)
    await engine.run(requests)
    files = engine.files()
    (engine.folder / files[0]).unlink()
    (engine.folder / files[1]).write_bytes(b"cut")
    report = await engine.run(requests, "run-2")
    assert (report.posts, report.progress) == (0, Progress(total=3, reused=1, delivered=2))
    stats = engine.assert_accounts_agree()
    assert (stats["creates"], stats["file_gets"]) == (3, 5)
    assert engine.files() == files


async def test_a_missing_file_whose_link_is_dead_comes_by_a_fresh_link(tmp_path: Path) -> None:
    clock = ServerClock()
    with open_harness(tmp_path, link_lifetime_s=3600, clock=clock) as engine:
        await engine.run([make_request()])
        (engine.folder / engine.files()[0]).unlink()
        clock.move(3601)
        report = await engine.run([make_request()], "run-2")
        assert (report.posts, report.progress.delivered) == (0, 1)
        assert engine.assert_accounts_agree()["charged_units"] == 4500


async def test_an_image_whose_task_and_link_are_gone_is_recorded_as_paid_and_lost(
    tmp_path: Path,
) -> None:
    clock = ServerClock()
    with open_harness(tmp_path, link_lifetime_s=3600, task_lifetime_s=3600, clock=clock) as engine:
        await engine.run([make_request()])
        (engine.folder / engine.files()[0]).unlink()
        clock.move(3601)
        report = await engine.run([make_request()], "run-2", link_life_s=0.0)
        record = engine.record(make_request())
        assert record.state is State.EXPIRED
        assert (record.error_code, record.charged_units) == ("task_not_found", 4500)
        assert (report.posts, report.progress.failed) == (0, 1)
        again = await engine.run([make_request()], "run-3")
        assert (again.posts, again.progress.failed) == (0, 1)


# -- after an earlier run ---------------------------------------------------------------------


async def test_a_task_that_an_earlier_run_left_is_collected_without_a_purchase(
    tmp_path: Path,
) -> None:
    clock = ServerClock()
    with open_harness(tmp_path, clock=clock) as engine:
        engine.emulator.world.script("slow_task", arg=3600)
        first = await engine.run([make_request()], patience_s=0.05)
        assert first.progress.left == 1
        assert first.left[make_request().request_key].startswith("detached: not finished")
        assert engine.record(make_request()).state is State.SUBMITTED
        clock.move(3601)
        second = await engine.run([make_request()], "run-2", patience_s=0.05)
        assert (second.posts, second.progress.delivered) == (0, 1)
        assert engine.assert_accounts_agree()["creates"] == 1


async def test_patience_counts_from_the_submission_and_not_from_the_run(
    engine: EngineHarness,
) -> None:
    engine.emulator.world.script("stuck")
    await engine.run([make_request()], patience_s=0.05)
    later = ClockAhead(timedelta(hours=5))
    report = await engine.run([make_request()], "run-2", clock=later, patience_s=3600)
    assert report.tasks_read == 1
    assert "detached: not finished 18" in report.left[make_request().request_key]
    engine.assert_accounts_agree()


async def test_a_run_that_ended_between_post_and_answer_left_an_unknown_outcome(
    engine: EngineHarness,
) -> None:
    """It is repeated under the same key, and the server knows it again."""
    writer = JournalWriter(engine.journal, "run-1")
    writer.bring_to(make_request(), State.SUBMITTING)
    engine.journal.claims.release(writer.owner.owner)
    clock = ClockAhead(NOW + timedelta(hours=22) - SystemClock().now())
    report = await engine.run([make_request()], "run-2", clock=clock)
    assert (report.posts, report.progress.delivered) == (1, 1)
    (task,) = engine.assert_accounts_agree()["tasks"]
    assert task["idempotency_key"] == f"krea-{make_request().request_key}-1"
    assert Event.OUTCOME_UNKNOWN in engine.events(make_request())


async def test_after_23_hours_an_unknown_outcome_waits_for_a_person(engine: EngineHarness) -> None:
    writer = JournalWriter(engine.journal, "run-1")
    writer.bring_to(make_request(), State.SUBMITTING)
    engine.journal.claims.release(writer.owner.owner)
    clock = ClockAhead(NOW + timedelta(hours=23, minutes=1) - SystemClock().now())
    report = await engine.run([make_request()], "run-2", clock=clock)
    assert report.posts == 0
    assert "a person decides" in report.left[make_request().request_key]
    assert engine.record(make_request()).state is State.UNKNOWN


# -- parallel runs ----------------------------------------------------------------------------


async def test_two_runs_over_the_same_rows_at_the_same_time_buy_nothing_twice(
    engine: EngineHarness,
) -> None:
    requests = make_requests(6)
    with closing(Journal(engine.url)) as other_journal:
        first, second = await asyncio.gather(
            engine.run(requests[:5]), engine.run(requests[1:], "run-2", journal=other_journal)
        )
    assert engine.states(requests) == ["stored"] * 6
    assert first.posts + second.posts == 6
    assert first.progress.delivered == second.progress.delivered == 5
    assert engine.assert_accounts_agree()["creates"] == 6


async def test_runs_that_wait_for_each_others_rows_end(engine: EngineHarness) -> None:
    """A run that waits releases its finished requests."""
    one, two = make_requests(2)
    key_of_two = {two.request_key}
    third = JournalWriter(engine.journal, "third")
    third.plan(two)
    b_holds_two = anyio.Event()

    class Patient(SystemClock):
        """Run A follows the rows of others only once B holds the second row."""

        async def sleep(self, seconds: float) -> None:
            if seconds == 1.0:
                await b_holds_two.wait()
            await super().sleep(seconds / 10)

    class Quick(SystemClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds / 20)

    def watch(progress: Progress) -> None:
        holder = engine.record(two).claimed_by
        if holder is not None and holder != third.owner.owner:
            b_holds_two.set()

    with anyio.fail_after(60):
        async with anyio.create_task_group() as runs:
            runs.start_soon(engine.runner("A", clock=Patient()).run, to_requested([one, two]))
            await wait_until(lambda: _holds(engine, one))
            quick = engine.runner("B", clock=Quick(), on_progress=watch)
            runs.start_soon(quick.run, to_requested([one, two]))
            await anyio.sleep(0.05)
            assert engine.journal.claims.claim(key_of_two, third.owner.owner) == key_of_two
            engine.journal.claims.release(third.owner.owner)
    assert engine.states([one, two]) == ["stored", "stored"]
    assert engine.assert_accounts_agree()["creates"] == 2


def _holds(engine: EngineHarness, request: Any) -> bool:
    found = engine.journal.records([request.request_key])
    return bool(found) and found[request.request_key].claimed_by is not None


async def test_a_run_leaves_no_claim_behind(engine: EngineHarness) -> None:
    await engine.run(make_requests(2))
    assert {record.claimed_by for record in engine.journal.all_records()} == {None}
    assert rows(engine.url, schema.owners) == []


# -- caps -------------------------------------------------------------------------------------


async def test_a_cap_is_not_passed_by_purchases_at_the_same_time(engine: EngineHarness) -> None:
    report = await engine.run(make_requests(8), caps=Caps(run_units=3 * 4500))
    assert (report.posts, report.progress.delivered, report.progress.left) == (3, 3, 5)
    assert len(report.caps_reached) == 1
    assert engine.assert_accounts_agree()["creates"] == 3
    assert engine.states(make_requests(8)).count("deferred") == 5


async def test_the_cap_of_a_day_holds_for_all_of_its_runs_together(engine: EngineHarness) -> None:
    caps = Caps(day_units=3 * 4500)
    first, second = await asyncio.gather(
        engine.run(make_requests(3), "run-1", caps=caps),
        engine.run(make_requests(3, start=3), "run-2", caps=caps),
    )
    assert first.posts + second.posts == engine.assert_accounts_agree()["creates"] == 3


# -- the journal fails ------------------------------------------------------------------------


async def test_a_journal_that_fails_in_the_background_ends_the_run_as_a_journal_error(
    engine: EngineHarness,
) -> None:
    """Here at the heartbeat, for which no request waits."""

    class FailingClaims(ClaimLog):
        def heartbeat(self, owner: str) -> None:
            raise JournalError("disk full")

    class Hurried(SystemClock):
        async def sleep(self, seconds: float) -> None:
            await super().sleep(seconds / 100)

    engine.emulator.world.script("stuck", n=3)
    with closing(Journal(engine.url)) as failing:
        failing.claims = FailingClaims(failing.database)
        with anyio.fail_after(60), pytest.raises(JournalError, match="disk full"):
            await engine.run(make_requests(3), clock=Hurried(), journal=failing)
    assert engine.assert_accounts_agree()["creates"] == 3


def _drop(engine: EngineHarness, table: str) -> None:
    with closing(sqlite3.connect(engine.folder / "journal.db")) as connection:
        connection.execute(f"drop table if exists {table}")
        connection.commit()


async def test_when_the_journal_cannot_be_written_nothing_more_is_bought(
    engine: EngineHarness,
) -> None:
    def spoil(progress: Progress) -> None:
        if progress.delivered:
            _drop(engine, "events")

    with anyio.fail_after(60), pytest.raises(JournalError):
        await engine.run(make_requests(8), on_progress=spoil, max_in_flight=1)
    stats = engine.emulator.stats()
    assert stats["creates"] < 8
    assert stats["bodies_bought_more_than_once"] == 0


class BrokenJournal(Journal):
    """A journal with a bug in the writing of answers."""

    def append(self, changes: Sequence[Change], **options: Any) -> list[Any]:
        if any(change.event is Event.ACCEPTED for change in changes):
            raise TypeError("a bug")
        return super().append(changes, **options)


async def test_an_answer_that_a_bug_keeps_from_the_journal_is_saved_for_the_next_run(
    engine: EngineHarness,
) -> None:
    """The id of a bought task is nowhere else."""
    requests = make_requests(2)
    with (
        closing(BrokenJournal(engine.url)) as broken,
        pytest.raises(PurchasesNotWritten),
    ):
        await engine.run(requests, journal=broken, max_in_flight=1)
    posts = engine.emulator.stats()["submit_posts"]
    report = await engine.run(requests, "run-2")
    assert report.progress.delivered == 2
    stats = engine.assert_accounts_agree()
    assert (stats["creates"], stats["submit_posts"]) == (2, 2), "nothing is sent twice"
    assert posts == 1


async def test_a_rate_limited_purchase_gives_its_room_under_the_cap_back(
    engine: EngineHarness,
) -> None:
    """While it was reserved, another row found the cap full."""
    engine.emulator.world.script("429_empty", 2)
    report = await engine.run(make_requests(4), caps=Caps(run_units=2 * 4500))
    assert report.progress.delivered == 2
    assert engine.assert_accounts_agree()["creates"] == 2

"""Several processes at once, and processes that end in the middle: each row is bought once."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.emulator import Emulator
from krea_dagster.engine.states import State
from tests.crash.cap_trials import trial
from tests.crash.pair_of_runs import together
from tests.crash.process_harness import ProcessHarness, outcomes


@pytest.fixture
def harness(tmp_path: Path) -> Iterator[ProcessHarness]:
    with Emulator(latency_s=0.2, state=tmp_path / "emulator") as emulator:
        opened = ProcessHarness(tmp_path, emulator)
        yield opened
        opened.close()


def wait_for(harness: ProcessHarness, what: Callable[[dict[str, Any]], bool]) -> None:
    """Wait for a condition of the emulator's totals."""
    until_s = time.monotonic() + 60
    while not what(harness.emulator.stats(tasks=False)):
        assert time.monotonic() < until_s
        time.sleep(0.01)


def all_stored(harness: ProcessHarness, count: int) -> None:
    records = harness.records()
    assert len(records) == count
    assert {record.state for record in records} == {State.STORED}
    assert {record.claimed_by for record in records} == {None}


def test_two_processes_on_the_same_rows_buy_each_row_once(tmp_path: Path, journal_url: str) -> None:
    """With 500 rows: ``python -m tests.crash.pair_of_runs``."""
    stats, reports = together(tmp_path, rows=80, processes=2, journal=journal_url)
    assert sum(report["new"] for report in reports) == 80
    assert sum(report["posts"] for report in reports) == 80
    assert stats["charged_units"] == 80 * 4500


def test_three_processes_that_start_one_after_the_other_buy_each_row_once(
    harness: ProcessHarness,
) -> None:
    """The later ones find rows that are bought, rows that others hold, and new rows."""
    first, second, third = (harness.prepare(start=start, count=30) for start in (0, 10, 20))
    first.go()
    wait_for(harness, lambda stats: stats["creates"] >= 5)
    second.go()
    wait_for(harness, lambda stats: stats["creates"] >= 15)
    third.go()
    assert [code for code, _ in outcomes([first, second, third])] == [0, 0, 0]
    harness.assert_accounts_agree(tasks=50)
    all_stored(harness, 50)


def test_requests_of_a_killed_process_are_taken_over_by_a_parallel_one(
    harness: ProcessHarness,
) -> None:
    """At once, because the process table shows that it is dead."""
    killed, other = harness.prepare(count=40), harness.prepare(count=40)
    killed.go()
    wait_for(harness, lambda stats: stats["creates"] >= 10)
    other.go()
    wait_for(harness, lambda stats: stats["creates"] >= 20)
    killed.send(signal.SIGKILL)
    assert killed.end()[0] == -signal.SIGKILL
    code, report = other.end()
    assert (code, report["left"], report["delivered"] + report["reused"]) == (0, 0, 40)
    harness.assert_accounts_agree(tasks=40)
    all_stored(harness, 40)


def test_a_write_ahead_log_that_is_lost_with_its_process_buys_nothing_twice(
    harness: ProcessHarness,
) -> None:
    (killed,) = harness.start({"count": 40})
    wait_for(harness, lambda stats: stats["creates"] >= 20)
    killed.send(signal.SIGKILL)
    killed.end()
    file = Path(harness.job.journal.removeprefix("sqlite:///"))
    for ending in ("-wal", "-shm"):
        file.with_name(file.name + ending).unlink(missing_ok=True)
    (again,) = harness.start({"count": 40})
    assert again.end()[0] == 0
    harness.assert_accounts_agree(tasks=40, forgotten=True)
    all_stored(harness, 40)


def test_two_shards_in_two_processes_keep_to_their_own_rows(harness: ProcessHarness) -> None:
    ended = outcomes(
        harness.start(
            {"start": 0, "count": 20, "partition": "bucket-000"},
            {"start": 20, "count": 20, "partition": "bucket-001"},
        )
    )
    assert [(code, report["posts"]) for code, report in ended] == [(0, 20), (0, 20)]
    harness.assert_accounts_agree(tasks=40)
    bought_by = {record.partition_key: record.run_id for record in harness.records()}
    assert bought_by == {"bucket-000": "run-0", "bucket-001": "run-1"}
    all_stored(harness, 40)


def test_a_run_that_is_terminated_leaves_every_task_id_and_no_claim_behind(
    harness: ProcessHarness,
) -> None:
    (stopped,) = harness.start({"count": 40, "max_in_flight": 8})
    wait_for(harness, lambda stats: stats["creates"] >= 12)
    stopped.send(signal.SIGTERM)
    assert stopped.end() == (143, {"stopped": True})
    created = {task["task_id"] for task in harness.emulator.stats()["tasks"]}
    records = harness.records()
    assert {record.task_id for record in records if record.task_id} == created
    assert {record.state for record in records} <= {
        State.PLANNED,
        State.SUBMITTED,
        State.COMPLETED,
        State.STORED,
    }
    assert {record.claimed_by for record in records} == {None}
    (again,) = harness.start({"count": 40})
    code, report = again.end()
    assert (code, report["posts"]) == (0, 40 - len(created))
    harness.assert_accounts_agree(tasks=40)


@pytest.mark.parametrize("faults", [False, True])
def test_four_processes_with_64_in_flight_each_never_pass_a_cap_of_ten_credits(
    tmp_path: Path, journal_url: str, faults: bool
) -> None:
    """Twenty trials: ``python -m tests.crash.cap_trials``."""
    found = trial(tmp_path, seed=1, faults=faults, journal=journal_url)
    assert found.most_units <= 100_000
    assert found.committed_units <= 100_000
    if not faults:
        assert found.charged_units > 100_000 - 4500


def test_a_process_at_its_disk_quota_ends_with_a_clear_error(harness: ProcessHarness) -> None:
    """The write fails in the middle of the run."""
    (first,) = harness.start({"count": 8})
    assert first.end()[0] == 0
    file = Path(harness.job.journal.removeprefix("sqlite:///"))
    bound = file.stat().st_size + 40_000
    assert bound > max(image.stat().st_size for image in Path(harness.job.storage).rglob("*.png"))
    (bounded,) = harness.start({"count": 60, "file_bytes": bound})
    code, report = bounded.end()
    assert code == 3
    assert "disk I/O error" in report["journal_error"] or "full" in report["journal_error"]
    assert "Nothing more is bought" in report["journal_error"]
    named = report["journal_error"].count("task-unified-")
    stats = harness.emulator.stats()
    with_task = sum(record.task_id is not None for record in harness.records())
    assert stats["creates"] == with_task + named
    (again,) = harness.start({"count": 60})
    assert again.end()[0] == 0
    harness.assert_accounts_agree(tasks=60)
    assert {record.state for record in harness.records()} == {State.STORED}

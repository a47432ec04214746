"""The drill itself: real processes, killed; and workers that are wrong, caught."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio
import pytest
from click.testing import CliRunner

from krea_dagster.drill.command import drill_command
from krea_dagster.drill.drill import DrillResult, drill
from krea_dagster.drill.plan import KILL_FAULTS, STORM_FAULTS, DrillPlan
from krea_dagster.drill.reconcile import RequestOutcome

WRONG = Path(__file__).with_name("wrong_worker.py")


def run(plan: DrillPlan, folder: Path) -> DrillResult:
    return anyio.run(drill, plan, folder)


def test_killed_workers_buy_nothing_twice_and_lose_nothing_and_the_command_says_so(
    tmp_path: Path,
) -> None:
    arguments = ["--requests=30", "--kills=8", "--seed=3", f"--keep={tmp_path}", "--json"]
    done = CliRunner().invoke(drill_command, arguments)
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert figures == json.loads((tmp_path / "drill.json").read_text())
    assert (figures["passed"], figures["faults"]) == (True, [])
    assert [figures[name] for name in ("lost", "bought_twice", "unknown", "undelivered")] == [
        []
    ] * 4
    assert figures["delivered"] >= 20
    # An edge may be missed, where every worker ends before; then the drill says so.
    killed = sum(figures["kills"]["edges"].values()) + figures["kills"]["random"]
    assert (killed >= 5, killed + figures["kills_missed"]) == (True, 8)
    assert len(figures["edges_never_reached"]) <= figures["kills_missed"]
    again = CliRunner().invoke(drill_command, arguments)
    assert again.exit_code == 2
    assert "is not empty" in again.stderr


def test_under_hold_each_unknown_outcome_is_listed_and_nothing_is_bought_twice(
    tmp_path: Path,
) -> None:
    rates = {**dict.fromkeys(KILL_FAULTS, 0.01), "drop_after_create": 0.1}
    plan = DrillPlan(
        requests=30, kills=8, on_unknown="hold", honours_key=False, rates=rates, seed=3
    )
    result = run(plan, tmp_path)
    assert result.violations == []
    found = result.reconciliation
    books = json.loads((tmp_path / "books.json").read_text())
    assert books["charged_units"] == found.billed_units
    assert books["bodies_bought_more_than_once"] == 0
    assert {one.request_key for one in found.unknown} == set(found.of(RequestOutcome.UNKNOWN))
    assert found.unknown
    assert all(one.credits_units == 4500 and one.since is not None for one in found.unknown)
    assert sum(len(keys) for keys in found.outcomes.values()) == found.requests == 30


def test_two_workers_on_the_same_rows_buy_each_once(tmp_path: Path) -> None:
    result = run(DrillPlan(requests=30, kills=0, workers=2), tmp_path)
    assert result.violations == []
    assert result.counts.launches >= 2
    assert (result.reconciliation.submitted, result.reconciliation.billed) == (30, 30)


def test_a_storm_of_every_fault_ends_by_itself_and_delivers_what_can_be_had(
    tmp_path: Path,
) -> None:
    rates = dict.fromkeys(STORM_FAULTS, 0.05)
    result = run(DrillPlan(requests=30, kills=0, rates=rates, seed=5, patience_s=1.0), tmp_path)
    assert result.violations == []
    books = json.loads((tmp_path / "books.json").read_text())
    completed = {task["prompt"] for task in books["tasks"] if task["status"] == "completed"}
    delivered = len(result.reconciliation.of(RequestOutcome.DELIVERED))
    # A whole file that is not the image may strike too: it is kept, and fetched once.
    assert delivered + len(result.reconciliation.of(RequestOutcome.REJECTED)) == len(completed)
    assert delivered >= 20


@pytest.mark.parametrize(
    ("kind", "fault"),
    [
        ("new-key", "bought twice"),
        ("altered-files", "lost"),
        ("grown-files", "not delivered"),
        ("crash", "ended with an error"),
    ],
)
def test_a_worker_that_is_wrong_on_purpose_is_caught(kind: str, fault: str, tmp_path: Path) -> None:
    """Without this, a drill that always passes would prove nothing."""
    plan = DrillPlan(
        requests=6,
        kills=0,
        rates={"drop_after_create": 0.5},
        command=(sys.executable, str(WRONG), kind),
    )
    result = run(plan, tmp_path)
    assert any(fault in text for text in result.violations)
    assert result.counts.hung == []


def test_repeats_to_a_server_that_ignores_the_key_are_caught_as_bought_twice(
    tmp_path: Path,
) -> None:
    """The risk that EvoLink's undocumented header leaves to the policy replay."""
    plan = DrillPlan(requests=6, kills=0, honours_key=False, rates={"drop_after_create": 0.5})
    result = run(plan, tmp_path)
    assert any("bought twice" in text for text in result.violations)

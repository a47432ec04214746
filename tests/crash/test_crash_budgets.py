"""Budgets of every kind hold while four processes compete for the rest."""

from __future__ import annotations

from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from krea_dagster.emulator import Emulator
from krea_dagster.engine.budget import scopes_of
from krea_dagster.engine.journal.journal import Journal
from tests.crash.cap_trials import FAULTS
from tests.crash.process_harness import ProcessHarness, outcomes

IMAGE = 4_500
ROWS = 20

#: A budget, the scopes that it bounds, and how many images it has room for: each of four
#: processes wants 20, half of them also wanted by another, in two partitions and two campaigns.
BUDGETS = {
    "day=4.6": ("day:", 10),
    "month=4.6": ("month:", 10),
    "partition=2.8": ("partition:", 12),
    "partition:a=2.8": ("partition:a", None),
    "column:campaign=2.8": ("column:campaign:", 12),
    "column:campaign:autumn=2.8": ("column:campaign:autumn", None),
}


def race(
    folder: Path, journal_url: str, *budgets: str, faults: bool = False
) -> tuple[Counter[str], dict[str, Any], list[Any]]:
    """Let four processes buy; return the commitments by scope, the totals, and the reports."""
    with Emulator(latency_s=0.1, credits=1000.0, state=folder / "emulator") as emulator:
        for name, rate in (FAULTS if faults else {}).items():
            emulator.world.set_rate(name, rate, arg="0.1" if name == "429" else None)
        harness = ProcessHarness(folder, emulator, journal_url)
        runs = (
            {"start": number * ROWS // 2, "count": ROWS, "partition": "ab"[number % 2]}
            | {"budgets": budgets, "run_id": f"run-{number}"}
            for number in range(4)
        )
        ended = outcomes(harness.start(*runs))
        harness.close()
        stats = emulator.stats()
    assert stats["bodies_bought_more_than_once"] == 0
    committed: Counter[str] = Counter()
    with closing(Journal(journal_url)) as journal:
        for charge in journal.charges():
            where = (charge.run_id, charge.sent_at, charge.partition_key, charge.scopes)
            for scope in scopes_of(*where):
                committed[scope] += charge.committed_units
        for scope, units in committed.items():
            assert journal.commitment(scope).committed_units == units, scope
    return committed, stats, [report for _, report in ended]


@pytest.mark.parametrize("budget", BUDGETS)
def test_a_budget_holds_for_four_processes_and_is_used_to_its_last_image(
    budget: str, tmp_path: Path, journal_url: str
) -> None:
    scope, images = BUDGETS[budget]
    limit = round(float(budget.rpartition("=")[2]) * 10_000)
    committed, stats, reports = race(tmp_path, journal_url, budget)
    bounded = {name: units for name, units in committed.items() if name.startswith(scope)}
    assert bounded
    assert all(limit - IMAGE < units <= limit for units in bounded.values()), bounded
    billed = stats["charged_units"] + stats["held_units"]
    assert billed == sum(units for name, units in committed.items() if name.startswith("day:"))
    if images is not None:
        assert billed == images * IMAGE
    said = {text for report in reports for text in report["caps_reached"]}
    assert any(text.startswith(f"the budget of {scope.split(':')[0]}") for text in said), said


def test_budgets_hold_together_while_the_server_fails_in_every_way(
    tmp_path: Path, journal_url: str
) -> None:
    limits = {"month:": 60_000, "partition:a": 25_000, "column:campaign:autumn": 20_000}
    budgets = [f"{scope.rstrip(':')}={units / 10_000}" for scope, units in limits.items()]
    committed, stats, _ = race(tmp_path, journal_url, *budgets, faults=True)
    for scope, limit in limits.items():
        assert all(units <= limit for name, units in committed.items() if name.startswith(scope))
    assert stats["charged_units"] + stats["held_units"] <= 60_000

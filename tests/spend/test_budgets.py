"""Budgets as a user sets them: said beforehand, kept by the run, and told afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace

import pytest

from krea_dagster import KreaResource
from krea_dagster.application.runner import open_runner
from krea_dagster.engine.run.report import RunReport
from krea_dagster.errors import ConfigError
from tests.spend.project_harness import LEARNED, ProjectHarness


def campaigns(project: ProjectHarness) -> ProjectHarness:
    """Three rows of autumn, two of spring, one of none."""
    names = {"autumn": ("ash", "birch", "cedar"), "spring": ("date", "elm"), None: ("fig",)}
    for campaign, rows in names.items():
        project = project.with_rows(*rows, campaign=campaign)
    return project


def run(project: ProjectHarness, run_id: str = "run-1") -> RunReport:
    """A run over the whole table, as the asset makes it."""
    krea = project.krea
    with (
        project.batch() as batch,
        open_runner(krea, run_id, lambda _: None, project.table) as runner,
    ):
        policy = replace(runner.policy, wait_scale=0.01)
        ready = replace(runner, policy=policy, latencies=LEARNED)
        return asyncio.run(ready.run(batch.state(krea).wanted()))


def bought(project: ProjectHarness) -> Counter[str | None]:
    by_name = {row["prompt_id"]: row["campaign"] for row in project.rows}
    return Counter(
        by_name[name]
        for name, record in project.records().items()
        if record.state.value == "stored"
    )


@pytest.mark.parametrize(
    ("budget", "deferred", "said"),
    [
        ("column:campaign:autumn=0.9", 1, "the budget of column:campaign:autumn of 0.9 credits"),
        ("column:campaign=0.5", 3, "the budget of column:campaign:"),
        ("month=1.8", 2, "the budget of month 20"),
        ("day=1.8", 2, "the budget of day 20"),
        ("column:quality:1K=1", 4, "the budget of column:quality:1K of 1 credits"),
    ],
)
def test_a_quote_says_what_a_budget_will_keep_back_and_the_run_keeps_it_back(
    project: ProjectHarness, budget: str, deferred: int, said: str
) -> None:
    project = campaigns(project).with_settings(budgets=[budget])
    quoted = project.quote()
    assert (quoted.total.purchases, quoted.total.deferred) == (6, deferred)
    assert quoted.cap is not None
    assert quoted.cap.startswith(said)
    report = run(project)
    assert len(report.left) == deferred
    assert all(text.startswith(said) for text in report.caps_reached)
    assert project.paid_units() == (6 - deferred) * 4_500
    assert sum(bought(project).values()) == 6 - deferred
    assert project.quote().total.deferred == deferred


def test_a_budget_of_a_value_leaves_the_others_alone_and_frees_what_is_raised(
    project: ProjectHarness,
) -> None:
    project = campaigns(project)
    run(project.with_settings(budgets=["column:campaign:autumn=0.9"]))
    assert bought(project) == {"autumn": 2, "spring": 2, None: 1}
    run(project.with_settings(budgets=["column:campaign:autumn=1.35"]), "run-2")
    assert bought(project) == {"autumn": 3, "spring": 2, None: 1}
    assert project.paid_units() == 6 * 4_500


def test_each_partition_has_its_own_budget(project: ProjectHarness) -> None:
    project = campaigns(project).with_settings(budgets=["partition=0.9"])
    sizes = Counter(image.partition_key for image in project.images())
    expected = sum(min(count, 2) for count in sizes.values())
    assert project.quote().total.deferred == 6 - expected
    run(project)
    assert project.paid_units() == expected * 4_500


def test_a_column_that_the_table_has_not_is_wrong_and_buys_nothing(project: ProjectHarness) -> None:
    project = campaigns(project).with_settings(budgets=["column:campagin=1"])
    for attempt in (project.quote, lambda: run(project)):
        with pytest.raises(
            ConfigError, match="names the column 'campagin', which the prompt table does not"
        ):
            attempt()
    assert project.paid_units() == 0


def test_a_budget_that_cannot_be_read_is_said_before_anything_is_bought() -> None:
    with pytest.raises(ConfigError, match="budget 'weekly=3' is invalid"):
        KreaResource(emulator=True, budgets=["weekly=3"]).krea().caps()

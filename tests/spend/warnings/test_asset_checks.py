"""The warnings as asset checks of spend_daily, in a real run of Dagster."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.application.spend import update_tables
from krea_dagster.application.spend_report import report_of
from krea_dagster.application.spend_warnings import recent_warnings
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.checks.spend_warnings import build_spend_warnings_checks
from krea_dagster.spend.proof.verify import account_proof
from krea_dagster.spend.tables.query import prompt_texts
from krea_dagster.spend.tables.state import SpendState
from krea_dagster.spend.tables.update import update_spend
from krea_dagster.spend.warnings.spend_warning import WarningKind
from tests.spend.project_harness import ProjectHarness
from tests.spend.simulated_year import FIRST, RUNAWAY, SimulatedYear

DAILY = dg.AssetKey("spend_daily")


def evaluations(
    krea: KreaResource, instance: dg.DagsterInstance, **options: Any
) -> Mapping[str, dg.AssetCheckEvaluation]:
    """What the checks said in a run of their own, by name."""
    checks = build_spend_warnings_checks(DAILY, **options)
    defs = dg.Definitions(
        assets=[dg.AssetSpec(DAILY)],
        asset_checks=[checks],
        jobs=[dg.define_asset_job("look", dg.AssetSelection.all_asset_checks())],
        resources={"krea": krea},
    )
    result = defs.resolve_job_def("look").execute_in_process(instance=instance)
    return {one.check_name: one for one in result.get_asset_check_evaluations()}


def test_each_kind_is_a_check_and_a_quiet_account_passes_all(
    bought_project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    update_tables(bought_project.krea)
    found = evaluations(bought_project.resource, instance, budgets=["day=50", "month=900"])
    assert set(found) == {f"spend_{kind.value}" for kind in WarningKind}
    assert all(one.passed for one in found.values())


def test_a_budget_that_is_used_warns_with_its_figures(
    bought_project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    update_tables(bought_project.krea)
    one = evaluations(bought_project.resource, instance, budgets=["day=2"])["spend_budget_used"]
    assert not one.passed
    assert one.severity is dg.AssetCheckSeverity.WARN
    assert "1.80 credits of 2.00 credits (90%) of the budget for" in (one.description or "")
    assert one.metadata["credits_in_question"].value == bought_project.paid_units() / 10_000 == 1.8


def test_an_account_that_used_more_than_the_journal_explains_is_an_error(
    bought_project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    update_tables(bought_project.krea)
    bought_project.sql("update account_readings set used_units = used_units + 4500 where id = 2")
    found = evaluations(bought_project.resource, instance)
    one = found["spend_account_differs"]
    assert not one.passed
    assert one.severity is dg.AssetCheckSeverity.ERROR
    assert "0.45 credits more than the journal explains" in (one.description or "")
    assert [name for name, said in found.items() if not said.passed] == ["spend_account_differs"]


def test_without_tables_the_checks_say_that_nothing_was_checked(
    project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    found = evaluations(project.resource, instance)
    assert not any(one.passed for one in found.values())
    assert {one.severity for one in found.values()} == {dg.AssetCheckSeverity.WARN}
    assert "no spend tables yet" in (found["spend_forecast"].description or "")


def test_a_warning_is_shown_for_a_week(tmp_path: Path) -> None:
    """The runaway day of the simulated year, asked for on the days after it."""
    simulated = SimulatedYear(tmp_path, 4_000)
    simulated.write(RUNAWAY + timedelta(days=9))
    with closing(Journal(simulated.url)) as journal:
        update_spend(journal, simulated.storage)
    krea = KreaResource(storage=str(tmp_path), api_key="not used").krea()

    def kinds(day: date) -> list[WarningKind]:
        now = datetime(day.year, day.month, day.day, 23, tzinfo=timezone.utc)
        return [one.kind for one in recent_warnings(krea, now=now) or []]

    assert kinds(RUNAWAY - timedelta(days=1)) == []
    assert kinds(RUNAWAY) == [WarningKind.DAY_OUT_OF_HABIT]
    assert kinds(RUNAWAY + timedelta(days=7)) == [WarningKind.DAY_OUT_OF_HABIT]
    assert kinds(RUNAWAY + timedelta(days=8)) == []
    known = SpendState.read(simulated.storage)
    assert known is not None
    assert len(known.months) == RUNAWAY.month - FIRST.month + 1


@pytest.mark.parametrize("threshold", [4.0, 100.0])
def test_the_threshold_of_the_settings_holds_for_checks_and_report(
    tmp_path: Path, threshold: float
) -> None:
    simulated = SimulatedYear(tmp_path, 4_000)
    simulated.write(RUNAWAY)
    resource = KreaResource(storage=str(tmp_path), api_key="not used", spend_threshold=threshold)
    krea = resource.krea()
    now = datetime(RUNAWAY.year, RUNAWAY.month, RUNAWAY.day, 23, tzinfo=timezone.utc)
    reported = report_of(krea, tmp_path / "report.html", now=now)
    for found in (reported, recent_warnings(krea, now=now) or []):
        unusual = [one.since for one in found if one.kind is WarningKind.DAY_OUT_OF_HABIT]
        assert unusual == ([RUNAWAY] if threshold < 100 else [])


def test_a_budget_that_cannot_be_read_is_refused_when_the_checks_are_built() -> None:
    with pytest.raises(ConfigError, match="is invalid"):
        build_spend_warnings_checks(DAILY, budgets=["daily=5"])


def test_the_account_is_held_against_the_journal_where_it_was_read_twice(
    bought_project: ProjectHarness,
) -> None:
    with bought_project.krea.open_journal() as journal:
        found = account_proof(journal)
    assert found is not None
    assert found.used_units == found.journal_units == bought_project.paid_units()
    bought_project.sql("delete from account_readings where id > 1")
    with bought_project.krea.open_journal() as journal:
        assert account_proof(journal) is None


def test_the_texts_of_prompts_are_looked_up_in_the_manifests(
    bought_project: ProjectHarness,
) -> None:
    found = prompt_texts(bought_project.krea.open_storage(), ["ash", "cedar", "no such row"])
    assert found == {name: f"{name} of {bought_project.folder.name}" for name in ("ash", "cedar")}


def test_where_nothing_is_on_file_there_are_no_texts(project: ProjectHarness) -> None:
    assert prompt_texts(project.krea.open_storage(), ["ash"]) == {}

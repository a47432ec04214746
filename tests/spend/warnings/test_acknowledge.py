"""Acknowledged warnings: listed everywhere with their reason, and no alert anywhere."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import text

from krea_dagster import KreaResource
from krea_dagster.application.acknowledge import acknowledge
from krea_dagster.application.spend import update_tables
from krea_dagster.application.spend_alerts import post_alerts
from krea_dagster.application.spend_warnings import recent_warnings
from krea_dagster.errors import ConfigError, InputError
from krea_dagster.spend.warnings.spend_warning import SpendWarning
from tests.spend.project_harness import CommandOn, ProjectHarness
from tests.spend.warnings.test_asset_checks import evaluations

AT = datetime(2026, 11, 2, 9, tzinfo=timezone.utc)
Shell = Callable[..., str]


@pytest.fixture
def project(bought_project: ProjectHarness) -> ProjectHarness:
    """A soft budget for each day is exceeded."""
    project = bought_project.with_settings(soft_budgets=["day=2"])
    update_tables(project.krea)
    return project


@pytest.fixture
def shell(project: ProjectHarness, command_on: CommandOn, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("KREA_SOFT_BUDGETS", "day=2")
    command = command_on(project)

    def run(*arguments: str, exit_code: int = 0) -> str:
        ended = command("spend", *arguments)
        assert ended.code == exit_code, ended.err
        return ended.out + ended.err

    return run


def present(project: ProjectHarness) -> list[SpendWarning]:
    return recent_warnings(project.krea, now=datetime.now(timezone.utc)) or []


def test_terminal_and_json_list_a_warning_with_its_id_before_and_after(shell: Shell) -> None:
    (warning,) = json.loads(shell("--json"))["warnings"]
    assert (warning["kind"], warning["level"]) == ("budget_used", "warning")
    assert (warning["credits"], warning["acknowledged"]) == (1.8, None)
    warning_id = warning["warning"]
    assert f"warning {warning_id}: 1.80 credits of 2.00 credits (90%)" in shell()

    said = shell("acknowledge", warning_id, "--reason", "planned campaign", "--by", "ada")
    assert said.splitlines() == [warning["text"], "The warning is acknowledged."]
    (after,) = json.loads(shell("--json"))["warnings"]
    assert after["acknowledged"].pop("at").startswith(f"{datetime.now(timezone.utc):%Y-%m}")
    assert after["acknowledged"] == {"reason": "planned campaign", "by": "ada"}
    assert f"acknowledged {warning_id}: {warning['text']} (ada: planned campaign)" in shell()

    assert "is withdrawn" in shell("acknowledge", warning_id, "--withdraw")
    assert json.loads(shell("--json"))["warnings"] == [warning]


def test_the_report_lists_it_with_its_reason(project: ProjectHarness, tmp_path: Path) -> None:
    (warning,) = present(project)
    acknowledge(project.krea, warning.warning_id, "<planned> campaign", by="ada", now=AT)
    (listed,) = project.krea.spend_report(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert listed.warning_id == warning.warning_id
    assert "No warnings, 1 acknowledged" in page
    assert "Acknowledged by ada on 2 Nov 2026: &lt;planned&gt; campaign" in page
    assert f'<li id="{warning.warning_id}" class="acknowledged">' in page


def test_it_fails_no_check_until_it_is_withdrawn(
    project: ProjectHarness, instance: dg.DagsterInstance
) -> None:
    def check() -> dg.AssetCheckEvaluation:
        return evaluations(project.resource, instance)["spend_budget_used"]

    (warning,) = present(project)
    assert not check().passed
    acknowledge(project.krea, warning.warning_id, "planned campaign", by="ada")
    found = check()
    assert found.passed
    assert (found.metadata["warnings"].value, found.metadata["acknowledged"].value) == (0, 1)
    (row,) = found.metadata["findings"].value.records  # type: ignore[union-attr]  # a table
    assert row.data["acknowledged"] == "planned campaign"
    acknowledge(project.krea, warning.warning_id, None, by="ada")
    assert not check().passed


def test_it_is_not_posted_also_if_it_waits_for_another_attempt(project: ProjectHarness) -> None:
    posted: list[SpendWarning] = []

    def look(post: Callable[[SpendWarning], object] = posted.append) -> Any:
        found = present(project)
        return post_alerts(project.krea, "mail", found, post, at=datetime.now(timezone.utc))

    def fails(_: SpendWarning) -> None:
        raise ConnectionError

    (warning,) = present(project)
    assert look(fails).left == 1
    acknowledge(project.krea, warning.warning_id, "planned campaign", by="ada")
    assert (look().left, posted) == (0, [])
    acknowledge(project.krea, warning.warning_id, None, by="ada")
    look()
    assert posted == [warning]


def test_the_last_word_counts_and_every_one_is_kept(project: ProjectHarness) -> None:
    (warning,) = present(project)
    for reason in ("first", None, "second"):
        acknowledge(project.krea, warning.warning_id, reason, by="ada")
    with project.krea.open_journal() as journal:
        (current,) = journal.acknowledgements.current().values()
        assert (current.reason, current.by) == ("second", "ada")
        with journal.database.read() as connection:
            rows = connection.execute(text("select reason, text from spend_acknowledgements"))
            assert [tuple(row) for row in rows] == [
                ("first", warning.text), (None, warning.text), ("second", warning.text)
            ]  # fmt: skip


def test_the_command_finds_a_warning_of_purchases_that_no_table_has_yet(
    project: ProjectHarness,
) -> None:
    shutil.rmtree(project.folder / "krea" / "spend")
    project = project.with_settings(soft_budgets=["column:prompt_id:ash=0.5"])
    subject = "budget_used\nprompt_id ash\n5000\n"
    warning_id = hashlib.sha256(subject.encode()).hexdigest()[:10]
    found = acknowledge(project.krea, warning_id, "planned", by="ada")
    assert found is not None
    assert found.text.startswith("0.45 credits of 0.50 credits (90%) of the budget for prompt_id")


def test_one_of_a_budget_that_only_the_definitions_know_is_kept_too(shell: Shell) -> None:
    said = shell("acknowledge", "0f3a9c27d1", "--reason", "planned")
    assert "It is not among the present warnings of these settings." in said


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["acknowledge", "budget", "--reason", "x"], "'budget' is not the id of a warning"),
        (["acknowledge", "0f3a9c27d1", "--reason", " "], "the reason is empty"),
        (["acknowledge", "0f3a9c27d1", "--withdraw"], "0f3a9c27d1 is not acknowledged"),
        (["acknowledge", "0f3a9c27d1"], "give either --reason or --withdraw"),
        (["--json", "acknowledge", "0f3a9c27d1"], "give the options after acknowledge"),
    ],
)
def test_what_makes_no_sense_is_refused(shell: Shell, arguments: list[str], said: str) -> None:
    assert said in shell(*arguments, exit_code=2)


def test_without_a_journal_there_is_nothing_to_acknowledge(tmp_path: Path) -> None:
    krea = KreaResource(storage=str(tmp_path), emulator=True).krea()
    with pytest.raises(ConfigError, match="no journal yet"):
        acknowledge(krea, "0f3a9c27d1", "planned", by="ada")
    with pytest.raises(InputError):
        acknowledge(krea, "", "planned", by="ada")

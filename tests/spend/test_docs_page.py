"""docs/how-to/spend.md: its ten queries have the printed results, and its code runs."""

from __future__ import annotations

import re
import shlex
import shutil
import sqlite3
import sys
import types
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster import cli
from krea_dagster.application.spend import update_tables
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import OpenAccount, tick
from tests.spend.project_harness import ProjectHarness

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "prompts.parquet"
PAGE = (ROOT / "docs" / "how-to" / "spend.md").read_text(encoding="utf-8")
#: Each section's commands, and what they print, by its title.
COMMANDS = re.findall(
    r"^## ([^\n]+)\n(?:(?!^## ).)*?```bash\n([^`]+?)\n```\n\n```text\n([^`]+?)\n```$",
    PAGE,
    re.DOTALL | re.MULTILINE,
)
QUESTIONS = re.findall(
    r"^### \d+\. (.+?)\n\n```sql\n(.+?)\n```\n\n```text\n(.+?)\n```$",
    PAGE,
    re.DOTALL | re.MULTILINE,
)


class Sample(ProjectHarness):
    """A project whose table is the sample, as the demo takes it."""

    @property
    def table(self) -> PromptTable:
        return PromptTable(str(SAMPLE), parse_partition_by("hash:8"))


@pytest.fixture(scope="module")
def sample(
    tmp_path_factory: pytest.TempPathFactory, emulator: Emulator, open_account: OpenAccount
) -> Sample:
    project = Sample(tmp_path_factory.mktemp("sample"), emulator, open_account())
    project.buy()
    return project


def test_there_are_ten_questions() -> None:
    assert len(QUESTIONS) == 10


@pytest.mark.parametrize(
    ("query", "answer"), [pytest.param(query, said, id=name) for name, query, said in QUESTIONS]
)
def test_the_answer_is_the_one_on_the_page(
    sample: Sample,
    query: str,
    answer: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("KREA_STORAGE", str(sample.folder / "krea"))
    monkeypatch.setenv("KREA_PROMPTS", str(SAMPLE))
    monkeypatch.setattr(sys, "argv", ["krea-dagster", "spend", "--csv", "--sql", query])
    capsys.readouterr()
    with pytest.raises(SystemExit, match="0"):
        cli.run()
    assert capsys.readouterr().out.strip() == answer


class SlackResource(dg.ConfigurableResource[None]):
    """dagster-slack's resource without Slack: its client keeps what it is given."""

    token: str

    def get_client(self) -> SlackResource:
        return self

    def chat_postMessage(self, **message: str) -> None:  # noqa: N802 - Slack's name
        SENT.append({**message, "token": self.token})


SENT: list[dict[str, str]] = []


def test_its_alerts_reach_slack(
    bought_project: ProjectHarness,
    instance: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    package = types.ModuleType("dagster_slack")
    package.SlackResource = SlackResource  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "dagster_slack", package)
    monkeypatch.setenv("SLACK_TOKEN", "xoxb-1")
    made: dict[str, Any] = {}
    (block,) = re.findall(r"```python\n(.+?)```", PAGE, re.DOTALL)
    exec(compile(block, "spend.md", "exec", dont_inherit=True), made)  # noqa: S102 - our own code
    project = bought_project.with_settings(soft_budgets=["day=2"])
    update_tables(project.krea)
    defs = dg.Definitions.merge(
        made["alerts"], dg.Definitions(resources={"krea": project.resource})
    )
    tick(defs, instance, "krea_spend_alerts")
    (sent,) = SENT
    assert (sent["channel"], sent["token"]) == ("#finance", "xoxb-1")
    assert sent["text"].startswith("warning: 1.80 credits of 2.00 credits (90%) of the budget for")


def test_the_commands_print_what_the_page_says(
    sample: Sample,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """One after the other, in a copy of the project."""
    shutil.copytree(sample.folder / "krea", tmp_path / "krea")
    monkeypatch.setenv("KREA_STORAGE", str(tmp_path / "krea"))
    monkeypatch.setenv("KREA_PROMPTS", str(SAMPLE))
    monkeypatch.chdir(tmp_path)
    titles = [title for title, _, _ in COMMANDS]
    last = "Closing a month"
    assert titles == [
        "Refunds, and credits bought or given",
        "Acknowledge a warning",
        "When do the credits run out?",
        last,
        "FOCUS",
    ]
    for title, commands, said in COMMANDS:
        if title == last:
            october = int(datetime(2026, 10, 5, tzinfo=timezone.utc).timestamp()) * 1_000_000
            with closing(sqlite3.connect(tmp_path / "krea" / "journal.db")) as journal, journal:
                journal.execute("UPDATE submissions SET sent_at = ?", [october])
            shutil.rmtree(tmp_path / "krea" / "spend")  # they were made of the former times
        printed = ""
        for line in commands.splitlines():
            if line.startswith("export "):
                monkeypatch.setenv(*line.removeprefix("export ").split("=", 1))
                continue
            monkeypatch.setattr(sys, "argv", shlex.split(line))
            capsys.readouterr()
            with pytest.raises(SystemExit, match="0"):
                cli.run()
            printed += capsys.readouterr().out.replace(str(tmp_path), "data")
        lines = [line.rstrip() for line in printed.strip().splitlines()]
        assert without_hashes("\n".join(lines)) == without_hashes(said), title


def without_hashes(text: str) -> str:
    """Return a text without the hashes of statements, which are of each run's task ids."""
    return re.sub(r"[0-9a-f]{12}(…|\.html)", r"\1", text)

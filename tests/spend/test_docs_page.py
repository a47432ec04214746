"""docs/how-to/spend.md: its ten queries have the printed results on the sample data."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from krea_dagster import cli
from krea_dagster.emulator import Emulator
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import OpenAccount
from tests.spend.project_harness import ProjectHarness

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "data" / "prompts.parquet"
QUESTIONS = re.findall(
    r"^### \d+\. (.+?)\n\n```sql\n(.+?)\n```\n\n```text\n(.+?)\n```$",
    (ROOT / "docs" / "how-to" / "spend.md").read_text(),
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

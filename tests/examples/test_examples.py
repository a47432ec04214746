"""The examples do what their README says, started by the command in it."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from krea_dagster import __all__ as public_names
from tests.examples.local_servers import mail_server, webhook

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
NAMES = sorted(path.name for path in EXAMPLES.iterdir() if (path / "README.md").is_file())


def run(name: str, folder: Path) -> str:
    """Run the one command of an example's README; returns what it printed."""
    readme = (EXAMPLES / name / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"```console\n(.*?)```", readme, flags=re.DOTALL)
    (line,) = command.splitlines()
    python, *arguments = shlex.split(line)
    assert python == "python"
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:__main__", *arguments],
        cwd=ROOT,
        env={**os.environ, "EXAMPLE_FOLDER": str(folder)},
        capture_output=True,
        text=True,
        check=False,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_curated_dataset_is_what_was_delivered(tmp_path: Path) -> None:
    said = run("curated_dataset", tmp_path)
    lines = (tmp_path / "dataset.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert [row["prompt_id"] for row in rows] == [
        "baker", "harbor", "lighthouse", "sailor", "surf", "twins",
    ]  # fmt: skip
    assert {row["category"] for row in rows} == {"people", "sea"}
    assert all(Path(row["image_path"]).is_file() for row in rows)
    assert "all_rows_delivered: ERROR. 1 of 7 rows have no image" in said
    assert "failure_share: WARN. 1 of 7 rows failed" in said
    for name in ("files_whole", "manifest_schema", "pictures", "spend_expected"):
        assert f"{name}: passed" in said
    assert f"6 images in {tmp_path / 'dataset.jsonl'}" in said


def test_of_daily_prompts_only_the_new_ones_are_bought_each_day(tmp_path: Path) -> None:
    line = re.compile(r"(\S+) the (sensor|schedule) \w+ (\[.*\]), bought (\[.*\])")
    told = []
    for said in run("daily_prompts", tmp_path).splitlines():
        match = line.fullmatch(said)
        assert match, said
        day, who, took, bought = match.groups()
        told.append((day, who, ast.literal_eval(took), ast.literal_eval(bought)))
    first, second, third = "2025-03-03", "2025-03-04", "2025-03-05"
    assert told == [
        (first, "sensor", [first], ["a tram in the rain", "a kite over stubble"]),
        (first, "schedule", [first], []),
        (second, "sensor", [second], ["three lemons and a jug"]),
        (second, "schedule", [second], []),
        (third, "sensor", [first, third], ["a tram depot at night", "a fox in the snow"]),
        (third, "schedule", [third], []),
    ]


def test_the_spend_dashboard_adds_up(tmp_path: Path) -> None:
    said = run("spend_dashboard", tmp_path)
    by_day, by_campaign, by_status = (
        [line.split() for line in table.splitlines()[2:]] for table in said.strip().split("\n\n")
    )
    assert by_day == [["2025-03-03", "3.15", "4"], ["2025-03-04", "1.35", "3"]]
    assert by_campaign == [["autumn", "1.35", "3", "0.450"], ["ski", "3.15", "4", "0.788"]]
    assert by_status == [
        ["refused", "content_policy_violation", "1", "0.0"],
        ["stored", "7", "4.5"],
    ]
    manifest = pd.read_parquet(tmp_path / "krea" / "manifest")
    assert manifest["credits_charged"].sum() == pytest.approx(3.15 + 1.35)


def test_alerts_reach_a_mail_server_and_a_webhook_once_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with mail_server() as (address, mails), webhook() as (url, calls):
        monkeypatch.setenv("MAIL_SERVER", address)
        monkeypatch.setenv("WEBHOOK_URL", url)
        said = run("spend_alerts", tmp_path)
    assert said.splitlines() == [
        "mail_alerts: Posted 1 of 1 warnings.",
        "webhook_alerts: Posted 1 of 1 warnings.",
        "mail_alerts: Posted 0 of 1 warnings.",
        "webhook_alerts: Posted 0 of 1 warnings.",
    ]
    ((mail,), (call,)) = mails, calls
    assert mail["To"] == "finance@example.com"
    assert "0.90 credits of 0.50 credits (180%) of the budget for" in mail["Subject"]
    assert (call["credits"], call["level"]) == ("0.9", "warning")
    assert call["id"] in mail.get_content()


def test_prompts_from_pandas_are_made_before_their_images_and_only_changed_ones_bought(
    tmp_path: Path,
) -> None:
    order = "products > product_prompts > images > image_manifest"
    assert run("prompts_from_pandas", tmp_path).splitlines() == [
        f"first: {order}: bought ['bowl', 'clock', 'jug', 'kettle', 'lamp', 'vase']",
        f"the same: {order}: bought []",
        f"changed: {order}: bought ['jug', 'vase']",
    ]


def test_prompts_from_dbt_are_read_after_the_model_has_run(tmp_path: Path) -> None:
    order, when = "dbt_models > images > image_manifest", "early morning"
    first = [f"a {what}, {when}" for what in ("harbor in Oslo", "market in Rome", "tram in Oslo")]
    assert run("prompts_from_dbt", tmp_path).splitlines() == [
        f"first: {order}: bought {first}",
        f"the same: {order}: bought []",
        f"one more: {order}: bought ['a fountain in Rome, {when}']",
    ]


def test_prompts_from_a_language_model_are_bought_topic_by_topic(tmp_path: Path) -> None:
    assert run("prompts_from_llm", tmp_path).splitlines() == [
        "2 topics: launched ['a lighthouse', 'a market'], 4 images in all",
        "2 topics: launched [], 4 images in all",
        "3 topics: launched ['a fox'], 6 images in all",
    ]


@pytest.mark.parametrize("name", NAMES)
def test_an_example_is_short_and_uses_public_names_only(name: str) -> None:
    (script,) = (EXAMPLES / name).glob("*.py")
    text = script.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert not re.search(r"(?:from|import) krea_dagster\.", text)
    (names,) = re.findall(r"from krea_dagster import (\([^)]*\)|[^\n]*)", text)
    assert set(re.findall(r"\w+", names)) <= set(public_names)


def test_a_page_names_every_example() -> None:
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert NAMES
    for name in NAMES:
        assert f"(../examples/{name}/" in page

"""The figures of docs/explanation/spend-warnings.md are those of the benchmark's last run."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.account_years import HELD_OUT_KINDS, SIZES, TUNED_KINDS, simulate
from benchmarks.report import Report
from benchmarks.spend_warnings import SEEDS, THRESHOLDS, look_at
from krea_dagster.spend.warnings.anomaly import THRESHOLD

DOCS = Path(__file__).parents[2] / "docs"
PAGE = (DOCS / "explanation" / "spend-warnings.md").read_text("utf-8")
REPORT = Report.from_json(json.loads((DOCS / "benchmarks.json").read_text())["spend_warnings"])


def measured(name: str, threshold: float, columns: Sequence[str]) -> list[str]:
    wanted = [name, f"{threshold:g}"]
    (row,) = [row for row in REPORT.rows if row[:2] == wanted]
    return [row[REPORT.columns.index(column)] for column in columns]


def written(first: str) -> list[str]:
    (line,) = re.findall(rf"^\| {re.escape(first)} \|(.*)\|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_the_page_has_what_each_threshold_finds(threshold: float) -> None:
    columns = ["all", "×2", "×3", "×5", "×10", "level ×1.3", "level ×2", "level ×0.5", "stop"]
    found = measured(", ".join(TUNED_KINDS), threshold, columns)
    assert written(f"{threshold:g}") == found


@pytest.mark.parametrize("kind", TUNED_KINDS + HELD_OUT_KINDS)
def test_the_page_has_the_figures_of_each_kind_of_year(kind: str) -> None:
    columns = ["all", "×3", "×10", "month in 90 % interval", "median error"]
    assert written(kind) == measured(kind, THRESHOLD, columns)


def test_the_page_says_how_many_years_with_which_seeds() -> None:
    assert f"seeds {SEEDS[0]} to {SEEDS[-1]}" in PAGE
    assert f"{len(SIZES) * len(SEEDS)} years of each kind" in PAGE
    assert f"The default is {THRESHOLD:g}" in PAGE


def test_a_higher_threshold_never_warns_more_often_of_days() -> None:
    found = dict(look_at(simulate("bursty", 20_000, 0)))
    days = [found[threshold]["days"] for threshold in THRESHOLDS]
    assert days == sorted(days, reverse=True)
    assert found[THRESHOLD]["×10"] == 1.0
    assert 0 <= found[THRESHOLD]["held"] <= 1

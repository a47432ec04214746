"""The spend tables where people meet them: the assets, their figures, and the command."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaResource, cli
from krea_dagster.plugin.assets.spend import build_spend
from krea_dagster.plugin.names import Names
from krea_dagster.spend.tables.daily import DAILY_DESCRIPTIONS
from krea_dagster.spend.tables.ledger import LEDGER_DESCRIPTIONS
from tests.dagster_bench import run_job
from tests.spend.simulated_year import OUTAGE, SimulatedYear

Shell = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> SimulatedYear:
    made = SimulatedYear(tmp_path_factory.mktemp("year"), 2_000)
    made.write()
    return made


@pytest.fixture
def shell(
    year: SimulatedYear, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Shell:
    """Run the command on the year; exit code, stdout, stderr."""
    monkeypatch.setenv("KREA_STORAGE", str(year.folder))
    monkeypatch.setenv("KREA_PROMPTS", "data/prompts.parquet")

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["krea-dagster", "spend", *arguments])
        capsys.readouterr()
        try:
            cli.run()
            code = 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def units(credits: Any) -> int:
    """Credits as they are printed, in units; exact, or it fails."""
    value = Decimal(str(credits)) * 10_000
    assert value == value.to_integral_value()
    return int(value)


@pytest.mark.parametrize(
    "by", [(), ("day",), ("month", "quality"), ("campaign",), ("outcome", "partition_key")]
)
def test_json_and_csv_add_up_exactly(
    year: SimulatedYear, shell: Shell, by: tuple[str, ...]
) -> None:
    expected = year.expected()
    wishes = [word for name in by for word in ("--by", name)]
    code, out, err = shell("--json", *wishes)
    assert (code, err) == (0, "")
    lines = json.loads(out)["lines"]
    if not by:
        assert [line["when"] for line in lines][0::2] == ["today", "in all"]
        lines = lines[-1:]
    _, text, _ = shell("--csv", *wishes)
    rows = list(csv.DictReader(io.StringIO(text)))[-len(lines) :]
    assert len(rows) == len(lines)
    for said in (lines, rows):
        assert sum(units(line["credits_charged"]) for line in said) == expected.total(
            "charged_units"
        )
        assert sum(units(line["credits_returned"]) for line in said) == expected.total(
            "returned_units"
        )
        assert sum(units(line["credits_at_stake"]) for line in said) >= expected.total(
            "unknown_units"
        )
        assert sum(int(line["unknown"]) for line in said) == expected.total("unknown")


def test_a_part_of_the_year_is_asked_for_by_its_month_or_its_first_day(
    year: SimulatedYear, shell: Shell
) -> None:
    expected = year.expected()
    _, out, _ = shell("--month", "2026-07", "--json")
    (july,) = json.loads(out)["lines"]
    first, last = OUTAGE[0].replace(day=1), OUTAGE[0].replace(day=31)
    assert (july["when"], july["purchases"]) == ("2026-07", expected.total("asked", first, last))
    _, out, _ = shell("--since", "2026-07-01", "--json")
    (since,) = json.loads(out)["lines"]
    assert units(since["credits_charged"]) == expected.total("charged_units", first)


def test_the_table_shows_whole_figures_and_its_rate(year: SimulatedYear, shell: Shell) -> None:
    code, out, _ = shell("--by", "quality")
    assert code == 0
    assert out.splitlines()[0].split() == [
        *("quality", "asked", "images", "accepted", "open", "credits", "USD"),
        *("at", "stake", "per", "accepted"),
    ]
    assert "no room for each, lost, failed: see --json" in out
    figures = [line.split() for line in out.splitlines()[1:3]]
    assert sum(units(line[5]) for line in figures) == year.expected().total("charged_units")
    assert "1 USD is 68 credits; days are UTC" in out


def test_a_question_in_sql_is_answered_in_every_form(year: SimulatedYear, shell: Shell) -> None:
    query = "SELECT sum(credits_charged) AS credits, min(day) AS first FROM ledger"
    charged = year.expected().total("charged_units")
    _, out, _ = shell("--sql", query, "--json")
    (row,) = json.loads(out)
    assert (units(row["credits"]), row["first"]) == (charged, "2026-01-01")
    _, out, _ = shell("--sql", query, "--csv")
    assert out == f"credits,first\n{row['credits']},2026-01-01\n"
    _, out, _ = shell("--sql", query)
    assert out.split() == ["credits", "first", row["credits"], "2026-01-01"]
    code, out, err = shell("--sql", "DROP VIEW ledger")
    assert (code, out) == (2, "")
    assert "only SELECT is allowed" in err


@pytest.mark.parametrize(
    "arguments",
    [
        ("--json", "--csv"),
        ("--sql", "SELECT 1", "--by", "day"),
        ("--since", "2026-01-01", "--month", "2026-01"),
        ("--month", "July"),
        ("--by", "hue"),
    ],
)
def test_wrong_use_is_said_and_exits_2(shell: Shell, arguments: tuple[str, ...]) -> None:
    code, out, err = shell(*arguments)
    assert (code, out) == (2, "")
    assert "Error" in err


def test_the_report_is_one_file_with_exact_sums(
    year: SimulatedYear, shell: Shell, tmp_path: Path
) -> None:
    file = tmp_path / "report.html"
    code, out, err = shell("--html", str(file), "--by", "campaign")
    assert (code, err) == (0, "")
    assert f"The report is in {file}" in out
    page = file.read_text()
    assert f"{year.expected().total('charged_units') / 10_000:,.2f}" in page
    code, _, err = shell("--html", str(file), "--json")
    assert (code, "--html writes the report" in err) == (2, True)


def test_without_a_journal_there_is_nothing_to_say(
    shell: Shell, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KREA_STORAGE", str(tmp_path / "none"))
    code, _, err = shell()
    assert code == 2
    assert "nothing was spent" in err
    assert not (tmp_path / "none").exists()


def test_the_job_makes_both_tables_and_shows_figures_that_plot(
    year: SimulatedYear, instance: dg.DagsterInstance
) -> None:
    spend = build_spend(Names(("kept",)), [Names(("kept",)).manifest_key], by=["campaign"])
    krea = KreaResource(emulator=True, storage=str(year.folder))
    defs = dg.Definitions.merge(spend, dg.Definitions(resources={"krea": krea}))
    result = run_job(defs, instance, job="kept_krea_spend")
    assert result.success
    expected = year.expected()
    for name in ("spend_ledger", "spend_daily"):
        key = dg.AssetKey(["kept", name])
        (made,) = [
            event.step_materialization_data.materialization.metadata
            for event in result.all_events
            if event.is_step_materialization and event.asset_key == key
        ]
        said = {one.removeprefix("krea/"): entry.value for one, entry in made.items()}
        files = (year.folder / "spend" / name.removeprefix("spend_")).glob("*.parquet")
        assert said["dagster/row_count"] == sum(pq.read_metadata(file).num_rows for file in files)
        assert said["purchases"] == expected.total("asked")
        assert ("spend" in said) is (name == "spend_daily"), "the sparkline"
        assert units(said["credits_charged"]) == expected.total("charged_units")
        assert said["unknown"] == expected.total("unknown")
        assert isinstance(said["credits_today"], float)
        assert said["path"] == str(year.folder / "spend" / name.removeprefix("spend_"))
    graph = defs.resolve_asset_graph()
    described = {
        (name, column.name): column.description
        for name in ("spend_ledger", "spend_daily")
        for column in graph.get(dg.AssetKey(["kept", name]))
        .metadata["dagster/column_schema"]
        .columns
    }
    assert described["spend_ledger", "outcome"] == LEDGER_DESCRIPTIONS["outcome"]
    assert described["spend_daily", "delivered"] == DAILY_DESCRIPTIONS["delivered"]
    assert described["spend_daily", "campaign"] == "Passed through from the prompt table"
    assert graph.get(dg.AssetKey(["kept", "spend_ledger"])).parent_keys == {
        dg.AssetKey(["kept", "image_manifest"])
    }

"""Every surface says the same credits and dollars, to the last place; names and days are plain."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea_dagster.application.settings import Settings
from krea_dagster.application.spend import SpendPeriod, spend_of, update_tables
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.assets.spend import spend_metadata
from krea_dagster.spend.prices import CreditPrice, CreditPrices
from krea_dagster.spend.report.report_data import figures_of
from krea_dagster.spend.tables.query import stored_tables
from krea_dagster.spend.text import rounded, unique_names
from tests.spend.project_harness import CommandOn, ProjectHarness

Shell = Callable[..., str]


@pytest.fixture
def shell(bought_project: ProjectHarness, command_on: CommandOn) -> Shell:
    """Run ``krea-dagster spend`` on a project of four purchases; return what it prints."""
    command = command_on(bought_project)

    def run(*arguments: str) -> str:
        ended = command("spend", *arguments)
        assert ended.code == 0, ended.err
        return ended.out

    return run


@pytest.mark.parametrize("seed", range(4))
def test_terminal_json_csv_sql_report_asset_and_proof_say_the_same_money(
    bought_project: ProjectHarness, shell: Shell, seed: int
) -> None:
    """With charges of every size: one unit, 0.45, a third, and more digits than a float has."""
    charges = [1, 4_500, 33_333 + seed, 999_999_999_999_999 - seed]
    for number, units in enumerate(charges):
        bought_project.sql(
            "UPDATE submissions SET charged_units = ?, committed_units = ?, reserved_units = ? "
            "WHERE rowid = (SELECT rowid FROM submissions ORDER BY rowid LIMIT 1 OFFSET ?)",
            *(units, units, units, number),
        )
    total, exact = sum(charges), Decimal(sum(charges)).scaleb(-4)
    usd = (exact / 68).quantize(Decimal("0.000001"))
    said = json.loads(shell("--json"), parse_float=Decimal)["lines"][-1]
    assert (said["credits_charged"], said["usd_charged"]) == (exact, usd)
    (row,) = list(csv.DictReader(io.StringIO(shell("--csv"))))[-1:]
    assert list(row) == list(said), "JSON and CSV have the same columns"
    assert (Decimal(row["credits_charged"]), Decimal(row["usd_charged"])) == (exact, usd)
    assert str(exact.normalize()) in shell()
    query = "SELECT sum(credits_charged) AS credits, round(sum(usd_charged), 6) AS usd FROM ledger"
    (sql,) = json.loads(shell("--sql", query, "--json"))
    assert (Decimal(sql["credits"]), Decimal(sql["usd"])) == (exact, usd)
    daily = shell("--sql", "SELECT sum(credits_charged) AS credits FROM daily", "--csv")
    assert Decimal(daily.splitlines()[1]) == exact
    storage, now = Storage(str(bought_project.folder / "krea")), datetime.now(timezone.utc)
    figures = figures_of(stored_tables(storage), now=now)
    assert figures.total.charged_units == total
    assert sum(day.line.charged_units for day in figures.days) == total
    assert all(sum(line.charged_units for line in one.lines) == total for one in figures.breakdowns)
    assert spend_metadata(storage, now)["credits_charged"] == float(exact)
    assert bought_project.prove().figures.charged_units == total


@given(
    st.lists(st.integers(0, 10**13), min_size=1, max_size=300),
    st.sampled_from(["68/USD", "67.5/EUR", "60/USD", "1/USD"]),
)
def test_the_sum_of_rounded_costs_is_the_rounded_sum(units: list[int], text: str) -> None:
    price = CreditPrice.parse(text)
    each = sum((rounded(price.cost(one), 16) for one in units), Decimal(0))
    assert abs(Fraction(each) - price.cost(sum(units))) < Fraction(1, 10**12)


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        ("a b", "a b"),
        ("a a A b", "a a_2 A_3 b"),
        ("a a_2 a", "a a_2 a_3"),
        ("day Day day_2", "day Day_2 day_2_2"),
    ],
)
def test_names_are_unique_in_any_case_and_the_first_keeps_its_own(names: str, shown: str) -> None:
    assert unique_names(names.split()) == shown.split()


def test_a_result_with_two_columns_of_one_name_has_every_value_under_a_name(shell: Shell) -> None:
    query = "SELECT 1 AS a, 2 AS a, 3 AS A, 4 AS b"
    assert shell("--csv", "--sql", query) == "a,a_2,A_3,b\n1,2,3,4\n"
    assert json.loads(shell("--json", "--sql", query)) == [{"a": 1, "a_2": 2, "A_3": 3, "b": 4}]
    joined = shell("--csv", "--sql", "SELECT * FROM ledger JOIN manifest USING (prompt_id) LIMIT 1")
    (head, values) = csv.reader(io.StringIO(joined))
    assert len(head) == len(values) == len({name.lower() for name in head})


def test_a_column_of_the_table_with_a_name_of_the_ledger_is_summed_as_prompt_name(
    project: ProjectHarness,
) -> None:
    project = project.with_rows("ash", day="monday", purchases="few")
    project.buy()
    spend = project.krea.spend(["prompt_day", "day"])
    today = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    assert [line.of for line in spend.lines] == [("monday", today)]


def test_a_column_whose_type_changed_between_partitions_is_read_as_text(
    bought_project: ProjectHarness, shell: Shell
) -> None:
    folder = bought_project.folder / "krea" / "manifest"
    for number, path in enumerate(sorted(folder.glob("*.parquet"))):
        rows = pq.read_table(path)
        kind: Any = [pa.int64(), pa.string()][number]
        value = pa.array([[7, "seven"][number]] * rows.num_rows, kind)
        pq.write_table(rows.append_column("x", value), path)
    assert json.loads(shell("--json", "--by", "quality"))["lines"][0]["purchases"] == 4
    assert shell("--csv", "--sql", "SELECT count(*) AS n FROM manifest") == "n\n4\n"
    lines = json.loads(shell("--json", "--by", "x"))["lines"]
    assert {line["x"] for line in lines} == {"7", "seven"}


def test_days_are_those_of_a_time_zone(bought_project: ProjectHarness, shell: Shell) -> None:
    late = datetime(2026, 10, 31, 23, 30, tzinfo=timezone.utc)
    microseconds = int(late.timestamp()) * 1_000_000
    bought_project.sql("UPDATE submissions SET sent_at = ?", microseconds)
    day = ["--by", "day", "--csv"]
    assert shell(*day).splitlines()[1].startswith("2026-10-31,4,")
    assert shell(*day, "--timezone", "Europe/Berlin").splitlines()[1].startswith("2026-11-01,4,")
    assert shell("--month", "2026-11", "--timezone", "Europe/Berlin", "--csv").count("2026-11,4,")
    assert shell("--by", "week", "--csv").splitlines()[1].startswith("2026-W44,4,")
    assert "Nothing was bought" in shell("--by", "day", "--until", "2026-10-30")
    with pytest.raises(ConfigError, match="is not a time zone"):
        bought_project.krea.spend(zone="Europe/Nowhere")


def test_a_budget_is_of_utc_days_and_months_in_every_time_zone(
    bought_project: ProjectHarness,
) -> None:
    """As the cap that it is compared with: 23:30 UTC of a last day is the next month in Berlin."""
    late = datetime(2026, 10, 31, 23, 30, tzinfo=timezone.utc)
    bought_project.sql("UPDATE submissions SET sent_at = ?", int(late.timestamp()) * 1_000_000)
    krea = bought_project.with_settings(budgets=["day=9", "month=9"]).krea
    for zone in ("UTC", "Europe/Berlin"):
        for now, used in ((late, 4), (late + timedelta(hours=1), 0)):
            spend = spend_of(krea, period=SpendPeriod(zone=zone), now=now)
            assert [line.used_units for line in spend.budgets] == [used * 4_500] * 2, zone


def test_all_budgets_are_in_one_table(
    bought_project: ProjectHarness, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_BUDGETS", "month=1,partition=5")
    monkeypatch.setenv("KREA_SOFT_BUDGETS", "day=20")
    found = json.loads(shell("--json"), parse_float=Decimal)["budgets"]
    month, *partitions, day = found
    assert (month["kind"], month["credits_used"], month["credits_left"]) == (
        "hard", Decimal("1.8"), Decimal("-0.8"),
    )  # fmt: skip
    assert sum(one["credits_used"] for one in partitions) == Decimal("1.8")
    assert (day["kind"], day["credits_cap"], day["credits_left"]) == ("soft", 20, Decimal("18.2"))
    assert "soft" in shell()
    page = bought_project.folder / "report.html"
    shell("--html", str(page))
    assert 'id="budgets"' in Path(page).read_text()


def test_a_further_column_of_the_report_makes_no_month_again(
    project: ProjectHarness,
) -> None:
    project = project.with_rows("ash", campaign="autumn")
    project.buy()
    krea = project.krea
    krea.spend()
    ledger = project.folder / "krea" / "spend"
    before = {path: path.stat().st_mtime_ns for path in ledger.rglob("*.*")}
    krea.spend_report(project.folder / "r.html", by=["campaign"])
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert "autumn" in (project.folder / "r.html").read_text()


def test_a_price_that_cannot_be_is_kept_in_every_sum(
    bought_project: ProjectHarness, shell: Shell
) -> None:
    bought_project.sql("UPDATE submissions SET charged_units = 10000000000000000")
    lines = json.loads(shell("--json", "--by", "quality"), parse_float=Decimal)["lines"]
    assert lines[0]["credits_charged"] == 4 * 10**12


def test_a_purchase_costs_what_a_credit_cost_on_its_day_and_currencies_are_not_added_up(
    bought_project: ProjectHarness, shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    days = [
        datetime(2026, 9, 30, 23, 59, tzinfo=timezone.utc),
        datetime(2026, 10, 1, tzinfo=timezone.utc),
    ]
    for number, at in enumerate([*days, *days]):
        bought_project.sql(
            "UPDATE submissions SET sent_at = ? WHERE rowid = "
            "(SELECT rowid FROM submissions ORDER BY rowid LIMIT 1 OFFSET ?)",
            *(int(at.timestamp()) * 1_000_000, number),
        )
    monkeypatch.setenv("KREA_CREDIT_PRICES", "68/USD,2026-10-01=60/EUR")
    by_month = json.loads(shell("--json", "--by", "month"), parse_float=Decimal)["lines"]
    assert [(one["month"], one["usd_charged"], one["eur_charged"]) for one in by_month] == [
        ("2026-09", Decimal("0.013235"), 0), ("2026-10", 0, Decimal("0.015")),
    ]  # fmt: skip
    september = bought_project.folder / "krea" / "spend" / "ledger" / "2026-09.parquet"
    before = september.read_bytes(), september.stat().st_mtime_ns
    monkeypatch.setenv("KREA_CREDIT_PRICES", "68/USD,2026-10-01=60/EUR,2026-10-02=55/EUR")
    assert "1 USD is 68 credits, from 2026-10-01 1 EUR is 60 credits" in shell()
    monkeypatch.setenv("KREA_CREDIT_PRICES", "68/USD,2026-10-01=50/EUR")
    query = "SELECT currency, sum(cost) AS cost, sum(usd_charged) AS usd FROM ledger GROUP BY ALL"
    rows = json.loads(shell("--sql", f"{query} ORDER BY 1", "--json"))
    assert [(row["currency"], Decimal(row["cost"])) for row in rows] == [
        ("EUR", Decimal("0.018")), ("USD", Decimal("0.0132352941176470")),
    ]  # fmt: skip
    assert rows[0]["usd"] is None, "dollars are dollars"
    assert (september.read_bytes(), september.stat().st_mtime_ns) == before
    page = bought_project.folder / "report.html"
    shell("--html", str(page))
    assert "0.02 EUR, 0.01 USD" in page.read_text()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("68", "'68' is not a price"),
        ("0/USD", "'0/USD' is not a price"),
        ("68/usd", "'68/usd' is not a price"),
        ("2026-13-01=68/USD", "is not a price"),
        ("68/USD,60/EUR", "'60/EUR' needs a day later than those before it"),
        ("2026-10-01=68/USD,2026-09-01=60/EUR", "needs a day later"),
    ],
)
def test_a_price_that_cannot_be_parsed_is_named(
    monkeypatch: pytest.MonkeyPatch, text: str, said: str
) -> None:
    with pytest.raises(ConfigError, match=f"KREA_CREDIT_PRICES: .*{said}"):
        Settings.from_environment({"KREA_CREDIT_PRICES": text})


_STEPS = st.lists(
    st.tuples(
        st.integers(1, 70),
        st.sampled_from(["68", "67.5", "60", "7"]),
        st.sampled_from(["USD", "EUR"]),
    ),
    max_size=3,
    unique_by=lambda step: step[0],
)


@given(
    steps=_STEPS,
    bought=st.lists(st.tuples(st.integers(0, 75), st.integers(0, 10**9)), min_size=4, max_size=4),
    refunds=st.lists(st.tuples(st.integers(0, 75), st.integers(1, 9_000)), max_size=3),
)
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_surface_has_the_same_credits_and_money_at_dated_prices(
    shared_project: ProjectHarness,
    steps: list[tuple[int, str, str]],
    bought: list[tuple[int, int]],
    refunds: list[tuple[int, int]],
) -> None:
    """The lines, by day and in all, the view ledger and the report, against plain fractions."""
    start = datetime(2026, 8, 1, 12, tzinfo=timezone.utc)
    texts = ["68/USD"] + [
        f"{(start + timedelta(days=day)).date()}={credits}/{currency}"
        for day, credits, currency in sorted(steps)
    ]
    prices = CreditPrices.parse(texts)
    expected: dict[str, list[Fraction]] = {}
    for number, (day, units) in enumerate(bought):
        at = start + timedelta(days=day)
        shared_project.sql(
            "UPDATE submissions SET sent_at = ?, charged_units = ? WHERE rowid = "
            "(SELECT rowid FROM submissions ORDER BY rowid LIMIT 1 OFFSET ?)",
            *(int(at.timestamp()) * 1_000_000, units, number),
        )
        price = prices.on(at.date())
        both = expected.setdefault(price.currency, [Fraction(0), Fraction(0)])
        both[0] += price.cost(units)
        both[1] += price.cost(units)
    krea = shared_project.with_settings(credit_prices=texts).krea
    entered = krea.account_entries()
    for number, (day, units) in enumerate(refunds):
        on = (start + timedelta(days=day)).date()
        row = {"on": on.isoformat(), "credits": f"{Decimal(units) / 10_000:f}", "note": "drawn"}
        krea.add_account_entry(kind="refund", id=f"p{len(entered)}-{number}", **row)
    for one in krea.account_entries():
        price = prices.on(one.day)
        both = expected.setdefault(price.currency, [Fraction(0), Fraction(0)])
        both[1] -= price.cost(one.units)
    update_tables(krea, rebuild=True)
    total = krea.spend().lines[-1]
    assert total.costs() == {name: both[0] for name, both in expected.items()}
    assert total.costs(net=True) == {name: both[1] for name, both in expected.items()}
    by_day: dict[str, Fraction] = {}
    for line in krea.spend(["day"]).lines:
        for name, cost in line.costs(net=True).items():
            by_day[name] = by_day.get(name, Fraction(0)) + cost
    assert by_day == total.costs(net=True)
    query = "SELECT currency, sum(cost) AS cost FROM ledger GROUP BY ALL"
    for row in krea.spend_sql(query).to_pylist():
        assert abs(Fraction(row["cost"]) - expected[row["currency"]][0]) < Fraction(1, 10**12)
    tables = stored_tables(Storage(str(shared_project.folder / "krea")))
    figures = figures_of(tables, now=start + timedelta(days=100))
    assert figures.total.costs() == total.costs()

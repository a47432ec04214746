"""The warnings: that each is found, says its figures, and that a quiet year has none."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from io import BytesIO
from pathlib import Path

import pytest

from krea_dagster.engine.budget import Budget
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.rows import AccountReading
from krea_dagster.errors import ConfigError
from krea_dagster.spend.proof.account import AccountInterval, AccountProof
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.query import stored_tables
from krea_dagster.spend.tables.update import update_spend
from krea_dagster.spend.text import rough
from krea_dagster.spend.warnings.history import (
    BudgetUse,
    DaySpend,
    FailureSeen,
    PartitionSpend,
    PriceSeen,
    SpendHistory,
)
from krea_dagster.spend.warnings.load_history import account_use, observe
from krea_dagster.spend.warnings.spend_warning import Level, SpendWarning, WarningKind
from krea_dagster.spend.warnings.warnings import find_warnings
from tests.spend import simulated_year as year
from tests.spend.simulated_tables import END, OUTAGE, PRICE_DAY, RUNAWAY, simulated_year

FIRST = date(2025, 1, 6)
NOW = datetime(2025, 4, 10, 12, tzinfo=timezone.utc)
TODAY = NOW.date()


def steady(days: int = 95, units: int = 1_000_000) -> list[DaySpend]:
    return [DaySpend(FIRST + timedelta(days=one), units, asked=200) for one in range(days)]


def found(history: SpendHistory, kind: WarningKind, now: datetime = NOW) -> list[SpendWarning]:
    return [one for one in find_warnings(history, now) if one.kind is kind]


def the(history: SpendHistory, kind: WarningKind, now: datetime = NOW) -> SpendWarning:
    (one,) = found(history, kind, now)
    return one


# -- a year -----------------------------------------------------------------------------------

PLANTED = [
    (WarningKind.DAY_OUT_OF_HABIT, "", RUNAWAY),
    (WarningKind.FAILURE_NEW, "no_answer", OUTAGE[0]),
    (WarningKind.FAILURES_HIGH, "", OUTAGE[0]),
    (WarningKind.PRICE_CHANGED, "1K", PRICE_DAY),
    (WarningKind.PRICE_CHANGED, "2K", PRICE_DAY),
]


@pytest.mark.parametrize("purchases", [8_000, 40_000])
def test_the_warnings_of_a_year_are_the_planted_ones_and_at_most_one_other(purchases: int) -> None:
    tables = simulated_year(purchases=purchases)
    history = observe(tables, now=END)
    said = [(one.kind, one.about, one.since) for one in find_warnings(history, END)]
    assert set(PLANTED) <= set(said)
    # A day of noise costs 2.4 times as much as usual in the larger year.
    assert len(said) - len(PLANTED) == (purchases > 8_000)
    outage = the(history, WarningKind.FAILURES_HIGH, END)
    assert outage.until == OUTAGE[1]


def test_so_are_those_of_a_year_in_a_journal(tmp_path: Path) -> None:
    """The same, from the journal through the tables on file: the other simulation's year."""
    simulated = year.SimulatedYear(tmp_path, 8_000)
    simulated.write()
    with closing(Journal(simulated.url)) as journal:
        update_spend(journal, simulated.storage)
    tables = stored_tables(simulated.storage)
    now = datetime(2026, 12, 31, 20, tzinfo=timezone.utc)
    history = observe(tables, now=now)
    said = [(one.kind, one.about, one.since) for one in find_warnings(history, now)]
    assert said == [
        (WarningKind.DAY_OUT_OF_HABIT, "", year.RUNAWAY),
        (WarningKind.FAILURE_NEW, "no_answer", year.OUTAGE[0]),
        (WarningKind.FAILURES_HIGH, "", year.OUTAGE[0]),
        (WarningKind.PRICE_CHANGED, "1K", year.PRICE_CHANGE),
        (WarningKind.PRICE_CHANGED, "2K", year.PRICE_CHANGE),
    ]
    expected = simulated.expected()
    assert sum(day.charged_units for day in history.days) == expected.total("charged_units")
    assert sum(day.at_stake_units for day in history.days) == expected.total("unknown_units")


def test_quiet_years_have_few_warnings() -> None:
    """Six years of 20,000 purchases in eight partitions: nearly 20,000 chances of a false alarm."""
    alarms = []
    for seed in range(6):
        tables = simulated_year(100 + seed, 20_000, planted=False)
        history = observe(tables, now=END)
        alarms += find_warnings(history, END)
    assert len(alarms) <= 1, [one.text for one in alarms]


def test_what_a_day_s_look_says_of_the_past_a_later_look_says_too() -> None:
    tables = simulated_year(purchases=8_000)
    history = observe(tables, now=END)
    early = datetime(2025, 9, 18, tzinfo=timezone.utc)
    assert [(one.kind, one.since) for one in find_warnings(history, early)] == [
        (kind, since) for kind, _, since in PLANTED
    ]


# -- budgets and forecast ---------------------------------------------------------------------


def use(name: str, period: str, used: int, cap: int = 10_000_000) -> SpendHistory:
    kinds = {"day": "day", "month": "month"}
    return SpendHistory(budgets=[BudgetUse(name, kinds.get(period, "total"), cap, used)])  # type: ignore[arg-type]  # the text is one of the three


@pytest.mark.parametrize(
    ("name", "period", "used", "said"),
    [
        ("day", "day", 7_990_000, False),
        ("day", "day", 8_000_000, True),
        ("campaign autumn", "total", 9_000_000, True),
        # On 10 April at noon 31.7 % of the month are gone.
        ("month", "month", 4_100_000, False),
        ("month", "month", 4_200_000, True),
    ],
)
def test_a_budget_is_said_when_nearly_used_or_a_month_s_when_ahead_of_its_days(
    name: str, period: str, used: int, said: bool
) -> None:
    assert bool(found(use(name, period, used), WarningKind.BUDGET_USED)) is said


def test_a_month_nearly_over_may_have_used_nearly_all() -> None:
    last = datetime(2025, 4, 30, 12, tzinfo=timezone.utc)
    assert not found(use("month", "month", 9_900_000), WarningKind.BUDGET_USED, last)
    passed = use("month", "month", 10_100_000)
    assert found(passed, WarningKind.BUDGET_USED, datetime(2025, 4, 30, 23, tzinfo=timezone.utc))


def test_a_budget_s_sentence_has_its_figures() -> None:
    said = the(use("month", "month", 6_000_000), WarningKind.BUDGET_USED)
    assert said.text == (
        "600.00 credits of 1,000.00 credits (60%) of the budget for April 2025 are used, "
        "with 32% of the month gone."
    )
    assert said.since == date(2025, 4, 1)
    assert said.about == "month"


def test_a_budget_of_nothing_is_used_by_anything() -> None:
    assert not found(use("campaign off", "total", 0, 0), WarningKind.BUDGET_USED)
    assert found(use("campaign off", "total", 1, 0), WarningKind.BUDGET_USED)


@pytest.mark.parametrize(
    ("cap", "words"),
    [(31_000_000, None), (29_000_000, "probably"), (27_000_000, "almost certainly")],
)
def test_a_month_that_will_pass_its_budget_is_said(cap: int, words: str | None) -> None:
    history = SpendHistory(steady(), budgets=[BudgetUse("month", "month", cap, 10_000_000)])
    said = found(history, WarningKind.FORECAST)
    assert bool(said) is (words is not None)
    if words is not None:
        assert words in said[0].text
        assert "about 3,000 are expected" in said[0].text
        assert said[0].units == 30_000_000 - cap


@pytest.mark.parametrize("seed", range(4))
def test_warning_table_of_budgets_and_report_have_one_forecast(seed: int) -> None:
    """Also with few purchases, where chance alone makes a day expensive."""
    tables, budgets = simulated_year(seed, purchases=600), [Budget.parse("month=0.01")]
    for month in range(4, 12):
        now = datetime(2025, month, 20, 12, tzinfo=timezone.utc)
        history = observe(tables, now=now, hard=budgets)
        said = the(history, WarningKind.FORECAST, now)
        assert history.budgets[0].forecast_units == said.units + 100
        page = BytesIO()
        write_report(tables, page, now=now, caps=budgets)
        expected = f"About {rough(said.units + 100)} are expected by the end of the month"
        assert expected in page.getvalue().decode()


# -- days, partitions, prices, failures ---------------------------------------------------------


def test_an_odd_day_names_the_partition_that_most_of_it_went_to() -> None:
    days = steady()
    odd = days[80].day
    days[80] = replace(days[80], charged_units=9_000_000)
    parts = [PartitionSpend(odd, "bucket-1", 8_000_000), PartitionSpend(odd, "bucket-2", 1_000_000)]
    said = the(SpendHistory(days, parts), WarningKind.DAY_OUT_OF_HABIT)
    assert said.text == (
        "900.00 credits on 27 Mar 2025, 9.0 times the 100.00 credits that are usual; "
        "800.00 credits of it for partition bucket-1."
    )
    assert said.units == 8_000_000


def test_unusual_days_with_usual_ones_between_them_are_counted() -> None:
    days = steady()
    for number in (80, 82):
        days[number] = replace(days[number], charged_units=9_000_000)
    said = the(SpendHistory(days), WarningKind.DAY_OUT_OF_HABIT)
    assert said.text == (
        "1,800.00 credits on 2 days from 27 Mar 2025 to 29 Mar 2025, 9.0 times the 200.00 credits "
        "that are usual."
    )


def test_the_threshold_decides_what_is_unusual() -> None:
    days = steady()
    days[80] = replace(days[80], charged_units=1_700_000)
    assert not found(SpendHistory(days), WarningKind.DAY_OUT_OF_HABIT)
    kinds = [one.kind for one in find_warnings(SpendHistory(days), NOW, 3)]
    assert kinds == [WarningKind.DAY_OUT_OF_HABIT]


def test_purchases_that_stop_are_a_warning_for_four_weeks() -> None:
    history = SpendHistory(steady(60))
    said = the(history, WarningKind.STOPPED, datetime(2025, 3, 14, 12, tzinfo=timezone.utc))
    assert said.text == (
        "Nothing was bought on 7 days, from 7 Mar 2025 to 13 Mar 2025; 700.00 credits are usual."
    )
    assert (said.since, said.until, said.units) == (
        date(2025, 3, 7),
        date(2025, 3, 13),
        7_000_000,
    )
    later = the(history, WarningKind.STOPPED, datetime(2025, 6, 1, 12, tzinfo=timezone.utc))
    assert (later.warning_id, later.until) == (said.warning_id, date(2025, 4, 3))


@pytest.mark.parametrize(("units", "times"), [(1_500_000, "1.4"), (300_000, "0.7")])
def test_a_new_level_says_its_two_weeks_and_what_was_usual(units: int, times: str) -> None:
    days = steady(112) + [replace(day, charged_units=units) for day in steady(150)[112:]]
    now = datetime(2025, 6, 4, 12, tzinfo=timezone.utc)
    said = the(SpendHistory(days), WarningKind.LEVEL_CHANGED, now)
    assert f", {times} times the 1,400.00 credits of the 12 weeks before." in said.text
    assert (said.until - said.since).days == 13
    assert said.units == abs(units - 1_000_000) * ((said.until - days[112].day).days + 1)


def test_what_is_at_stake_counts_before_it_is_charged() -> None:
    days = steady()
    days[80] = replace(days[80], at_stake_units=9_000_000)
    assert found(SpendHistory(days), WarningKind.DAY_OUT_OF_HABIT)


def test_a_partition_out_of_its_habit_is_said_unless_the_whole_day_was() -> None:
    days = steady()
    parts = [PartitionSpend(day.day, key, 100_000) for day in days for key in ("a", "b", "c")]
    parts[80 * 3] = replace(parts[80 * 3], committed_units=1_500_000)
    said = the(SpendHistory(days, parts), WarningKind.PARTITION_OUT_OF_HABIT)
    assert said.about == "a"
    assert said.since == days[80].day
    assert "150.00 credits on 27 Mar 2025; 10.00 credits are usual" in said.text
    days[80] = replace(days[80], charged_units=9_000_000)
    assert not found(SpendHistory(days, parts), WarningKind.PARTITION_OUT_OF_HABIT)


def test_a_partition_of_one_day_is_held_against_those_before_it() -> None:
    days = steady()
    parts = [PartitionSpend(day.day, f"{day.day}", 1_000_000) for day in days]
    assert not found(SpendHistory(days, parts), WarningKind.PARTITION_OUT_OF_HABIT)
    parts[60] = replace(parts[60], committed_units=5_000_000)
    assert the(SpendHistory(days, parts), WarningKind.PARTITION_OUT_OF_HABIT).since == parts[60].day


def test_a_changed_price_is_said_with_what_it_has_cost_since() -> None:
    prices = [PriceSeen(day.day, "1K", 4_500, 100) for day in steady(60)]
    prices += [PriceSeen(day.day, "1K", 4_800, 100) for day in steady(70)[60:]]
    said = the(SpendHistory(prices=prices), WarningKind.PRICE_CHANGED)
    assert said.text == (
        "An image of 1K costs 0.48 credits instead of 0.45 credits since 7 Mar 2025 (+6.7%): "
        "its 1,000 calls since then came to 30.00 credits more."
    )
    assert said.units == 300_000


def test_a_single_call_at_another_price_does_not_change_the_price() -> None:
    prices = [PriceSeen(day.day, "1K", 4_500, 100) for day in steady(60)]
    prices += [PriceSeen(TODAY, "1K", 9_000, 1)]
    assert not found(SpendHistory(prices=prices), WarningKind.PRICE_CHANGED)


def test_a_new_error_code_is_said_once() -> None:
    codes = [FailureSeen(day.day, "old", 2) for day in steady()]
    codes += [FailureSeen(day.day, "quota_changed", 4, 18_000) for day in steady()[80:]]
    said = the(SpendHistory(steady(), failures=codes), WarningKind.FAILURE_NEW)
    assert said.about == "quota_changed"
    assert "28 purchases ended with quota_changed from 27 Mar 2025 to 2 Apr 2025" in said.text
    assert "12.60 credits" in said.text


def test_an_error_code_of_the_first_weeks_or_of_one_purchase_is_not_new() -> None:
    codes = [FailureSeen(FIRST + timedelta(days=3), "early", 9), FailureSeen(TODAY, "rare", 2)]
    assert not found(SpendHistory(steady(), failures=codes), WarningKind.FAILURE_NEW)


def test_days_with_many_failures_are_said_together() -> None:
    days = [replace(day, trouble=4) for day in steady()]
    for number in (80, 81, 82):
        days[number] = replace(days[number], trouble=100, at_stake_units=50_000)
    said = the(SpendHistory(days), WarningKind.FAILURES_HIGH)
    assert (said.since, said.until) == (days[80].day, days[82].day)
    assert "300 of 600 purchases (50%)" in said.text
    assert "2.0% is usual" in said.text


# -- the account ------------------------------------------------------------------------------


def proof(used: int, explained: int) -> AccountProof:
    readings = [
        AccountReading(datetime(2025, 4, day, tzinfo=timezone.utc), f"run-{day}", units, 0)
        for day, units in ((1, 0), (9, used))
    ]
    gap = AccountInterval(readings[0], readings[1], explained, explained)
    return AccountProof(2, [gap], [gap] if used != explained else [])


def test_an_account_that_used_more_than_the_journal_explains_is_an_error_and_comes_first() -> None:
    history = SpendHistory(steady(), account=account_use(proof(1_000_000, 995_500)))
    first = find_warnings(history, NOW)[0]
    assert first.level is Level.ERROR
    assert first.text == (
        "The account used 100.00 credits, 0.45 credits more than the journal explains."
    )
    assert first.since == date(2025, 4, 1)


def test_stretches_that_differ_both_ways_do_not_cancel_out() -> None:
    both = [proof(1_000_000, 995_500).gaps[0], proof(1_000_000, 1_004_500).gaps[0]]
    use = account_use(AccountProof(4, both, both))
    assert use is not None
    assert abs(use.unexplained_units) == 4_500


def test_an_account_that_agrees_does_not_warn() -> None:
    assert (
        find_warnings(SpendHistory(steady(), account=account_use(proof(1_000_000, 1_000_000))), NOW)
        == []
    )


# -- budgets against the tables ----------------------------------------------------------------


def test_budgets_are_held_against_the_tables_exactly() -> None:
    tables = simulated_year(purchases=4_000)
    texts = ("day=1", "month=1", "partition=1", "column:campaign=1", "partition:bucket-002=2")
    budgets = [Budget.parse(text) for text in texts]
    history = observe(tables, now=END, soft=budgets)
    rows = tables.ledger.select(
        ["day", "partition_key", "campaign", "credits_charged", "credits_unknown"]
    ).to_pylist()

    def units(**of: object) -> int:
        return sum(
            int(((row["credits_charged"] or 0) + row["credits_unknown"]) * 10_000)
            for row in rows
            if all(row[name] == value for name, value in of.items())
        )

    used = {one.name: one.used_units for one in history.budgets}
    month = sum(units(day=date(2025, 12, day)) for day in range(1, 32))
    assert used["day"] == units(day=END.date())
    assert used["month"] == month
    assert used["partition bucket-003"] == units(partition_key="bucket-003")
    assert used["campaign autumn"] == units(campaign="autumn")
    assert used["campaign (none)"] == units(campaign=None)
    assert [one.cap_units for one in history.budgets if one.name == "partition bucket-002"] == [
        10_000,
        20_000,
    ]


def test_a_run_s_budget_is_looked_at_for_a_week_after_its_last_purchase() -> None:
    tables = simulated_year(purchases=4_000)
    budget = Budget.parse("run=1")
    history = observe(tables, now=END, soft=[budget])
    runs = sorted(one.name for one in history.budgets)
    assert runs == [f"run run-{number}" for number in range(357, 365)]


def test_a_budget_for_a_column_that_is_not_there_names_those_that_are() -> None:
    tables = simulated_year(purchases=500)
    budget = Budget.parse("column:client:acme=1")
    with pytest.raises(ConfigError, match="cannot sum by 'client': no such column"):
        observe(tables, now=END, soft=[budget])

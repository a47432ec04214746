"""When the credits run out: by account, from what runs have read, in the one forecast."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.application.account import add_entries
from krea_dagster.engine.journal.balance_log import AccountHistory
from krea_dagster.engine.journal.rows import AccountReading
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.balance import balance_table, rises
from krea_dagster.spend.tables.views import SpendTables
from krea_dagster.spend.warnings.history import Balance, SpendHistory
from krea_dagster.spend.warnings.load_history import observe
from krea_dagster.spend.warnings.run_out import RunOut, run_out, run_out_words
from krea_dagster.spend.warnings.spend_warning import WarningKind
from krea_dagster.spend.warnings.warnings import find_warnings
from tests.spend.project_harness import CommandOn, ProjectHarness
from tests.spend.simulated_tables import END, simulated_year

TODAY = date(2026, 11, 20)
NOW = datetime(2026, 11, 20, 18, tzinfo=timezone.utc)
#: Ten credits on each of 100 days.
STEADY = {TODAY - timedelta(days=number): 100_000 for number in range(1, 101)}
PRICE = 4_500


# -- the day ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("credits", "days"), [(10, 0), (50, 4), (300, 29), (3_650, 364)])
def test_a_steady_account_lasts_as_long_as_its_spend_says(credits: int, days: int) -> None:
    """Ten credits are still expected today."""
    found = run_out(STEADY, TODAY, credits * 10_000, PRICE)
    assert found is not None
    assert found.expected == TODAY + timedelta(days=days)
    assert found.earliest is not None
    assert found.earliest <= found.expected <= (found.latest or date.max)


def test_it_lasts_longer_than_the_horizon_or_forever() -> None:
    assert run_out(STEADY, TODAY, 10**9, PRICE) == RunOut(None, None, None)
    idle = dict.fromkeys(STEADY, 0)
    assert run_out(idle, TODAY, 1, PRICE) == RunOut(None, None, None)


def test_with_few_days_no_day_is_said() -> None:
    few = {day: units for day, units in STEADY.items() if (TODAY - day).days < 5}
    assert run_out(few, TODAY, 10_000, PRICE) is None
    assert run_out({}, TODAY, 10_000, PRICE) is None


@given(
    st.lists(st.integers(0, 500_000), min_size=20, max_size=60),
    st.integers(1, 50_000_000),
    st.integers(0, 5_000_000),
)
def test_the_interval_holds_the_day_and_more_credits_last_longer(
    spends: list[int], units: int, more: int
) -> None:
    spent = {TODAY - timedelta(days=number): one for number, one in enumerate(spends, start=1)}
    found, later = (run_out(spent, TODAY, left, PRICE) for left in (units, units + more))
    assert found is not None
    assert later is not None
    ends = [day or date.max for day in (found.earliest, found.expected, found.latest)]
    assert ends == sorted(ends)
    assert (found.expected or date.max) <= (later.expected or date.max)


def test_the_words_have_the_day_and_its_interval() -> None:
    found = RunOut(date(2026, 12, 2), date(2026, 11, 29), None)
    assert run_out_words(found, TODAY) == (
        "for about 12 days, until 2 Dec 2026 (90 % interval: 29 Nov 2026 to more than a year)"
    )
    assert run_out_words(RunOut(None, None, None), TODAY) == "for more than a year"
    assert "needs more days" in run_out_words(None, TODAY)


# -- the warning --------------------------------------------------------------------------------

LEFT = Balance("k1", NOW, 1_200_000, run_out=RunOut(*[TODAY + timedelta(days=12)] * 3))


def said(balance: Balance, days: int = 14) -> list[str]:
    history = SpendHistory(balances=[balance], balance_days=days)
    found = find_warnings(history, NOW)
    return [one.text for one in found if one.kind is WarningKind.CREDITS_RUN_OUT]


def test_an_account_that_is_used_up_within_some_days_is_a_warning() -> None:
    (text,) = said(LEFT)
    assert text.startswith("The account has 120.00 credits left, for about 12 days, until 2 Dec")
    assert said(LEFT, days=12) == []
    assert said(replace(LEFT, run_out=RunOut(None, None, None))) == []
    assert said(replace(LEFT, run_out=None)) == []


def test_an_account_without_credits_is_one_unless_nothing_is_bought_with_it() -> None:
    empty = replace(LEFT, since_units=1_300_000, run_out=None)
    assert said(empty) == ["The account has no credits left."]
    assert said(replace(empty, is_used=False)) == []


def test_after_a_top_up_it_is_another_warning() -> None:
    topped = replace(LEFT, risen_on=TODAY)
    ids = [
        find_warnings(SpendHistory(balances=[one]), NOW)[0].warning_id
        for one in (LEFT, replace(LEFT, read_units=1), topped)
    ]
    assert ids[0] == ids[1] != ids[2]


# -- from the journal ---------------------------------------------------------------------------


def reading(hour: int, units: int, key: str | None = "k1") -> AccountReading:
    return AccountReading(datetime(2026, 11, 1, hour, tzinfo=timezone.utc), "r", 0, units, key)


def test_a_rise_is_seen_and_is_in_the_view() -> None:
    readings = [reading(hour, units) for hour, units in ((1, 90), (2, 40), (3, 10_040), (4, 39))]
    account = AccountHistory("k1", readings, {})
    assert rises(account) == [0, 0, 10_000, 0]
    rows = balance_table([account]).to_pylist()
    assert [row["credits_risen"] for row in rows] == [0, 0, Decimal(1), 0]


def test_what_was_committed_since_counts_and_what_was_entered_for_later_days(
    bought_project: ProjectHarness,
) -> None:
    bought_project.sql("update account_readings set at = at - 86400000000")
    krea = bought_project.krea
    today = datetime.now(timezone.utc).date()
    for on in (today - timedelta(days=1), today):
        add_entries(krea, [{"kind": "top-up", "credits": "5", "on": f"{on}", "id": f"{on}"}])
    with krea.open_journal() as journal:
        (found,) = journal.balances.accounts()
    assert found.since_units == bought_project.paid_units() == 18_000
    assert found.entered_units == 50_000, "that of the day of the reading may be in it"
    assert found.committed == {today: 18_000}


# -- the surfaces -------------------------------------------------------------------------------


@pytest.fixture
def shell(bought_project: ProjectHarness, command_on: CommandOn) -> Callable[..., str]:
    command = command_on(bought_project)

    def run(*arguments: str) -> str:
        ended = command("spend", *arguments)
        assert ended.code == 0, ended.err
        return ended.out

    return run


def test_terminal_json_and_sql_say_what_a_run_has_read(
    bought_project: ProjectHarness, shell: Callable[..., str]
) -> None:
    account = bought_project.emulator.world.account(bought_project.api_key)
    assert account is not None
    (one,) = json.loads(shell("--json"), parse_float=Decimal)["balances"]
    assert one["credits_left"] == Decimal(account.remaining) / 10_000
    assert one["credits_read"] == one["credits_left"]
    assert one["runs_out"] is None, "a forecast needs more days"
    assert f"balance    {one['credits_left'].normalize():f} credits left for a time" in shell()
    rows = json.loads(shell("--json", "--sql", "SELECT * FROM balance ORDER BY read_at"))
    assert [row["account"] for row in rows] == [one["account"]] * 2
    assert Decimal(rows[-1]["credits_remaining"]) == one["credits_left"]


def test_without_a_reading_they_say_so(
    bought_project: ProjectHarness, shell: Callable[..., str], tmp_path: Path
) -> None:
    bought_project.sql("delete from account_readings")
    assert "balance    not known: no run has read the account" in shell()
    assert json.loads(shell("--json"))["balances"] == []
    bought_project.krea.spend_report(tmp_path / "report.html")
    assert "Not known: no run has read the account." in (tmp_path / "report.html").read_text()


def test_the_report_draws_it_and_says_the_same_day(tmp_path: Path) -> None:
    tables: SpendTables = simulated_year(purchases=8_000)
    spent = {one.day: one.committed_units for one in observe(tables, now=END).days}
    at = [END - timedelta(hours=hours) for hours in (2_000, 900, 1)]
    left = [30_000_000, 10_000_000, 20_000_000]
    readings = [
        AccountReading(when, "r", 0, units, "k1") for when, units in zip(at, left, strict=True)
    ]
    accounts = [AccountHistory("k1", readings, spent)]
    page = BytesIO()
    write_report(tables, page, now=END, accounts=accounts)
    text = page.getvalue().decode()
    (balance,) = observe(tables, now=END, accounts=accounts).balances
    assert balance.run_out is not None
    assert balance.run_out.expected is not None
    lasts = run_out_words(balance.run_out, END.date())
    assert f"2,000.00 credits left, {lasts}." in text
    assert text.count("Line chart of the balance since") == 3, "at three widths"
    earlier = BytesIO()
    write_report(tables, earlier, now=END, accounts=accounts, until=date(2025, 6, 30))
    assert 'id="balance"' not in earlier.getvalue().decode()

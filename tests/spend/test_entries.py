"""Refunds, credits bought or given, and corrections are entered once, and are in every sum."""

from __future__ import annotations

import csv
import io
import json
import sqlite3
from collections.abc import Callable, Mapping
from contextlib import closing, suppress
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea_dagster.application.account import add_entries
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import InputError
from krea_dagster.plugin.assets.spend import spend_metadata
from krea_dagster.spend.report.report_data import figures_of
from krea_dagster.spend.tables.query import stored_tables
from tests.spend.project_harness import CommandOn, ProjectHarness

Shell = Callable[..., str]

#: What the four purchases of the project cost together, in units.
CHARGED = 4 * 4_500


@pytest.fixture
def shell(
    bought_project: ProjectHarness, command_on: CommandOn, monkeypatch: pytest.MonkeyPatch
) -> Shell:
    """Run ``krea-dagster`` on a project of four purchases; return what it prints, and its error."""
    monkeypatch.setenv("COLUMNS", "200")
    command = command_on(bought_project)

    def run(*arguments: str, code: int = 0) -> str:
        ended = command(*arguments)
        assert ended.code == code, ended.err
        return ended.err if code else ended.out

    return run


def figures(shell: Shell, *arguments: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(shell("spend", "--json", *arguments), parse_float=Decimal)
    return said


def purchase_of(project: ProjectHarness, name: str) -> tuple[str, str, str]:
    """Return the task, Idempotency-Key and partition of a row's purchase."""
    record = project.records()[name]
    assert record.task_id
    assert record.idempotency_key
    return record.task_id, record.idempotency_key, record.partition_key


def test_a_refund_of_a_task_is_attributed_as_its_purchase_and_lowers_the_net_charge(
    bought_project: ProjectHarness, shell: Shell
) -> None:
    task, key, partition = purchase_of(bought_project, "ash")
    said = shell("account", "add", "refund", "--credits", "0.2", "--task", task)
    assert "refund of 0.2 credits" in said
    total = figures(shell)["lines"][-1]
    assert (total["purchases"], total["delivered"]) == (4, 4)
    assert (total["credits_charged"], total["credits_refunded"], total["credits_net"]) == (
        Decimal("1.8"), Decimal("0.2"), Decimal("1.6"),
    )  # fmt: skip
    lines = figures(shell, "--by", "partition_key", "--by", "prompt_id")["lines"]
    refunded = {line["prompt_id"]: line for line in lines if line["credits_refunded"]}
    assert list(refunded) == ["ash"]
    assert (refunded["ash"]["partition_key"], refunded["ash"]["purchases"]) == (partition, 1)
    assert "net" in shell("spend")
    shell("account", "add", "refund", "--credits", "0.25", "--purchase", key)
    error = shell("account", "add", "refund", "--credits", "0.1", "--purchase", key, code=2)
    assert f"0.1 is more than is left of the charge of purchase {key}: 0" in error


def test_a_refund_without_a_purchase_counts_for_its_day_alone_and_that_is_said(
    shell: Shell,
) -> None:
    shell("account", "add", "refund", "--credits", "0.3", "--on", "2026-10-02")
    lines = figures(shell, "--by", "partition_key")["lines"]
    assert [line["credits_refunded"] for line in lines if line["partition_key"] is None] == [
        Decimal("0.3")
    ]
    assert "0.3 of these name no purchase" in shell("spend")
    assert figures(shell)["entries"]["credits_refunded_without_purchase"] == Decimal("0.3")
    (october,) = figures(shell, "--month", "2026-10")["lines"]
    assert (october["purchases"], october["credits_net"]) == (0, Decimal("-0.3"))


def test_top_ups_and_promotions_change_no_charge_and_are_said(shell: Shell) -> None:
    top_up = ["--credits", "5000", "--paid", "70", "--currency", "EUR", "--on", "2026-10-02"]
    shell("account", "add", "top-up", *top_up, "--reference", "INV-123")
    shell("account", "add", "top-up", "--credits", "10", "--paid", "1", "--currency", "USD")
    shell("account", "add", "promotion", "--credits", "100")
    said = figures(shell)
    assert said["entries"]["credits_bought"] == 5010
    assert said["entries"]["paid"] == {"EUR": 70, "USD": 1}, "currencies are not added up"
    assert said["entries"]["credits_given"] == 100
    assert said["lines"][-1]["credits_net"] == Decimal("1.8")
    assert "5010 bought for 70 EUR, 1 USD, 100 given" in shell("spend")
    query = "SELECT reference, credits, paid, currency FROM entries WHERE day = '2026-10-02'"
    assert (
        shell("spend", "--csv", "--sql", query).splitlines()[1] == "INV-123,5000.0000,70.0000,EUR"
    )


def test_a_wrong_entry_is_reversed_once_and_stays(
    bought_project: ProjectHarness, shell: Shell
) -> None:
    task, _, partition = purchase_of(bought_project, "ash")
    shell("account", "add", "refund", "--credits", "0.2", "--task", task, "--id", "wrong")
    shell("account", "add", "correction", "--reverses", "wrong")
    by = figures(shell, "--by", "partition_key")["lines"]
    assert {line["credits_refunded"] for line in by} == {0}, "it is reversed where it was"
    assert partition in {line["partition_key"] for line in by}
    assert shell("account", "list").count("wrong") == 2
    error = shell("account", "add", "correction", "--reverses", "wrong", "--id", "x", code=2)
    assert "wrong is reversed already" in error
    path = bought_project.folder / "krea" / "journal.db"
    for change in ("UPDATE account_entries SET units = 1", "DELETE FROM account_entries"):
        with (
            closing(sqlite3.connect(path)) as database,
            pytest.raises(sqlite3.IntegrityError, match="never changed or removed"),
        ):
            database.execute(change)


def test_an_entry_is_entered_once(shell: Shell) -> None:
    """Its identity is what it says, or the id that a person gives it."""
    promotion = ["account", "add", "promotion", "--credits", "5", "--on", "2026-10-02"]
    shell(*promotion)
    assert "1 entry was known" in shell(*promotion)
    assert "another note" in shell(*promotion, "--note", "a second one", code=2)
    shell(*promotion, "--id", "second")
    assert figures(shell)["entries"]["credits_given"] == 10


def test_a_file_is_imported_once_and_what_is_listed_can_be_imported(
    bought_project: ProjectHarness, shell: Shell, tmp_path: Path
) -> None:
    task, _, _ = purchase_of(bought_project, "ash")
    file = tmp_path / "entries.csv"
    file.write_text(
        "on,kind,credits,paid,currency,reference,task,note\n"
        '2026-10-02,top-up,5000,70.00,EUR,INV-123,,"the pack, in October"\n'
        f"2026-10-05,refund,0.2,,,,{task},\n"
        "2026-10-06,correction,-0.1,,,,,charged twice\n"
    )
    assert shell("account", "import", str(file)).count("entered") == 3
    assert "3 entries were known" in shell("account", "import", str(file))
    total = figures(shell)["lines"][-1]
    assert total["credits_refunded"] == Decimal("0.1")
    shell("account", "add", "correction", "--reverses", known(shell, "refund"))
    listed = tmp_path / "listed.csv"
    listed.write_text(shell("account", "list", "--csv"))
    assert "4 entries were known" in shell("account", "import", str(listed))
    assert next(csv.reader(io.StringIO(listed.read_text())))[:4] == ["id", "on", "kind", "credits"]


def known(shell: Shell, kind: str) -> str:
    rows = json.loads(shell("account", "list", "--json"))
    return str(next(row["id"] for row in rows if row["kind"] == kind))


WRONG: Mapping[str, str] = {
    "kind: 'gift' is not one of top-up, promotion, refund, correction": "2026-10-02,gift,1,,,,,",
    "on: '2 Oct' is not a day such as 2026-10-02": "2 Oct,refund,1,,,,,",
    "on: 2999-01-01 is in the future": "2999-01-01,refund,1,,,,,",
    "credits: '1,5' is not a number": '2026-10-02,refund,"1,5",,,,,',
    "credits: '0.00001' is not a number with at most 4 decimals": "2026-10-02,refund,0.00001,,,,,",
    "credits: a refund of -1 is not possible": "2026-10-02,refund,-1,,,,,",
    "paid: only a top-up is paid for": "2026-10-02,refund,1,5,EUR,,,",
    "currency: say it with paid": "2026-10-02,top-up,1,5,euro,,,",
    "purchase: the journal has no purchase with 'k'": "2026-10-02,refund,1,,,k,,",
    "purchase: a top-up belongs to no purchase": "2026-10-02,top-up,1,,,k,,",
    "reverses: there is no entry x": "2026-10-02,correction,,,,,x,",
    "note: say what a correction corrects": "2026-10-02,correction,1,,,,,",
    "id: it repeats entries.csv row 1": "2026-10-01,promotion,7,,,,,",
}


@pytest.mark.parametrize("said", WRONG)
def test_a_wrong_row_is_named_with_its_column_and_nothing_is_entered(
    shell: Shell, tmp_path: Path, said: str
) -> None:
    file = tmp_path / "entries.csv"
    head = "on,kind,credits,paid,currency,purchase,reverses,note"
    file.write_text(f"{head}\n2026-10-01,promotion,7,,,,,\n{WRONG[said]}\n")
    assert f"entries.csv row 2: {said}" in shell("account", "import", str(file), code=2)
    assert "Nothing was entered" in shell("account", "list")


def test_a_file_with_another_column_is_refused(shell: Shell, tmp_path: Path) -> None:
    file = tmp_path / "entries.csv"
    file.write_text("on,kind,amount\n2026-10-01,promotion,7\n")
    assert "has a column 'amount'" in shell("account", "import", str(file), code=2)
    file.write_text("on,kind\n2026-10-01,promotion\n")
    assert "has no column credits" in shell("account", "import", str(file), code=2)


_ENTRIES = st.lists(
    st.tuples(
        st.sampled_from(["top-up", "promotion", "refund", "correction"]),
        st.integers(1, 900).flatmap(lambda units: st.sampled_from([units, -units])),
        st.sampled_from([None, "ash", "birch", "cedar", "date"]),
        st.integers(0, 40),
    ),
    max_size=8,
)


@given(rounds=st.lists(_ENTRIES, min_size=1, max_size=3))
@settings(
    deadline=None, max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_every_surface_has_the_same_refunds_and_net_charge(
    shared_project: ProjectHarness, rounds: list[list[tuple[str, int, str | None, int]]]
) -> None:
    """Command, SQL, report and asset, after each of several rounds of entries."""
    project, now = shared_project, datetime.now(timezone.utc)
    krea = project.krea
    before = {one.entry_id for one in krea.account_entries()}
    expected = sum(
        one.units for one in krea.account_entries() if one.kind in ("refund", "correction")
    )
    for number, entries in enumerate(rounds):
        for position, (kind, units, name, age) in enumerate(entries):
            signed = units if kind == "correction" else abs(units)
            row = {
                "kind": kind,
                "credits": f"{Decimal(signed) / 10_000:f}",
                "on": (now.date() - timedelta(days=age)).isoformat(),
                "id": f"{len(before)}-{number}-{position}",
                "note": "drawn",
            }
            if name and kind in ("refund", "correction"):
                row["purchase"] = purchase_of(project, name)[1]
            with suppress(InputError):  # more than is left of the charge
                add_entries(krea, [row])
                expected += signed if kind in ("refund", "correction") else 0
        lines = krea.spend(["partition_key"]).lines
        total = krea.spend().lines[-1]
        assert (total.refunded_units, total.net_units) == (expected, CHARGED - expected)
        assert sum(line.refunded_units for line in lines) == expected
        assert sum(line.net_units for line in krea.spend(["day"]).lines) == CHARGED - expected
        query = "SELECT sum(credits_refunded) AS r, sum(credits_net) AS n FROM spend_by_day"
        assert krea.spend_sql(query).to_pylist() == [
            {"r": Decimal(expected) / 10_000, "n": Decimal(CHARGED - expected) / 10_000}
        ]
        storage = Storage(str(project.folder / "krea"))
        report = figures_of(stored_tables(storage), now=now, until=date(9999, 1, 1))
        assert report.total.net_units == CHARGED - expected
        assert sum(period.line.refunded_units for period in report.days) == expected
        assert spend_metadata(storage, now)["credits_net"] == (CHARGED - expected) / 10_000
        assert total.charged_units == project.prove().figures.charged_units == CHARGED

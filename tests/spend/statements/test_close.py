"""A closed month keeps its statement; what comes later is an adjustment in the next one."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea_dagster.application.close import close_month
from krea_dagster.errors import ConfigError, InputError
from krea_dagster.spend.prices import CreditPrice
from krea_dagster.spend.proof.findings import FindingKind
from krea_dagster.spend.statements.statement import STATEMENT_SCHEMA
from tests.spend.project_harness import CommandOn, ProjectHarness, kinds

Shell = Callable[..., str]
AFTER = datetime(2026, 11, 1, tzinfo=timezone.utc)


def set_purchase(project: ProjectHarness, number: int, day: date, units: int | None) -> None:
    """Move a purchase to a day, and give it a charge; None for one that is not known."""
    at = datetime(day.year, day.month, day.day, 12, tzinfo=timezone.utc)
    project.sql(
        "UPDATE submissions SET sent_at = ?, charged_units = ?, committed_units = ? "
        "WHERE rowid = (SELECT rowid FROM submissions ORDER BY rowid LIMIT 1 OFFSET ?)",
        *(int(at.timestamp()) * 1_000_000, units, units or 9_000, number),
    )


@pytest.fixture
def months(bought_project: ProjectHarness) -> ProjectHarness:
    """Two purchases in September and two in October 2026, one of which is not settled."""
    days = [date(2026, 9, 3), date(2026, 9, 30), date(2026, 10, 1), date(2026, 10, 31)]
    for number, (day, units) in enumerate(zip(days, [4_500, 18_000, 4_500, None], strict=True)):
        set_purchase(bought_project, number, day, units)
    return bought_project


def rows_of(project: ProjectHarness) -> Iterator[dict[str, Any]]:
    """Yield the rows of all statements."""
    for one in project.krea.closed_months():
        yield from pq.read_table(project.folder / "krea" / f"{one.name}.parquet").to_pylist()


@pytest.fixture
def shell(months: ProjectHarness, command_on: CommandOn, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.setenv("COLUMNS", "200")
    command = command_on(months)

    def run(*arguments: str, code: int = 0) -> str:
        ended = command(*arguments)
        assert ended.code == code, ended.err
        return ended.err if code == 2 else ended.out

    return run


def test_a_statement_is_written_once_with_its_hash_and_is_not_changed(
    months: ProjectHarness, shell: Shell
) -> None:
    said = shell("close", "2026-09", "2026-10")
    assert "0.9 credits of 2026-10 were at stake" in said
    root = months.folder / "krea"
    closed = json.loads(shell("close", "--list", "--json"), parse_float=Decimal)
    assert [(one["month"], one["credits_charged"]) for one in closed] == [
        ("2026-09", Decimal("2.25")), ("2026-10", Decimal("0.45")),
    ]  # fmt: skip
    for one in closed:
        for file, digest in (("file", "sha256"), ("page", "page_sha256")):
            assert hashlib.sha256((root / one[file]).read_bytes()).hexdigest() == one[digest]
    table = pq.read_table(root / closed[0]["file"])
    assert table.schema.equals(STATEMENT_SCHEMA)
    assert table.num_rows == 2
    set_purchase(months, 0, date(2026, 9, 3), 4_600)
    assert "2026-09 was closed on" in shell("close", "2026-09")
    assert json.loads(shell("close", "--list", "--json"), parse_float=Decimal) == closed


def test_a_month_that_has_not_ended_or_is_out_of_order_is_refused(months: ProjectHarness) -> None:
    krea = months.krea
    with pytest.raises(InputError, match="2026-10 has not ended"):
        close_month(krea, "2026-10", now=datetime(2026, 10, 31, 23, 59, tzinfo=timezone.utc))
    with pytest.raises(InputError, match=r"first.*: krea-dagster close 2026-09"):
        close_month(krea, "2026-10", now=AFTER)
    with pytest.raises(ConfigError, match="'October' is not a month"):
        close_month(krea, "October", now=AFTER)
    krea.close("2026-09")
    close_month(krea, "2026-10", now=AFTER)
    with pytest.raises(InputError, match="2026-08 is before the last closed month 2026-10"):
        krea.close("2026-08")


def test_what_comes_later_is_an_adjustment_in_the_next_statement_and_said_of_its_month(
    months: ProjectHarness, shell: Shell
) -> None:
    krea = months.krea
    krea.close("2026-09")
    assert "no adjustments since" in shell("spend", "--month", "2026-09")
    key = months.records()["ash"].idempotency_key or ""
    krea.add_account_entry(kind="refund", credits="0.2", on="2026-09-20", purchase=key)
    set_purchase(months, 1, date(2026, 9, 30), 18_500)
    krea.account_entries()
    said = shell("spend", "--month", "2026-09")
    assert "2.25 charged, 0 refunded; since then 0.05 charged and 0.2 refunded" in said
    figures = json.loads(shell("spend", "--month", "2026-09", "--json"), parse_float=Decimal)
    assert figures["statement"]["credits_refunded_since"] == Decimal("0.2")
    krea.close("2026-10")
    adjustments = [row for row in rows_of(months) if row["adjusts"]]
    assert [(row["month"], row["kind"], row["credits_charged"]) for row in adjustments] == [
        ("2026-09", "refund", 0), ("2026-09", "purchase", Decimal("0.05")),
    ]  # fmt: skip
    assert adjustments[0]["partition_key"] == months.records()["ash"].partition_key
    (page,) = (months.folder / "krea" / "statements").glob("2026-10-*.html")
    text = page.read_text()
    assert "Adjustments to earlier months" in text
    assert adjustments[1]["fact_id"] in text


def test_a_statement_that_was_changed_is_noticed(months: ProjectHarness, shell: Shell) -> None:
    before = kinds(months.prove())
    shell("close", "2026-09")
    assert kinds(months.prove()) == before
    assert "Every statement is as it was" in shell("close", "--check")
    (page,) = (months.folder / "krea" / "statements").glob("*.html")
    (rows,) = (months.folder / "krea" / "statements").glob("*.parquet")
    page.write_text(page.read_text().replace("2.25", "1.25"))
    assert "was changed since the month was closed" in shell("close", "--check", code=1)
    assert FindingKind.STATEMENT_CHANGED.value in kinds(months.prove())
    rows.unlink()
    assert f"{rows.name} of 2026-09 is missing" in shell("close", "--check", code=1)
    assert "of 2026-09 is missing" in shell("close", "2026-10", code=2)


def test_statements_are_copied_to_a_folder(shell: Shell, tmp_path: Path) -> None:
    shell("close", "2026-09", "--to", str(tmp_path / "finance"))
    assert sorted(path.suffix for path in (tmp_path / "finance").iterdir()) == [".html", ".parquet"]


# -- the sum of the statements ---------------------------------------------------------------------

_DAYS = st.dates(date(2026, 3, 1), date(2026, 6, 30))
_STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("settle"), st.integers(0, 3), st.integers(0, 30_000)),
        st.tuples(st.just("refund"), st.sampled_from([None, 0, 1, 2, 3]), _DAYS),
        st.tuples(st.just("top-up"), st.integers(1, 90_000), _DAYS),
        st.tuples(st.just("reverse"), st.just(0), st.just(0)),
        st.tuples(st.just("price"), st.sampled_from(["68/USD", "60/EUR", "55/EUR"]), _DAYS),
        st.tuples(st.just("close"), st.just(0), st.just(0)),
    ),
    min_size=3,
    max_size=12,
)


class _Books:
    """A copy of a project whose months are closed one after the other."""

    def __init__(self, project: ProjectHarness, days: list[date]) -> None:
        self.project = project
        self.keys = [one.idempotency_key for one in project.records().values()]
        self.number = 0
        for number, day in enumerate(days):
            set_purchase(project, number, day, None)

    def step(self, kind: str, what: Any, how: Any) -> None:
        krea, self.number = self.project.krea, self.number + 1
        if kind == "settle":
            self.project.sql(
                "UPDATE submissions SET charged_units = ?, committed_units = ? WHERE rowid = "
                "(SELECT rowid FROM submissions ORDER BY rowid LIMIT 1 OFFSET ?)",
                *(how, how, what),
            )
        elif kind in ("refund", "top-up"):
            units = 7 if kind == "refund" else what
            row = {"credits": f"{Decimal(units) / 10_000:f}", "on": how.isoformat()}
            if kind == "refund" and what is not None:
                row["purchase"] = self.keys[what] or ""
            try:
                krea.add_account_entry(kind=kind, id=f"{kind}-{self.number}", **row)
            except InputError as error:
                if "is more than is left" not in str(error):
                    raise
        elif kind == "reverse":
            entries = krea.account_entries()
            done = {one.reverses for one in entries}
            left = [one for one in entries if not one.reverses and one.entry_id not in done]
            if left:
                krea.add_account_entry(
                    kind="correction", reverses=left[0].entry_id, on=left[0].day.isoformat()
                )
        elif kind == "price":
            prices = ["68/USD", f"{how}={what}"]
            self.project = self.project.with_settings(credit_prices=prices)
        else:
            self.close()

    def close(self) -> None:
        closed = [one.month for one in self.project.krea.closed_months()]
        months = [f"2026-{number:02}" for number in range(3, 8)]
        left = [month for month in months if month not in closed]
        if left:
            self.project.krea.close(left[0])


def stated(project: ProjectHarness) -> dict[str, Any]:
    """Add up all statements, exactly: charged, refunded, bought, and money by currency."""
    sums: dict[str, Any] = dict.fromkeys(["charged", "refunded", "bought"], Decimal(0))
    for row in rows_of(project):
        for name in ("charged", "refunded", "bought"):
            sums[name] += row[f"credits_{name}"]
        price = CreditPrice.parse(row["credit_price"])
        units = int((row["credits_charged"] - row["credits_refunded"]) * 10_000)
        sums[price.currency] = sums.get(price.currency, 0) + price.cost(units)
    return sums


def known(project: ProjectHarness, until: date | None) -> dict[str, Any]:
    """Return what the ledger and the entries say up to a day."""
    spend = project.krea.spend(["quality"], until=until)
    found: dict[str, Any] = {
        "charged": Decimal(sum(line.charged_units for line in spend.lines)) / 10_000,
        "refunded": Decimal(sum(line.refunded_units for line in spend.lines)) / 10_000,
        "bought": Decimal(spend.entries.bought_units) / 10_000,
    }
    for line in spend.lines:
        for name, cost in line.costs(net=True).items():
            found[name] = found.get(name, 0) + cost
    return found


@given(days=st.lists(_DAYS, min_size=4, max_size=4), steps=_STEPS)
@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_statements_add_up_to_what_the_ledger_says_at_every_close(
    shared_project: ProjectHarness, days: list[date], steps: list[tuple[str, Any, Any]]
) -> None:
    """Whatever the order of purchases, late settlements, refunds, new prices and closes."""
    root = shared_project.folder / "krea"
    shutil.rmtree(root)
    shutil.copytree(shared_project.folder / "honest", root)
    books = _Books(shared_project, days)
    for kind, what, how in [*steps, ("close", 0, 0)]:
        books.step(kind, what, how)
        if kind == "close":
            last = books.project.krea.closed_months()[-1].month
            end = date(2026, int(last[5:]) + 1, 1)
            until = date.fromordinal(end.toordinal() - 1)
            in_ledger = known(books.project, until)
            in_statements = stated(books.project)
            names = in_ledger.keys() | in_statements.keys()
            assert {name: in_ledger.get(name, 0) for name in names} == {
                name: in_statements.get(name, 0) for name in names
            }
    for one in books.project.krea.closed_months():
        table = pq.read_table(root / f"{one.name}.parquet")
        assert isinstance(table, pa.Table)
        assert one.charged_units == sum(
            int(row["credits_charged"] * 10_000) for row in table.to_pylist() if not row["adjusts"]
        )

"""The ledger and the daily sums agree with the simulation's sums to the last unit."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from datetime import date, datetime, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.errors import ConfigError
from krea_dagster.spend.prices import CreditPrices
from krea_dagster.spend.tables.daily import DAILY_SCHEMA, FAILURES_SCHEMA, daily_schema
from krea_dagster.spend.tables.ledger import LEDGER_SCHEMA
from krea_dagster.spend.tables.measures import SUM_OF_CREDITS
from krea_dagster.spend.tables.query import open_tables, run_query, sums
from krea_dagster.spend.tables.sql import units_of
from krea_dagster.spend.tables.update import TABLES, SpendUpdate, update_spend
from tests.spend.simulated_year import FIRST, OUTAGE, SimulatedYear

LAST = date(2026, 12, 31)
LATER = datetime(2027, 1, 2, tzinfo=timezone.utc)


def update(year: SimulatedYear, **options: Any) -> SpendUpdate:
    with closing(Journal(year.url)) as journal:
        return update_spend(journal, year.storage, **({"now": LATER} | options))


def read(year: SimulatedYear, table: str) -> pa.Table:
    paths = sorted((year.folder / "spend" / table).glob("*.parquet"))
    schemas = {"ledger": LEDGER_SCHEMA, "failures": FAILURES_SCHEMA}
    tables = [pq.read_table(path) for path in paths]
    return pa.concat_tables(tables or [schemas[table].empty_table()])


def files(year: SimulatedYear) -> dict[str, bytes]:
    """The bytes of every table, by name."""
    root = year.folder / "spend"
    return {
        path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*.parquet")
    }


def total_units(column: pa.ChunkedArray) -> int:
    return units_of(pc.sum(column).as_py())


def count(column: pa.ChunkedArray) -> int:
    return int(pc.sum(column).as_py())


@pytest.fixture(scope="module")
def year(tmp_path_factory: pytest.TempPathFactory) -> SimulatedYear:
    """A whole year with its tables."""
    made = SimulatedYear(tmp_path_factory.mktemp("year"), 3_000)
    made.write()
    update(made, by=["campaign"])
    return made


# -- sums -----------------------------------------------------------------------------------------

_BOOKED = {
    "images_asked": "asked",
    **{name: name for name in ("delivered", "failed", "refused", "lost", "rejected", "unknown")},
    **{name: name for name in ("pending", "replaced", "reused")},
    "credits_charged": "charged_units",
    "credits_returned": "returned_units",
    "credits_at_stake": "unknown_units",
    "credits_saved_by_reuse": "saved_units",
}


def test_every_day_of_the_daily_sums_is_exact(year: SimulatedYear) -> None:
    expected, daily = year.expected(), read(year, "daily")
    assert daily.schema.equals(daily_schema(["campaign"]))
    assert {*daily["day"].to_pylist()} == set(expected.days)
    for day, sums_of_day in expected.days.items():
        rows = daily.filter(pc.equal(daily["day"], pa.scalar(day)))
        for column, booked in _BOOKED.items():
            kind = daily.schema.field(column).type
            found = (
                total_units(rows[column])
                if kind == SUM_OF_CREDITS
                else pc.sum(rows[column]).as_py()
            )
            assert found == sums_of_day[booked], (day, column)


def test_the_ledger_has_one_row_per_purchase_and_exact_sums(year: SimulatedYear) -> None:
    expected, ledger = year.expected(), read(year, "ledger")
    assert ledger.schema.equals(LEDGER_SCHEMA)
    assert ledger.num_rows == year.purchases == len(set(ledger["idempotency_key"].to_pylist()))
    for column, booked in (
        ("credits_charged", "charged_units"),
        ("credits_reserved", "reserved_units"),
        ("credits_returned", "returned_units"),
        ("credits_unknown", "unknown_units"),
    ):
        assert total_units(ledger[column]) == expected.total(booked), column
    usd = [(row, Fraction(units_of(row), 680_000)) for row in ledger["credits_charged"].to_pylist()]
    for (_, exact), said in zip(usd, ledger["usd_charged"].to_pylist(), strict=True):
        assert said is None or abs(Fraction(said) - exact) <= Fraction(1, 2_000_000)
    assert ledger["sent_at"].to_pylist() == sorted(ledger["sent_at"].to_pylist())


def test_an_earlier_purchase_stays_failed_and_keeps_the_code_of_its_failure(
    year: SimulatedYear,
) -> None:
    ledger = read(year, "ledger").to_pylist()
    second = [row for row in ledger if row["number"] == 2]
    assert second
    by_key = {row["idempotency_key"]: row for row in ledger}
    for row in second:
        first = by_key[f"krea-{row['request_key']}-1"]
        assert (first["status"], first["outcome"]) == ("failed", "failed")
        assert first["error_code"] == "generation_failed"
        assert (first["credits_charged"], first["width"]) == (Decimal("0.0000"), None)


def test_an_image_that_a_later_attempt_replaced_has_its_row(year: SimulatedYear) -> None:
    """The manifest lists the later one alone."""
    ledger = read(year, "ledger").to_pylist()
    replaced = [row for row in ledger if row["outcome"] == "replaced"]
    assert len(replaced) == year.expected().total("replaced") > 5
    later = {row["prompt_id"] for row in ledger if row["attempt"] == 1}
    assert {row["prompt_id"] for row in replaced} == later
    assert all(row["rows"] >= 1 for row in replaced)


def test_failures_are_told_by_class_with_what_they_cost(year: SimulatedYear) -> None:
    failures, expected = read(year, "failures"), year.expected()
    assert failures.schema.equals(FAILURES_SCHEMA)
    by_code: dict[str, int] = {}
    for row in failures.to_pylist():
        by_code[row["error_code"]] = by_code.get(row["error_code"], 0) + row["count"]
    assert by_code["generation_failed"] == expected.total("failed")
    assert by_code["no_answer"] == expected.total("unknown")
    assert by_code["task_not_found"] == expected.total("lost")
    in_outage = pc.and_(
        pc.greater_equal(failures["day"], pa.scalar(OUTAGE[0])),
        pc.less_equal(failures["day"], pa.scalar(OUTAGE[1])),
    )
    unknown = failures.filter(pc.and_(in_outage, pc.equal(failures["error_code"], "no_answer")))
    assert total_units(unknown["credits"]) == expected.total("unknown_units", *OUTAGE)


def test_sums_by_any_column_and_by_sql_are_exact(year: SimulatedYear) -> None:
    expected = year.expected()
    with closing(open_tables(year.storage)) as duck:
        for by in (
            [],
            ["day"],
            ["month"],
            ["quality", "size"],
            ["campaign"],
            ["run_id"],
            ["outcome"],
        ):
            lines = sums(duck, by)
            assert sum(line.purchases for line in lines) == expected.total("asked"), by
            for name in ("charged", "returned"):
                found = sum(getattr(line, f"{name}_units") for line in lines)
                assert found == expected.total(f"{name}_units"), by
        july = sums(duck, since=OUTAGE[0], until=OUTAGE[1])
        assert july[0].unknown == expected.total("unknown", *OUTAGE)
        questions = (
            "SELECT sum(credits_charged) AS credits FROM ledger",
            "SELECT sum(credits_charged) AS credits FROM daily",
        )
        for question in questions:
            answer = run_query(duck, question)
            assert units_of(answer["credits"][0].as_py()) == expected.total("charged_units")
        with pytest.raises(
            ConfigError, match="cannot sum by 'hue': no such column; there are partition"
        ):
            sums(duck, ["hue"])


@pytest.mark.parametrize(
    "query",
    [
        "DROP VIEW ledger",
        "SELECT 1; SELECT 2",
        "COPY (SELECT 1) TO 'here.csv'",
        "SELECT * FROM read_csv('/etc/passwd')",
        "SELECT hue FROM ledger",
        "SELEKT",
        "SET enable_external_access = true",
    ],
)
def test_nothing_but_a_question_about_the_tables_is_answered(
    year: SimulatedYear, query: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with closing(open_tables(year.storage)) as duck, pytest.raises(ConfigError):
        run_query(duck, query)
    assert list(tmp_path.iterdir()) == []


# -- small steps ----------------------------------------------------------------------------------


@settings(max_examples=3, phases=[Phase.generate])
@given(
    steps=st.lists(st.integers(1, 364), min_size=1, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 1000),
    by=st.sampled_from([(), ("campaign",)]),
)
def test_many_increments_end_in_the_bytes_of_one_rebuild(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], seed: int, by: tuple[str, ...]
) -> None:
    year = SimulatedYear(tmp_path_factory.mktemp("steps"), 150, seed=seed)
    for number in [*steps, (LAST - FIRST).days]:
        year.write(FIRST + timedelta(days=number))
        update(year, by=by)
        ledger = read(year, "ledger")
        assert total_units(ledger["credits_charged"]) == year.expected().total("charged_units")
    small_steps = files(year)
    update(year, by=by, rebuild=True)
    assert files(year) == small_steps
    assert update(year, by=by).months == ()


def test_only_the_months_that_are_touched_are_written(tmp_path: Path) -> None:
    year = SimulatedYear(tmp_path, 800)
    year.write(date(2026, 11, 10))
    assert len(update(year).months) == 11
    before = files(year)
    year.write(date(2026, 11, 11))
    written = update(year).months
    assert "2026-11" in written
    assert len(written) < 4, "November, and those with a replaced image"
    after = files(year)
    assert {name for name in after if after[name] != before.get(name)} <= {
        f"{table}/{month}.parquet" for table in TABLES for month in written
    }


def test_without_a_further_event_no_file_is_written(tmp_path: Path) -> None:
    year = SimulatedYear(tmp_path, 300)
    year.write()
    update(year)
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "spend").rglob("*.*")}
    assert len(written) == 1 + 12 * len(TABLES)
    assert update(year).months == ()
    assert {path: path.stat().st_mtime_ns for path in written} == written


def test_an_event_within_the_margin_is_found_though_a_later_one_was_taken(tmp_path: Path) -> None:
    """Its transaction ended after the update, or its clock is behind."""
    year = SimulatedYear(tmp_path, 300)
    year.write()
    update(year)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as database, database:
        ((newest,),) = database.execute("select max(updated_at) from requests").fetchall()
        database.execute(
            "update requests set seq = seq + 1, updated_at = updated_at - 3600000000 "
            "where updated_at = ?",
            (newest,),
        )
    assert update(year).months != ()


def _move_sums(database: sqlite3.Connection) -> None:
    """Move the sums of a month, as the journal does with each change of money."""
    database.execute("insert into commitments values ('month:2026-02', 0, -1)")


def test_a_change_that_the_clocks_hide_is_found_by_the_sums(tmp_path: Path) -> None:
    """A machine whose clock is a month behind settles a purchase."""
    year = SimulatedYear(tmp_path, 300)
    year.write()
    update(year)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as database, database:
        (key,) = database.execute(
            "select idempotency_key from submissions where sent_at < 1772000000000000 "
            "and charged_units > 0 limit 1"
        ).fetchone()
        database.execute(
            "update submissions set charged_units = charged_units - 1 where idempotency_key = ?",
            (key,),
        )
        _move_sums(database)
    assert len(update(year).months) == 1
    ledger = read(year, "ledger")
    assert total_units(ledger["credits_charged"]) == year.expected().total("charged_units") - 1


def test_a_purchase_that_moves_to_another_month_leaves_no_row_behind(tmp_path: Path) -> None:
    """One that was turned away is sent again, and counts from then on."""
    year = SimulatedYear(tmp_path, 200)
    year.write()
    update(year)
    with closing(sqlite3.connect(tmp_path / "journal.db")) as database, database:
        database.execute("update submissions set sent_at = sent_at + 366 * 86400000000")
        _move_sums(database)
    updated = update(year)
    assert updated.months[0] == "2027-01"
    assert updated.removed == tuple(f"2026-{number:02d}" for number in range(1, 13))
    assert read(year, "ledger").num_rows == year.purchases
    assert {day.year for day in read(year, "daily")["day"].to_pylist()} <= {2027, 2028}


def test_missing_files_other_prices_or_columns_make_their_months_again(tmp_path: Path) -> None:
    year = SimulatedYear(tmp_path, 300)
    year.write()
    update(year)
    (tmp_path / "spend" / "daily" / "2026-03.parquet").unlink()
    assert "2026-03" in update(year).months
    prices = CreditPrices.parse(["68/USD", "2026-10-15=60/EUR"])
    assert update(year, prices=prices).months == ("2026-10", "2026-11", "2026-12")
    assert len(update(year, prices=prices, by=["campaign"]).months) == 12
    (tmp_path / "spend" / "state.json").write_text("{")
    assert len(update(year).months) == 12
    with pytest.raises(ConfigError, match="no column 'hue'"):
        update(year, by=["hue"])
    with pytest.raises(ConfigError, match="already has a column 'quality'"):
        update(year, by=["quality"])


def test_a_journal_without_a_purchase_gives_empty_tables(tmp_path: Path) -> None:
    year = SimulatedYear(tmp_path, 10)
    with closing(Journal(year.url)):
        assert update(year) == SpendUpdate((), (), 0)
    with closing(open_tables(year.storage)) as duck:
        assert sums(duck)[0].purchases == 0
        assert sums(duck, ["month"]) == []
        assert run_query(duck, "SELECT * FROM daily").schema.names == DAILY_SCHEMA.names

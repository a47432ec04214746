"""Verdicts in the spend tables: what an accepted image came to, also where it is judged later."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from contextlib import closing
from datetime import datetime, timezone
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from sqlalchemy import create_engine, text

from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.spend.report.report_data import figures_of
from krea_dagster.spend.tables.query import SpendLine, open_tables, stored_tables, sums
from krea_dagster.spend.tables.update import TABLES, update_spend
from tests.spend.simulated_year import SimulatedYear

NOW = datetime(2027, 3, 1, tzinfo=timezone.utc)
_NUMBERS = itertools.count(1)


def judge(year: SimulatedYear, verdicts: Mapping[str, str]) -> None:
    """Give verdicts on the images of these requests; in this year a request is its image's hash."""
    with closing(Journal(year.url)) as journal:
        journal.verdicts.add(
            [
                Verdict(f"id-{next(_NUMBERS)}", key, verdict, "ann", key, "p", 0, 0, "b")
                for key, verdict in verdicts.items()
            ]
        )


def update(year: SimulatedYear, *, rebuild: bool = False) -> tuple[str, ...]:
    with closing(Journal(year.url)) as journal:
        return update_spend(journal, year.storage, now=NOW, rebuild=rebuild).months


def files(year: SimulatedYear) -> dict[str, bytes]:
    return {
        f"{table}/{path.name}": path.read_bytes()
        for table in TABLES
        for path in (year.folder / "spend" / table).iterdir()
    }


def ledger(year: SimulatedYear) -> list[dict[str, object]]:
    paths = sorted((year.folder / "spend" / "ledger").iterdir())
    rows: list[dict[str, object]] = pa.concat_tables(map(pq.read_table, paths)).to_pylist()
    return rows


def asked(year: SimulatedYear, *by: str) -> list[SpendLine]:
    with closing(open_tables(year.storage)) as duck:
        return sums(duck, by)


@pytest.fixture
def year(tmp_path: Path) -> SimulatedYear:
    made = SimulatedYear(tmp_path, 300)
    made.write()
    update(made)
    return made


def delivered(year: SimulatedYear, month: str) -> list[str]:
    return [
        str(row["request_key"])
        for row in ledger(year)
        if row["outcome"] == "delivered" and str(row["day"]).startswith(month)
    ]


def test_without_a_verdict_accepted_is_delivered_and_not_replaced(year: SimulatedYear) -> None:
    (total,) = asked(year)
    assert total.accepted == total.delivered - total.replaced > 0
    assert total.replaced > 0
    assert total.per_accepted_units == total.charged_units / total.accepted
    assert {row["verdict"] for row in ledger(year)} == {None}


def test_a_verdict_on_an_old_image_makes_its_month_again_with_the_result_of_a_rebuild(
    year: SimulatedYear,
) -> None:
    before, march = files(year), delivered(year, "2026-03")
    (earlier,) = asked(year)
    judge(year, dict(zip(march, ("reject", "flag", "keep", "reject"), strict=False)))
    judge(year, {march[3]: "none"})
    written = update(year)
    assert "2026-03" in written
    assert len(written) < 4, "and what is within the margin of two days"
    steps = files(year)
    assert {name[-15:-8] for name in steps if steps[name] != before[name]} == {"2026-03"}
    (total,) = asked(year)
    # Rejected and flagged ones are out, kept and taken back ones are not; all was paid for.
    assert total.accepted == earlier.accepted - 2
    assert (total.charged_units, total.delivered) == (earlier.charged_units, earlier.delivered)
    (in_march,) = (line for line in asked(year, "month") if line.of == ("2026-03",))
    assert in_march.accepted == in_march.delivered - in_march.replaced - 2
    update(year, rebuild=True)
    assert files(year) == steps
    # Taken back, all is as it was.
    judge(year, dict.fromkeys(march[:3], "none"))
    update(year)
    assert files(year) == before


def test_the_daily_table_and_the_report_count_what_a_person_accepts(year: SimulatedYear) -> None:
    march = delivered(year, "2026-03")
    judge(year, dict.fromkeys(march, "reject"))
    update(year)
    daily = pq.read_table(year.folder / "spend" / "daily" / "2026-03.parquet").to_pylist()
    assert sum(row["accepted"] for row in daily) == 0
    assert {row["credits_per_accepted"] for row in daily} == {None}
    tables = stored_tables(year.storage)
    found = figures_of(tables, now=NOW)
    (total,) = asked(year)
    assert found.total.accepted == total.accepted
    assert found.total.per_accepted_units == total.per_accepted_units
    (of_march,) = (one.line for one in found.months if one.start.month == 3)
    assert of_march.accepted == 0
    assert sum(line.accepted for line in found.breakdowns[0].lines) == total.accepted


def test_a_prompts_refused_attempts_are_part_of_what_its_accepted_image_came_to(
    year: SimulatedYear,
) -> None:
    """One that was replaced: two were paid for, one is accepted."""
    replaced = next(row for row in ledger(year) if row["outcome"] == "replaced")
    judge(year, {str(replaced["request_key"]): "reject"})
    update(year)
    line = next(one for one in asked(year, "prompt_id") if one.of == (replaced["prompt_id"],))
    assert line.delivered == line.accepted + line.replaced
    assert line.per_accepted_units == line.charged_units / line.accepted > 4_500
    row = next(row for row in ledger(year) if row["request_key"] == replaced["request_key"])
    assert (row["outcome"], row["verdict"]) == ("replaced", "reject")


def test_a_verdict_on_an_image_whose_file_was_lost_since_counts_for_nothing(
    year: SimulatedYear,
) -> None:
    key = delivered(year, "2026-05")[0]
    judge(year, {key: "keep"})
    engine = create_engine(year.url)
    with engine.begin() as connection:
        connection.execute(
            text("update requests set state = 'completed' where request_key = :key"), {"key": key}
        )
    engine.dispose()
    update(year, rebuild=True)
    row = next(row for row in ledger(year) if row["request_key"] == key)
    assert (row["outcome"], row["verdict"]) == ("pending", None)

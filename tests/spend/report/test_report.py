"""The report: exact sums, safe with any text, and complete without a network."""

from __future__ import annotations

import io
import re
import stat
from collections.abc import Mapping, Sequence
from contextlib import closing
from datetime import date, datetime, timezone
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError, StorageError
from krea_dagster.models import UNITS_PER_CREDIT
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.report.sparkline import days_of, spend_sparkline
from krea_dagster.spend.tables.views import SpendTables
from tests.spend.simulated_tables import (
    END,
    LEDGER,
    money,
    simulated_year,
    tables_of,
)

NOW = datetime(2025, 3, 20, 12, tzinfo=timezone.utc)


class Page(HTMLParser):
    """A page's tables by the id of their caption, as texts; and all tags with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tables: dict[str, list[list[str]]] = {}
        self.exact: dict[str, list[list[Decimal | None]]] = {}
        self.key: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._id = ""
        self._in_cell = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        named = dict(attrs)
        self.tags.append((tag, named))
        if tag == "caption":
            self._id = (named["id"] or "").removesuffix("-caption")
            self.tables[self._id], self.exact[self._id] = [], []
        elif tag == "tr" and self._id:
            self.tables[self._id].append([])
            self.exact[self._id].append([])
        elif tag in ("td", "th") and self._id and "bar-cell" not in (named.get("class") or ""):
            self.tables[self._id][-1].append("")
            self.exact[self._id][-1].append(None)
            self._in_cell = True
        elif tag == "data":
            value = Decimal(named["value"] or "")
            if self._id:
                self.exact[self._id][-1][-1] = value
            else:
                self.key.append(named["value"] or "")

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False
        elif tag == "table":
            self._id = ""

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._in_cell:
            self.tables[self._id][-1][-1] += data

    def units(self, table: str, column: int) -> list[int]:
        """A column's sums in units, as printed; printed and machine-readable are the same."""
        found = []
        for cells, values in zip(self.tables[table], self.exact[table], strict=True):
            if column < len(cells) and values[column] is not None:
                assert Decimal(cells[column].replace(",", "")) == values[column]
                found.append(int(Decimal(values[column] or 0) * UNITS_PER_CREDIT))
        return found


def report(tables: SpendTables, now: datetime = NOW, **options: Any) -> Page:
    file = io.BytesIO()
    write_report(tables, file, now=now, **options)
    return Page(file.getvalue().decode())


# -- exact ------------------------------------------------------------------------------------

_CHARGED = ("delivered", "replaced", "lost", "rejected")
_OUTCOMES = (*_CHARGED, "failed", "refused", "unknown", "pending")
_PURCHASES = st.lists(
    st.tuples(
        st.integers(0, 120),  # day of the year
        st.sampled_from(_OUTCOMES),
        st.integers(1, 30_000_000),  # units
        st.sampled_from(["1K", "2K"]),
        st.sampled_from(["1:1", "16:9"]),
        st.integers(0, 30),  # partition
        st.integers(0, 25),  # prompt
        st.sampled_from(["autumn", "spring", None]),
        st.booleans(),  # whether what is pending is paid already
    ),
    min_size=1,
    max_size=60,
)


def tables_from(purchases: Sequence[tuple[Any, ...]]) -> SpendTables:
    rows: dict[str, list[Any]] = {name: [] for name in LEDGER.names if "credits" not in name}
    charged, unsettled, missing = [], [], []
    first = date(2025, 1, 1).toordinal()
    for number, purchase in enumerate(purchases):
        day, outcome, units, quality, size, partition, prompt, campaign, paid = purchase
        is_charged = outcome in _CHARGED or (outcome == "pending" and paid)
        is_open = outcome == "unknown" or (outcome == "pending" and not paid)
        charged.append(units if is_charged else 0)
        unsettled.append(units if is_open else 0)
        missing.append(is_open)
        when = date.fromordinal(first + day)
        values = {
            "sent_at": datetime(when.year, when.month, when.day, 9, tzinfo=timezone.utc),
            "day": when,
            "run_id": "run",
            "partition_key": f"part-{partition}",
            "prompt_table": None,
            "prompt_id": f"row-{prompt}" if prompt else None,
            "sample": 0,
            "attempt": 0,
            "request_key": f"{number:064x}",
            "task_id": f"{number}",
            "quality": quality,
            "size": size,
            "status": "stored",
            "outcome": outcome,
            "error_code": f"{outcome}_code"
            if outcome in ("failed", "refused", "lost", "rejected", "unknown")
            else None,
            "campaign": campaign,
        }
        for name, value in values.items():
            rows[name].append(value)
    some = np.array(missing)
    columns = {
        **{name: pa.array(values, LEDGER.field(name).type) for name, values in rows.items()},
        "credits_reserved": money(np.array(charged)),
        "credits_charged": money(np.array(charged), some),
        "credits_returned": money(np.zeros(len(charged), np.int64), some),
        "credits_unknown": money(np.array(unsettled)),
    }
    return tables_of(pa.table({name: columns[name] for name in LEDGER.names}, schema=LEDGER))


@settings(max_examples=15)
@given(_PURCHASES)
def test_every_sum_that_is_printed_is_the_ledger_s_to_the_last_unit(
    purchases: list[tuple[Any, ...]],
) -> None:
    tables = tables_from(purchases)
    page = report(tables, by=["campaign"])
    rows = tables.ledger.to_pylist()

    def units(name: str, which: Any = lambda _: True) -> int:
        return sum(int((row[name] or 0) * UNITS_PER_CREDIT) for row in rows if which(row))

    def at_stake(which: Any = lambda _: True) -> int:
        paid = units("credits_charged", lambda row: which(row) and row["outcome"] == "pending")
        return units("credits_unknown", which) + paid

    total, stake = units("credits_charged"), at_stake()
    in_month = lambda row: row["day"] >= date(2025, 3, 1)  # noqa: E731 - one of many such
    today = lambda row: row["day"] >= date(2025, 3, 20)  # noqa: E731 - one of many such
    key = [int(Decimal(value) * UNITS_PER_CREDIT) for value in page.key]
    assert key[:4] == [
        total,
        units("credits_charged", in_month),
        units("credits_charged", today),
        stake,
    ]
    for table in ("months", "days", "cost"):
        assert sum(page.units(table, 1)) == total
        assert sum(page.units(table, 5)) == stake
    assert sum(page.units("month-days", 1)) == units("credits_charged", in_month)
    for table in ("by-1", "by-2", "by-3"):
        *lines, footing = page.units(table, 1)
        assert sum(lines) == footing == total
        *lines, footing = page.units(table, 5)
        assert sum(lines) == footing == stake
    for cells, values in zip(page.tables["by-2"][1:-1], page.exact["by-2"][1:-1], strict=True):
        name = None if cells[0] == "(none)" else cells[0]
        assert values[1] is not None
        assert values[1] * UNITS_PER_CREDIT == units(
            "credits_charged", lambda row, name=name: row["campaign"] == name
        )
    if "failures" in page.tables:
        assert sum(page.units("failures", 2)) == units(
            "credits_charged", lambda row: row["error_code"] is not None
        ) + units("credits_unknown", lambda row: row["error_code"] is not None)
    if "outcomes" in page.tables:
        beside = lambda row: row["outcome"] != "delivered"  # noqa: E731 - one of many such
        assert sum(page.units("outcomes", 1)) == units("credits_charged", beside)
        assert sum(page.units("outcomes", 3)) == stake
    for cells, values in zip(
        page.tables.get("prompts", [])[1:], page.exact.get("prompts", [])[1:], strict=True
    ):
        assert values[1] is not None
        assert values[1] * UNITS_PER_CREDIT == units(
            "credits_charged", lambda row, name=cells[0]: row["prompt_id"] == name
        )


def test_sums_beyond_what_a_float_holds_are_exact() -> None:
    units = 9_007_199_254_740_993  # 2**53 + 1
    tables = tables_from([(3, "delivered", units, "1K", "1:1", 1, 1, None, False)] * 3)
    page = report(tables)
    assert page.key[0] == f"{Decimal(3 * units) / UNITS_PER_CREDIT:.4f}"
    assert f"{Decimal(3 * units) / UNITS_PER_CREDIT:,.4f}" in page.text


def test_columns_have_two_decimals_where_these_are_enough_and_four_where_not() -> None:
    line = (3, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)
    assert "0.45" in report(tables_from([line])).tables["days"][1]
    finer = (4, "delivered", 4_501, "1K", "1:1", 1, 1, None, False)
    cells = [row[1] for row in report(tables_from([line, finer])).tables["days"][1:]]
    assert cells == ["0.4500", "0.4501"]


def test_dollars_are_made_of_the_sum_of_credits() -> None:
    tables = tables_from([(3, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)] * 100)
    assert "45.00credits, 0.66 USD" in re.sub(r"\s*\n\s*", "", report(tables).text)


def test_accepted_are_delivered_and_not_replaced() -> None:
    kinds = ("delivered", "delivered", "replaced", "failed")
    tables = tables_from([(3, kind, 4_500, "1K", "1:1", 1, 1, None, False) for kind in kinds])
    (day,) = report(tables).tables["days"][1:]
    assert day == ["4 Jan 2025", "1.35", "2", "0.6750", "4", "0.00"]


# -- safe -------------------------------------------------------------------------------------

NASTY = '<script>alert(1)</script>"><img src=x onerror=alert(2)>&amp;{{ 7*7 }}'


def test_names_and_prompts_are_escaped() -> None:
    tables = simulated_year(purchases=300, planted=False)
    for name in ("prompt_id", "partition_key", "campaign", "error_code", "quality", "size"):
        place = tables.ledger.column_names.index(name)
        nasty = pa.repeat(pa.scalar(NASTY), tables.ledger.num_rows)
        tables = SpendTables(
            tables.ledger.set_column(place, name, nasty), tables.daily, tables.failures
        )
    tables = tables_of(tables.ledger)
    page = report(
        tables,
        END,
        by=["campaign"],
        prompts=lambda ids: dict.fromkeys(ids, NASTY),
        caps=[Budget.parse("partition=1"), Budget.parse("month=1")],
        title=NASTY,
    )
    tags = {tag for tag, _ in page.tags}
    assert not tags & {"script", "img", "iframe", "object", "link", "form"}
    for tag, attributes in page.tags:
        assert not [name for name in attributes if name.startswith("on")], tag
    assert page.text.count(NASTY) >= 8


def test_the_page_loads_nothing_and_says_so() -> None:
    page = report(simulated_year(purchases=500), END, by=["campaign"])
    assert ("meta", {
        "http-equiv": "Content-Security-Policy",
        "content": "default-src 'none'; style-src 'unsafe-inline'",
    }) in page.tags  # fmt: skip
    for tag, attributes in page.tags:
        assert "src" not in attributes, tag
        assert (attributes.get("href") or "#").startswith("#"), tag
    assert "http" not in re.sub("http-equiv", "", page.text)


def test_long_prompts_are_cut_and_lines_are_joined() -> None:
    tables = tables_from([(3, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)])
    text = report(tables, prompts=lambda ids: dict.fromkeys(ids, "dune\n\n" * 100)).text
    assert "dune dune dune" in text
    assert "…" in text


# -- complete ---------------------------------------------------------------------------------


def test_every_chart_has_a_name_and_its_table() -> None:
    page = report(simulated_year(purchases=2_000), END, by=["campaign"])
    charts = [named for tag, named in page.tags if tag == "svg"]
    assert len(charts) == 9, "three charts at three widths"
    assert all(named["role"] == "img" and named["aria-label"] for named in charts)
    assert {"days", "month-days", "cost", "months"} <= page.tables.keys()
    assert len(page.tables["days"]) > 300


def test_the_warnings_are_on_top_and_given_back(tmp_path: Path) -> None:
    tables = simulated_year(purchases=8_000)
    path = tmp_path / "deep" / "report.html"
    warnings = write_report(tables, path, now=END)
    page = path.read_text()
    assert len(warnings) == 5
    places = [page.index(one.text.partition(" (")[0]) for one in warnings]
    assert places == sorted(places)
    assert places[-1] < page.index('id="time"')


def test_a_report_on_nothing_says_so() -> None:
    empty = LEDGER.empty_table()
    page = report(tables_of(empty))
    assert "No warnings" in page.text
    assert "No purchases yet." in page.text


@pytest.mark.parametrize("day", [0, 20, 90, 400])
def test_one_purchase_at_any_time_makes_a_report(day: int) -> None:
    tables = tables_from([(day, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)])
    assert sum(report(tables).units("days", 1)) == 4_500


def test_the_columns_that_matter_most_come_first_and_nothing_is_no_bar() -> None:
    """A phone shows four columns without scrolling."""
    page = io.BytesIO()
    bought = (3, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)
    failed = (3, "failed", 4_500, "1K", "1:1", 2, 2, None, False)
    write_report(tables_from([bought, failed]), page, now=NOW)
    text = page.getvalue().decode()
    heads = Page(text).tables["by-2"][0]
    assert heads == [
        *("Partition", "Charged,credits", "Acceptedimages", "Credits peraccepted", "Purchases"),
        "At stake,credits",
    ]
    ((_, row),) = re.findall(r"(part-2)(.*?)</tr>", text, re.DOTALL)
    assert 'class="bar"' not in row


def chart_of(days: Mapping[int, int]) -> str:
    """The chart of days by their number, as it is drawn on a desk."""
    tables = tables_from(
        [(day, "delivered", units, "1K", "1:1", 1, 1, None, False) for day, units in days.items()]
    )
    page = io.BytesIO()
    write_report(tables, page, now=NOW)
    charts = re.findall(r"<svg[^>]*chart wide.*?</svg>", page.getvalue().decode(), re.DOTALL)
    return str(charts[0])


def words_of(chart: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", chart)


def test_a_runaway_day_is_cut_and_labelled_so_that_the_others_are_seen() -> None:
    usual = {day: 100_000 + 1_000 * day for day in range(60)}
    words = words_of(chart_of(usual | {30: 50_000_000}))
    assert "31 Jan: 5,000.00, bar cut" in words
    assert (
        max(float(word.replace(",", "")) for word in words if word[0].isdigit() and " " not in word)
        <= 40
    )
    whole = words_of(chart_of(usual | {30: 400_000}))
    assert not [word for word in whole if "bar cut" in word], "two and a half times is not cut"


def test_the_axis_of_a_few_days_ends_with_the_last_of_them() -> None:
    words = words_of(chart_of({40: 4_500}))
    assert [word for word in words if " " in word] == [
        "10 Feb", "9 Feb", "8 Feb", "7 Feb", "6 Feb", "5 Feb", "4 Feb"
    ]  # fmt: skip


@pytest.mark.parametrize(("cap", "dot"), [(0.44, "warning"), (0.25, "far")])
def test_a_budget_far_beyond_its_cap_looks_worse_than_one_just_beyond_it(
    cap: float, dot: str
) -> None:
    page = io.BytesIO()
    tables = tables_from([(78, "delivered", 4_500, "1K", "1:1", 1, 1, None, False)])
    write_report(tables, page, now=NOW, soft=[Budget.parse(f"day={cap}")])
    (looks,) = re.findall(r'<li id="[0-9a-f]+" class="(\w+)">', page.getvalue().decode())
    assert looks == dot


def test_many_partitions_are_summed_up_in_one_line() -> None:
    line = [(3, "delivered", 4_500, "1K", "1:1", part, 1, None, False) for part in range(30)]
    rows = report(tables_from(line)).tables["by-2"]
    assert rows[-2][:2] == ["18 others", "8.10"]


def test_the_file_is_written_whole_and_readable(tmp_path: Path) -> None:
    tables = simulated_year(purchases=300)
    path = tmp_path / "report.html"
    write_report(tables, path, now=END)
    assert [one.name for one in tmp_path.iterdir()] == ["report.html"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    assert path.stat().st_size < 400_000


def test_where_it_cannot_be_written_is_said(tmp_path: Path) -> None:
    tables = simulated_year(purchases=300)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="the report cannot be written to"):
        write_report(tables, tmp_path / "file" / "r.html", now=END)


def test_a_column_that_does_not_exist_is_refused() -> None:
    tables = simulated_year(purchases=300)
    with pytest.raises(ConfigError, match="cannot sum by 'client'"):
        report(tables, by=["client"])


# -- the sparkline ------------------------------------------------------------------------


def days(tables: SpendTables) -> Mapping[date, int]:
    with closing(tables.open()) as duck:
        return days_of(duck)


def test_the_sparkline_is_small_and_names_the_month() -> None:
    image = spend_sparkline(days(simulated_year(purchases=40_000)))
    assert len(image) < 20_000
    assert b"credits in December 2025" in image
    assert b"<script" not in image
    assert image.startswith(b"<svg")


def test_without_purchases_the_sparkline_says_so() -> None:
    assert b"No purchases yet" in spend_sparkline({})

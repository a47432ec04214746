"""The page of a statement, of the parts and the style of the report."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from datetime import date, datetime
from fractions import Fraction
from functools import partial
from typing import Any, Final

import pyarrow as pa

from krea_dagster.spend.prices import CreditPrice, CreditPrices
from krea_dagster.spend.report.report import amounts_text, money_tag, share_of, templates
from krea_dagster.spend.report.report_data import Breakdown, ReportLine
from krea_dagster.spend.statements.statement import (
    charges_by_quality,
    last_day,
    sums_of,
)
from krea_dagster.spend.statements.variance import variance
from krea_dagster.spend.tables.query import SpendLine
from krea_dagster.spend.tables.sql import units_of
from krea_dagster.spend.text import CENT_UNITS, amount

#: Adjustments and entries that the page shows; the file has all.
MOST_ROWS: Final = 200


def statement_page(
    rows: pa.Table,
    month: str,
    *,
    before: tuple[str, pa.Table] | None,
    sums: Mapping[str, Sequence[SpendLine]],
    total: SpendLine,
    prices: CreditPrices,
    file: str,
    sha256: str,
    now: datetime,
) -> bytes:
    """Return the page of a statement's rows.

    ``before`` are the last statement's month and rows, ``sums`` the month's by some columns, and
    ``total`` their sum. ``file`` has the rows.
    """
    figures = sums_of(rows)
    adjusted = figures.adjusted_charged_units - figures.adjusted_refunded_units
    shown = [_row(row) for row in rows.to_pylist() if row["adjusts"] or row["kind"] != "purchase"]
    adjustments = [row for row in shown if row["adjusts"]]
    entries = [row for row in shown if not row["adjusts"]]
    first = date.fromisoformat(f"{month}-01")
    page = templates().get_template("statement.html.j2")
    text = page.render(
        title=f"Statement of {first:%B %Y}",
        name=f"{first:%b %Y}",
        first=first,
        last=last_day(month),
        now=now,
        prices=prices,
        figures=figures,
        adjusted_units=adjusted,
        net_units=figures.charged_units - figures.refunded_units + adjusted,
        total_costs=_costs(rows),
        before_name=before and f"{date.fromisoformat(before[0] + '-01'):%b %Y}",
        variance=variance(charges_by_quality(before[1]), charges_by_quality(rows))
        if before
        else [],
        breakdowns=[
            Breakdown(name, name, [ReportLine.of_line(line) for line in lines if line.purchases])
            for name, lines in sums.items()
        ],
        total=total,
        adjustments=adjustments[:MOST_ROWS],
        more_adjustments=_more(len(adjustments)),
        entries=entries[:MOST_ROWS],
        more_entries=_more(len(entries)),
        file=file,
        sha256=sha256,
        money=partial(money_tag, places=_places(shown, [total, *itertools.chain(*sums.values())])),
        amounts=amounts_text,
        share=share_of,
    )
    return text.encode()


def _places(rows: Sequence[Mapping[str, Any]], lines: Sequence[SpendLine]) -> int:
    """Return how many decimals columns need, so that they are aligned."""
    units = [row[name] for row in rows for name in _CREDITS]
    units += [one for line in lines for one in (line.charged_units, line.at_stake_units)]
    return 4 if any(one % CENT_UNITS for one in units) else 2


def _more(count: int) -> str:
    return f" (the first {MOST_ROWS} of {count:,})" if count > MOST_ROWS else ""


def _row(row: Mapping[str, Any]) -> dict[str, Any]:
    credits = {name: units_of(row[f"credits_{name}"]) for name in _CREDITS}
    about = (row["month"] if row["adjusts"] else None, row["reference"], row["prompt_id"])
    return {
        **row,
        **credits,
        "credits": credits["refunded"] + credits["bought"] + credits["given"],
        "about": ", ".join(filter(None, (*about, row["note"]))),
        "paid": f"{amount(units_of(row['paid']))} {row['paid_currency']}" if row["paid"] else "–",
    }


_CREDITS: Final = ("charged", "refunded", "bought", "given")


def _costs(rows: pa.Table) -> dict[str, Fraction]:
    """Return the money of a statement by currency, exactly."""
    found: dict[str, Fraction] = {}
    names = ("credit_price", "credits_charged", "credits_refunded")
    for text, charged, refunded in zip(*(rows[one].to_pylist() for one in names), strict=True):
        price = CreditPrice.parse(text)
        cost = price.cost(units_of(charged) - units_of(refunded))
        found[price.currency] = found.get(price.currency, Fraction(0)) + cost
    return found

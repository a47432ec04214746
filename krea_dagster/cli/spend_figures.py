"""The figures of the command ``spend`` as JSON and CSV, and results of queries."""

from __future__ import annotations

import csv
import sys
from decimal import Decimal
from fractions import Fraction
from typing import TYPE_CHECKING, Any, Final

from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import UNITS_PER_CREDIT, credits_text
from krea_dagster.spend.text import rounded, unique_names

if TYPE_CHECKING:
    import pyarrow as pa

    from krea_dagster.application.spend import Spend
    from krea_dagster.spend.tables.query import SpendLine
    from krea_dagster.spend.warnings.history import Balance

_COUNTS: Final = (
    *("purchases", "delivered", "replaced", "accepted", "failed", "refused", "lost", "rejected"),
    *("unknown", "pending"),
)
#: The sums of credits, by their names in JSON and CSV.
_CREDITS: Final = {
    "credits_charged": "charged_units",
    "credits_refunded": "refunded_units",
    "credits_net": "net_units",
    "credits_returned": "returned_units",
    "credits_at_stake": "at_stake_units",
}


def quotient(units: float | None) -> str:
    """Return credits per image, rounded; empty where there is none."""
    return "" if units is None else f"{units / UNITS_PER_CREDIT:.4f}"


def spend_figures(shown: Spend) -> dict[str, Any]:
    """Return the sums, budgets and warnings for JSON. Credits and dollars are exact decimals."""
    period = shown.period
    return {
        "by": list(shown.by),
        "since": None if period.since is None else period.since.isoformat(),
        "until": None if period.until is None else period.until.isoformat(),
        "timezone": period.zone,
        "credit_prices": str(shown.prices).split(", "),
        "from_today": dict(shown.from_today),
        "lines": [_row(shown, line) for line in shown.lines],
        "statement": None
        if shown.closed is None
        else {
            "closed_at": shown.closed.closed_at.isoformat(),
            "sha256": shown.closed.sha256,
            "credits_charged": _exact(shown.closed.charged_units),
            "credits_refunded": _exact(shown.closed.refunded_units),
            "credits_charged_since": _exact(shown.since_closed[0]),
            "credits_refunded_since": _exact(shown.since_closed[1]),
        },
        "entries": {
            "credits_bought": _exact(shown.entries.bought_units),
            "credits_given": _exact(shown.entries.given_units),
            "credits_refunded": _exact(shown.entries.refunded_units),
            "credits_refunded_without_purchase": _exact(shown.entries.alone_units),
            "paid": {name: _exact(units) for name, units in shown.entries.paid_units.items()},
        },
        "budgets": [
            {
                "budget": one.name,
                "kind": one.kind,
                "credits_cap": _exact(one.cap_units),
                "credits_used": _exact(one.used_units),
                "credits_left": _exact(one.left_units),
                "credits_forecast": None
                if one.forecast_units is None
                else _exact(one.forecast_units),
            }
            for one in shown.budgets
        ],
        "balances": [_balance_figures(one) for one in shown.balances],
        "warnings": [
            {
                "warning": one.warning_id,
                "kind": one.kind.value,
                "level": one.level.value,
                "about": one.about,
                "since": one.since.isoformat(),
                "until": one.until.isoformat(),
                "text": one.text,
                "advice": one.advice,
                "credits": _exact(one.units),
                "acknowledged": None
                if one.acknowledgement is None
                else {
                    "reason": one.acknowledgement.reason,
                    "by": one.acknowledgement.by,
                    "at": one.acknowledgement.at.isoformat(),
                },
            }
            for one in shown.warnings
        ],
    }


def _balance_figures(balance: Balance) -> dict[str, Any]:
    found = balance.run_out
    days = {} if found is None else vars(found)
    return {
        "account": balance.account,
        "read_at": balance.read_at.isoformat(),
        "credits_read": _exact(balance.read_units),
        "credits_committed_since": _exact(balance.since_units),
        "credits_entered_since": _exact(balance.entered_units),
        "credits_left": _exact(balance.units),
        "runs_out": {name: day and day.isoformat() for name, day in days.items()} or None,
    }


def _row(shown: Spend, line: SpendLine) -> dict[str, Any]:
    """Return a line for JSON and CSV. A column with the name of a measure gets a number."""
    figures = {
        **{name: getattr(line, name) for name in _COUNTS},
        **{name: _exact(getattr(line, units)) for name, units in _CREDITS.items()},
        **{
            f"{name.lower()}_{kind}": rounded(
                line.costs(net=kind == "net").get(name, Fraction(0)), 6
            )
            for name in shown.currencies
            for kind in ("charged", "net")
        },
        "each": None if line.each_units is None else Decimal(quotient(line.each_units)),
        "per_accepted": None
        if line.per_accepted_units is None
        else Decimal(quotient(line.per_accepted_units)),
    }
    keys = unique_names([*figures, *shown.by])[len(figures) :]
    return {**dict(zip(keys, line.of, strict=True)), **figures}


def _exact(units: int) -> Decimal:
    return Decimal(credits_text(units))


def show_csv(shown: Spend) -> None:
    """Print the sums as CSV with a header and exact decimals, in the columns of the JSON."""
    writer = csv.writer(sys.stdout, lineterminator="\n")
    rows = [_row(shown, line) for line in shown.lines]
    from krea_dagster.spend.tables.query import SpendLine

    writer.writerow(rows[0] if rows else _row(shown, SpendLine((None,) * len(shown.by))))
    writer.writerows([_cell(value) for value in row.values()] for row in rows)


def show_answer(answer: pa.Table, form: str) -> None:
    """Print the result of a query as a table, ``json`` or ``csv``."""
    columns = [map(_cell, column.to_pylist()) for column in answer.columns]
    rows = list(zip(*columns, strict=True))
    if form == "json":
        show_json([dict(zip(answer.column_names, row, strict=True)) for row in rows])
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.column_names)
        writer.writerows(rows)
    else:
        table = Table(box=None, pad_edge=False)
        import pyarrow as pa

        for name, kind in zip(answer.column_names, answer.schema.types, strict=True):
            is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            justify: Any = "right" if is_number or pa.types.is_decimal(kind) else "left"
            table.add_column(escape(printable(name)), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(escape(printable("–" if cell is None else str(cell))) for cell in row))
        out.print(table)


def _cell(value: Any) -> Any:
    """Return a value for JSON and CSV; decimals and times as exact text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)

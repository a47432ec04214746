"""The command ``spend``."""

from __future__ import annotations

import csv
import sys
from collections.abc import Sequence
from datetime import datetime
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import credits_from_units, credits_text

if TYPE_CHECKING:
    import pyarrow as pa

    from krea_dagster.application.spend import Spend
    from krea_dagster.spend.tables.query import SpendLine
    from krea_dagster.spend.warnings.warnings import SpendWarning


_SPEND_COUNTS: Final = (
    "delivered",
    "replaced",
    "accepted",
    "failed",
    "refused",
    "lost",
    "rejected",
    "unknown",
    "pending",
)


@click.command("spend")
@project_options
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help=(
        "Sum by this column of the ledger or the manifest (day, month, quality, partition_key, "
        "status, or a column of your table); may be repeated."
    ),
)
@click.option("--since", type=click.DateTime(["%Y-%m-%d"]), help="From this UTC day on.")
@click.option("--month", metavar="YYYY-MM", help="Only this UTC month.")
@click.option(
    "--sql",
    metavar="QUERY",
    help="Answer a SELECT over the views ledger, daily, failures, manifest and prompts.",
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report: one page with charts, tables and warnings; it needs no network.",
)
def spend_command(
    by: Sequence[str],
    since: datetime | None,
    month: str | None,
    sql: str | None,
    *,
    as_json: bool,
    as_csv: bool,
    html: Path | None,
) -> None:
    """Say where the credits went: today, this month and in total, or by any column.

    First brings the tables in spend/ of the storage root up to date. Buys nothing, and needs no
    network.
    """
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if sql is not None and (by or since or month):
        raise click.UsageError("--sql cannot be combined with --by, --since or --month")
    if since is not None and month is not None:
        raise click.UsageError("--since and --month exclude each other")
    if html is not None and (as_json or as_csv or since or month or sql):
        raise click.UsageError("--html writes the whole report; it can be combined with --by only")
    krea = open_krea(reads_values=sql is not None)
    if html is not None:
        show_report(html, krea.spend_report(html, by=by))
        return
    if sql is not None:
        show_answer(krea.spend_sql(sql), "json" if as_json else "csv" if as_csv else "table")
        return
    spend = krea.spend(by, since=None if since is None else since.date(), month=month)
    if as_json:
        show_json(spend_figures(spend))
    elif as_csv:
        show_csv(spend)
    else:
        show_spend(spend)


def show_report(path: Path, warnings: Sequence[SpendWarning]) -> None:
    """Print a report's warnings, and its path."""
    for one in warnings:
        out.print(escape(f"{one.level.value}: {one.text}"))
    out.print(f"The report is in {escape(str(path))}")


def _spend_table(shown: Spend) -> Table:
    """Return the sums without empty columns: grouped by two columns they fit a terminal."""
    lines, rate = shown.lines, shown.rate
    figures: dict[str, list[str]] = {
        "asked": [str(line.purchases) for line in lines],
        "images": [str(line.delivered) for line in lines],
        "accepted": [str(line.accepted) for line in lines],
        "failed": [str(line.failed + line.refused) for line in lines],
        "lost": [str(line.lost + line.rejected) for line in lines],
        "open": [str(line.unknown + line.pending) for line in lines],
        "credits": [credits_text(line.charged_units) for line in lines],
        "USD": [f"{float(line.usd(rate)):.2f}" for line in lines],
        "at stake": [credits_text(line.at_stake_units) for line in lines],
        "each": [_per_image(line) for line in lines],
    }
    if all(line.accepted == line.delivered - line.replaced for line in lines):
        del figures["accepted"]  # no image was reviewed
    table = Table(box=None, pad_edge=False)
    columns: list[list[str]] = []
    for number, name in enumerate(shown.by):
        values = [line.of[number] for line in lines]
        columns.append([escape(printable("–" if value is None else value)) for value in values])
        table.add_column(escape(printable(name)), overflow="fold")
    for name, texts in figures.items():
        if name in ("failed", "lost", "open", "at stake") and set(texts) == {"0"}:
            continue
        columns.append(texts)
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def show_spend(shown: Spend) -> None:
    """Print what was spent: today, this month and in total, or by columns."""
    if not shown.lines:
        out.print("Nothing was bought in that time.")
    else:
        out.print(_spend_table(shown))
    out.print(f"USD at {float(shown.rate):g} credits per USD; days are UTC")
    out.print(f"tables     {escape(shown.where)}/spend")


def _per_image(line: SpendLine) -> str:
    """Return the credits per image, all charges included."""
    if not line.delivered:
        return "–"
    return f"{credits_from_units(line.charged_units) / line.delivered:.4f}"


def spend_figures(shown: Spend) -> dict[str, Any]:
    """Return the sums for JSON."""
    return {
        "by": list(shown.by),
        "since": None if shown.since is None else shown.since.isoformat(),
        "until": None if shown.until is None else shown.until.isoformat(),
        "credits_per_usd": float(shown.rate),
        "lines": [_spend_row(shown, line) for line in shown.lines],
    }


def _spend_row(shown: Spend, line: SpendLine) -> dict[str, Any]:
    return {
        **dict(zip(shown.by, line.of, strict=True)),
        "purchases": line.purchases,
        **{name: getattr(line, name) for name in _SPEND_COUNTS},
        "credits_charged": credits_from_units(line.charged_units),
        "credits_returned": credits_from_units(line.returned_units),
        "credits_at_stake": credits_from_units(line.at_stake_units),
        "usd_charged": round(float(line.usd(shown.rate)), 6),
    }


def show_csv(shown: Spend) -> None:
    """Print the sums as CSV with a header and exact decimals."""
    money = {"credits_charged", "credits_returned", "credits_at_stake"}
    rows = [_spend_row(shown, line) for line in shown.lines]
    names = [*shown.by, "purchases", *_SPEND_COUNTS, *sorted(money), "usd_charged"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row, line in zip(rows, shown.lines, strict=True):
        exact = {name: credits_text(getattr(line, f"{name[8:]}_units")) for name in money}
        writer.writerow([{**row, **exact}[name] for name in names])


def show_answer(answer: pa.Table, form: str) -> None:
    """Print the result of a query as a table, ``json`` or ``csv``."""
    rows = [[_cell(value) for value in row.values()] for row in answer.to_pylist()]
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

"""The command ``close``."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.exit_codes import DONE, NOT_DELIVERED
from krea_dagster.cli.options import json_option, open_krea, prices_option, project_options
from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import credits_text

if TYPE_CHECKING:
    from krea_dagster.application.close import Closing
    from krea_dagster.engine.journal.closed_month_log import ClosedMonth


@click.command("close")
@project_options
@prices_option
@click.argument("months", nargs=-1, metavar="[YYYY-MM...]")
@click.option("--list", "lists", is_flag=True, help="List the closed months.")
@click.option(
    "--check", is_flag=True, help="Compare the statements with their hashes; 1 if one differs."
)
@click.option(
    "--to",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="FOLDER",
    help="Also copy the statements to this folder.",
)
@json_option
def close_command(
    *, months: Sequence[str], lists: bool, check: bool, to: Path | None, as_json: bool
) -> None:
    """Close UTC months: write their statements (Parquet and HTML), which nothing changes.

    The files are in statements/ of the storage root, and their hashes in the journal. What becomes
    known later (an unknown purchase that settles, a refund) is an adjustment in the next statement.
    Months are closed in their order. Closing a month again shows its statement.
    """
    if sum([bool(months), lists, check]) != 1:
        raise click.UsageError("name the months to close, or give --list or --check")
    krea = open_krea(reads_values=False)
    if check:
        sys.exit(_show_changed(krea.changed_statements(), as_json))
    if lists:
        show_closed(krea.closed_months(), as_json)
        return
    closed = [krea.close(month, folder=to) for month in sorted(set(months))]
    if as_json:
        show_json([{**_figures(one.month), "is_new": one.is_new} for one in closed])
    else:
        _show_closings(closed)


def _show_changed(changed: Sequence[str], as_json: bool) -> int:
    if as_json:
        show_json({"changed": list(changed)})
    else:
        for text in changed:
            out.print(escape(printable(f"error: {text}")))
        if not changed:
            out.print("Every statement is as it was when its month was closed.")
    return NOT_DELIVERED if changed else DONE


def _show_closings(closed: Sequence[Closing]) -> None:
    for one in closed:
        if not one.is_new:
            at = one.month.closed_at
            out.print(f"{one.month.month} was closed on {at:%Y-%m-%d}; its statement stays.")
    show_closed([one.month for one in closed], as_json=False)
    for one in closed:
        out.print(f"statement  {escape(printable(one.where))}")
        if one.month.at_stake_units:
            out.print(
                f"{credits_text(one.month.at_stake_units)} credits of {one.month.month} were at "
                "stake: what they cost is an adjustment in a later statement"
            )


def show_closed(closed: Sequence[ClosedMonth], as_json: bool) -> None:
    """Print closed months with their sums in credits."""
    rows = list(map(_figures, closed))
    if as_json:
        show_json(rows)
        return
    if not rows:
        out.print("No month is closed.")
        return
    names = ("month", "purchases", "charged", "refunded", "adjusted", "total", "at stake")
    table = Table(names[0], box=None, pad_edge=False)
    for name in names[1:]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("sha256")
    for one in closed:
        adjusted = one.adjusted_charged_units - one.adjusted_refunded_units
        units = (one.charged_units, one.refunded_units, adjusted, one.net_units, one.at_stake_units)
        cells = (one.month, str(one.purchases), *map(credits_text, units), f"{one.sha256[:12]}…")
        table.add_row(*cells)
    out.print(table)


def _figures(one: ClosedMonth) -> dict[str, Any]:
    def exact(units: int) -> Decimal:
        return Decimal(credits_text(units))

    return {
        "month": one.month,
        "closed_at": one.closed_at.isoformat(),
        "file": f"{one.name}.parquet",
        "page": f"{one.name}.html",
        "sha256": one.sha256,
        "page_sha256": one.page_sha256,
        "purchases": one.purchases,
        "credits_charged": exact(one.charged_units),
        "credits_refunded": exact(one.refunded_units),
        "credits_adjusted": exact(one.adjusted_charged_units - one.adjusted_refunded_units),
        "credits_total": exact(one.net_units),
        "credits_at_stake": exact(one.at_stake_units),
    }

"""The commands ``account add``, ``account import`` and ``account list``."""

from __future__ import annotations

import csv
import sys
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.options import json_option, open_krea, project_options
from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import credits_text

if TYPE_CHECKING:
    from krea_dagster.engine.journal.entry_log import AccountEntry, EnteredRows


@click.group("account")
def account_group() -> None:
    """Enter what the API does not say: refunds, credits bought or given, corrections.

    Entries are kept in the journal, and nothing changes or removes them: a wrong one is reversed.
    They count in `spend`; caps and budgets count what was committed. Nothing is bought.
    """


@account_group.command("add")
@project_options
@click.argument("kind", type=click.Choice(["top-up", "promotion", "refund", "correction"]))
@click.option("--credits", metavar="CREDITS", help="Credits; negative only in a correction.")
@click.option("--paid", metavar="AMOUNT", help="What a top-up cost.")
@click.option("--currency", metavar="CODE", help="Currency of --paid, such as EUR.")
@click.option("--on", metavar="YYYY-MM-DD", help="Its day.  [default: today, UTC]")
@click.option("--reference", metavar="TEXT", help="A document, such as the invoice's number.")
@click.option("--task", metavar="ID", help="Task whose charge is refunded or corrected.")
@click.option("--purchase", metavar="KEY", help="The same, by the Idempotency-Key.")
@click.option("--reverses", metavar="ENTRY", help="Entry that a correction reverses.")
@click.option("--note", metavar="TEXT", help="Why; a correction that reverses nothing needs one.")
@click.option(
    "--id",
    metavar="TEXT",
    help="Identity of the entry, if another one says the same.  [default: a hash of it]",
)
@json_option
def add_command(*, kind: str, as_json: bool, **options: str | None) -> None:
    """Enter a top-up (credits bought), promotion (credits given), refund or correction.

    A refund that names its purchase belongs to the partition and the columns of that purchase, on
    its own day. The same entry given twice is entered once.
    """
    row = {name: text for name, text in options.items() if text is not None}
    _show_entered(open_krea(reads_values=False).add_account_entry(kind=kind, **row), as_json)


@account_group.command("import")
@project_options
@click.argument("file", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@json_option
def import_command(*, file: Path, as_json: bool) -> None:
    """Enter the rows of a CSV file: all, or none if one is wrong.

    Columns: on, kind, credits, and optionally paid, currency, reference, task, purchase, reverses,
    note, id. `account list --csv` writes such a file. Importing a file twice adds nothing.
    """
    _show_entered(open_krea(reads_values=False).import_account_entries(file), as_json)


@account_group.command("list")
@project_options
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
def list_command(*, as_json: bool, as_csv: bool) -> None:
    """List the entries by day."""
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    entries = open_krea(reads_values=False).account_entries()
    rows = list(map(entry_row, entries))
    if as_json:
        show_json(rows)
        return
    if as_csv:
        from krea_dagster.application.account import ENTRY_COLUMNS

        names = [*(name for name in ENTRY_COLUMNS if name != "task"), "entered_at"]
        writer = csv.DictWriter(sys.stdout, names, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return
    table = Table(box=None, pad_edge=False)
    for name in ("id", "on", "kind", "credits", "paid", "about", "note"):
        is_amount = name in ("credits", "paid")
        table.add_column(
            name,
            justify="right" if is_amount else "left",
            overflow="fold",
            no_wrap=name not in ("about", "note"),
        )
    for entry in entries:
        paid = "" if entry.paid_units is None else credits_text(entry.paid_units)
        about = [entry.reference, entry.idempotency_key]
        about.append(f"reverses {entry.reverses}" if entry.reverses else None)
        cells = (
            *(entry.entry_id, entry.day.isoformat(), entry.kind, credits_text(entry.units)),
            *(f"{paid} {entry.currency or ''}", ", ".join(filter(None, about)), entry.note or ""),
        )
        table.add_row(*(escape(printable(cell)) for cell in cells))
    out.print(table if entries else "Nothing was entered.")


def _show_entered(done: EnteredRows, as_json: bool) -> None:
    if as_json:
        show_json(
            {
                "added": [entry_row(one) for one in done.added],
                "known": [one.entry_id for one in done.known],
            }
        )
        return
    for one in done.added:
        credits = f"{one.kind} of {credits_text(one.units)} credits on {one.day}"
        out.print(escape(printable(f"entered {one.entry_id}: {credits}")))
    if done.known:
        count = "1 entry was" if len(done.known) == 1 else f"{len(done.known)} entries were"
        out.print(f"{count} known, and not entered again")


def entry_row(entry: AccountEntry) -> dict[str, Any]:
    """Return an entry for JSON and CSV, in the columns that can be imported."""
    paid = entry.paid_units
    return {
        "id": entry.entry_id,
        "on": entry.day.isoformat(),
        "kind": entry.kind,
        "credits": Decimal(credits_text(entry.units)),
        "paid": None if paid is None else Decimal(credits_text(paid)),
        "currency": entry.currency,
        "reference": entry.reference,
        "purchase": entry.idempotency_key,
        "reverses": entry.reverses,
        "note": entry.note,
        "entered_at": entry.entered_at and entry.entered_at.isoformat(),
    }

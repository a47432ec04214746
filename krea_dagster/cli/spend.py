"""The command ``spend``."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timezone
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.options import (
    json_option,
    login_name,
    open_krea,
    prices_option,
    project_options,
)
from krea_dagster.cli.spend_figures import quotient, show_answer, show_csv, spend_figures
from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import credits_text
from krea_dagster.spend.text import rough, rounded

if TYPE_CHECKING:
    from krea_dagster.application.spend import Spend
    from krea_dagster.engine.journal.closed_month_log import ClosedMonth
    from krea_dagster.spend.tables.query import EntrySums
    from krea_dagster.spend.warnings.spend_warning import SpendWarning

#: Columns that a narrow terminal leaves out, in this order.
_LESS: Final = ("each", "lost", "failed", "USD", "asked", "at stake", "open")

#: Warnings that a terminal shows.
_MOST_WARNINGS: Final = 20

_DAY: Final = click.DateTime(["%Y-%m-%d"])


@click.group("spend", invoke_without_command=True)
@project_options
@prices_option
@click.option(
    "--by",
    multiple=True,
    metavar="COLUMN",
    help=(
        "Sum by this column of the ledger or of your table (day, week, month, quality, "
        "partition_key, run_id, campaign); may be repeated. A column of your table that has a name "
        "of the ledger is prompt_NAME."
    ),
)
@click.option("--since", type=_DAY, help="From this day on.")
@click.option("--until", type=_DAY, help="Up to this day.")
@click.option("--month", metavar="YYYY-MM", help="Only this month.")
@click.option(
    "--timezone",
    "zone",
    metavar="ZONE",
    envvar="KREA_TIMEZONE",
    show_envvar=True,
    help="Time zone of days, weeks and months, such as Europe/Berlin; UTC by default.",
)
@click.option(
    "--sql",
    metavar="QUERY",
    help=(
        "Answer a SELECT over the views ledger, entries, charges, balance, daily, failures, "
        "manifest, prompts, spend_by_day."
    ),
)
@json_option
@click.option("--csv", "as_csv", is_flag=True, help="Print CSV on stdout.")
@click.option(
    "--html",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the report: one page with charts, tables and warnings; it needs no network.",
)
@click.option(
    "--focus",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the charges in the columns of FOCUS 1.2, to a file .csv or .parquet.",
)
def spend_command(
    *,
    by: Sequence[str],
    since: datetime | None,
    until: datetime | None,
    month: str | None,
    zone: str | None,
    sql: str | None,
    as_json: bool,
    as_csv: bool,
    html: Path | None,
    focus: Path | None,
) -> None:
    """Say where the credits went: today, this month and in total, or by any column.

    First brings the tables in spend/ of the storage root up to date. Buys nothing, and needs no
    network. Ends with 0 also if a budget is exceeded: it reports, and the caps stop purchases.
    """
    if _is_subcommand():
        return
    if as_json and as_csv:
        raise click.UsageError("--json and --csv exclude each other")
    if sql is not None and (by or since or until or month):
        raise click.UsageError("--sql cannot be combined with --by, --since, --until or --month")
    if month is not None and (since or until):
        raise click.UsageError("--month excludes --since and --until")
    _check_files(html, focus, others=bool(as_json or as_csv or sql), by=bool(by))
    krea = open_krea(reads_values=sql is not None)
    if sql is not None:
        answer = krea.spend_sql(sql, zone=zone)
        show_answer(answer, "json" if as_json else "csv" if as_csv else "table")
        return
    period: dict[str, Any] = {
        "since": None if since is None else since.date(),
        "until": None if until is None else until.date(),
        "month": month,
        "zone": zone,
    }
    if html is not None:
        show_report(html, krea.spend_report(html, by=by, **period))
        return
    if focus is not None:
        rows = krea.spend_focus(focus, **period)
        out.print(f"{rows} {'row' if rows == 1 else 'rows'} in {escape(str(focus))}")
        return
    spend = krea.spend(by, **period)
    if as_json:
        show_json(spend_figures(spend))
    elif as_csv:
        show_csv(spend)
    else:
        show_spend(spend)


def _check_files(html: Path | None, focus: Path | None, *, others: bool, by: bool) -> None:
    if html is not None and (others or focus):
        raise click.UsageError("--html writes the report; it excludes --json, --csv and --sql")
    if focus is not None and (others or by):
        raise click.UsageError("--focus writes a file; it excludes --by, --json, --csv and --sql")


def _is_subcommand() -> bool:
    """Return whether a subcommand follows, which has the project's options itself."""
    context = click.get_current_context()
    if context.invoked_subcommand is None:
        return False
    if ParameterSource.COMMANDLINE in map(context.get_parameter_source, context.params):
        raise click.UsageError(f"give the options after {context.invoked_subcommand}")
    return True


@spend_command.command("acknowledge")
@project_options
@click.argument("warning_id", metavar="WARNING")
@click.option("--reason", metavar="TEXT", help="Why it is expected, such as a planned campaign.")
@click.option("--withdraw", is_flag=True, help="Take the acknowledgement back.")
@click.option("--by", metavar="NAME", help="Who says so.  [default: the login name]")
def acknowledge_command(
    warning_id: str, *, reason: str | None, withdraw: bool, by: str | None
) -> None:
    """Acknowledge a warning, by the id that ``spend`` shows.

    It is still listed, with the reason, but is not posted and fails no check, also if it grows.
    """
    if withdraw == (reason is not None):
        raise click.UsageError("give either --reason or --withdraw")
    done = open_krea().acknowledge_warning(warning_id, reason, by=by or login_name())
    if done is not None:
        out.print(escape(printable(done.text)))
    out.print("The acknowledgement is withdrawn." if withdraw else "The warning is acknowledged.")
    if done is None:
        out.print("It is not among the present warnings of these settings.")


def show_report(path: Path, warnings: Sequence[SpendWarning]) -> None:
    """Print a report's warnings, and its path."""
    show_warnings(warnings)
    out.print(f"The report is in {escape(str(path))}")


def show_warnings(warnings: Sequence[SpendWarning]) -> None:
    """Print warnings, each with its id, and why acknowledged ones are expected."""
    for one in warnings:
        line = f"{one.level.value} {one.warning_id}: {one.text}"
        if (known := one.acknowledgement) is not None:
            line = f"acknowledged {one.warning_id}: {one.text} ({known.by}: {known.reason})"
        out.print(escape(printable(line)))


def _spend_table(shown: Spend) -> tuple[Table, list[str]]:
    """Return the sums without empty columns, and the columns for which there is no room."""
    lines = shown.lines
    figures: dict[str, list[str]] = {
        "asked": [str(line.purchases) for line in lines],
        "images": [str(line.delivered) for line in lines],
        "accepted": [str(line.accepted) for line in lines],
        "failed": [str(line.failed + line.refused) for line in lines],
        "lost": [str(line.lost + line.rejected) for line in lines],
        "open": [str(line.unknown + line.pending) for line in lines],
        "credits": [credits_text(line.charged_units) for line in lines],
        "refunded": [credits_text(line.refunded_units) for line in lines],
        "net": [credits_text(line.net_units) for line in lines],
        **{
            name: [f"{rounded(line.costs().get(name, Fraction(0)), 2)}" for line in lines]
            for name in shown.currencies
        },
        "at stake": [credits_text(line.at_stake_units) for line in lines],
        "each": [quotient(line.each_units) or "–" for line in lines],
        "per accepted": [quotient(line.per_accepted_units) or "–" for line in lines],
    }
    for name in ("failed", "lost", "open", "at stake", "refunded"):
        if set(figures[name]) == {"0"}:
            del figures[name]
    if "refunded" not in figures:
        del figures["net"]
    keys = [
        [printable("–" if line.of[at] is None else str(line.of[at])) for line in lines]
        for at in range(len(shown.by))
    ]
    # A long value is folded, a short one is not.
    widths = [min(_width(*one), 16) for one in zip(shown.by, keys, strict=True)]
    room = out.width - sum(widths) - 2 * len(widths)
    less: list[str] = [name for name in _LESS if name in figures]
    less[:0] = [name for name in shown.currencies if len(shown.currencies) > 1]
    left_out: list[str] = []
    while less and sum(_width(*one) + 2 for one in figures.items()) - 2 > room:
        left_out.append(less.pop(0))
        del figures[left_out[-1]]
    table = Table(box=None, pad_edge=False)
    for name, width in zip(shown.by, widths, strict=True):
        table.add_column(escape(printable(name)), overflow="fold", min_width=width)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*keys, *figures.values(), strict=True):
        table.add_row(*map(escape, row))
    return table, left_out


def _width(name: str, texts: Sequence[str]) -> int:
    return max(map(len, (name, *texts)))


def show_spend(shown: Spend) -> None:
    """Print what was spent: today, this month and in total, or by columns; budgets; warnings."""
    if not shown.lines:
        out.print("Nothing was bought in that time.")
    else:
        table, left_out = _spend_table(shown)
        out.print(table)
        if left_out:
            out.print(f"no room for {', '.join(left_out)}: see --json")
    for name, count in shown.from_today.items():
        if count:
            out.print(
                f"{count} purchases were not written with {escape(printable(name))}: today's table "
                "says it (KREA_SPEND_BY keeps it from now on)"
            )
    if said := _entries_words(shown.entries):
        out.print(said)
    if shown.closed is not None:
        out.print(_closed_words(shown.closed, *shown.since_closed))
    if shown.budgets:
        out.print(_budget_table(shown))
    _show_balances(shown)
    show_warnings(shown.warnings[:_MOST_WARNINGS])
    if (more := len(shown.warnings) - _MOST_WARNINGS) > 0:
        out.print(f"and {more} more warnings: see --json")
    out.print(f"{shown.prices.words}; days are {shown.period.zone}")
    out.print(f"tables     {escape(shown.where)}/spend")


def _entries_words(entries: EntrySums) -> str:
    """Return what was entered of the account in the period; empty where nothing was."""
    paid = ", ".join(f"{credits_text(units)} {name}" for name, units in entries.paid_units.items())
    said = {
        f"bought{f' for {paid}' if paid else ''}": entries.bought_units,
        "given": entries.given_units,
        "refunded": entries.refunded_units,
        "of these name no purchase, and count for a day only": entries.alone_units,
    }
    words = [f"{credits_text(units)} {word}" for word, units in said.items() if units]
    return f"entries    {', '.join(words)} (credits)" if words else ""


def _closed_words(closed: ClosedMonth, charged_units: int, refunded_units: int) -> str:
    """Return what a closed month's statement says, and what is different since."""
    since = f"since then {credits_text(charged_units)} charged and {credits_text(refunded_units)} "
    return (
        f"statement  closed on {closed.closed_at:%Y-%m-%d}: {credits_text(closed.charged_units)} "
        f"charged, {credits_text(closed.refunded_units)} refunded; "
        + (
            f"{since}refunded, as adjustments"
            if charged_units or refunded_units
            else "no adjustments since"
        )
    )


def _show_balances(shown: Spend) -> None:
    from krea_dagster.spend.warnings.run_out import run_out_words

    if shown.lines and not shown.balances:
        out.print("balance    not known: no run has read the account")
    today = datetime.now(timezone.utc).date()
    for one in shown.balances:
        name = f"account {one.account}: " if len(shown.balances) > 1 else ""
        left = f"{credits_text(one.units)} credits left {run_out_words(one.run_out, today)}"
        out.print(f"balance    {name}{left}; read on {one.read_at:%Y-%m-%d %H:%M} UTC")


def _budget_table(shown: Spend) -> Table:
    table = Table("budget", "kind", box=None, pad_edge=False)
    for name in ("cap", "used", "left", "forecast"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in shown.budgets:
        units = (one.cap_units, one.used_units, one.left_units)
        forecast = "–" if one.forecast_units is None else rough(one.forecast_units)
        name = escape(printable(one.name))
        table.add_row(name, one.kind, *map(credits_text, units), forecast)
    return table

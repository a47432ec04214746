"""The command ``quote``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Final

import click
from rich.markup import escape
from rich.table import Table

from krea_dagster.application.run_text import trial_line
from krea_dagster.cli.options import (
    buying_options,
    json_option,
    open_krea,
    partition_option,
    prices_option,
    trial_options,
)
from krea_dagster.cli.terminal import out, printable, show_json
from krea_dagster.models import credits_from_units, credits_text

if TYPE_CHECKING:
    from krea_dagster.application.quotes import Quoted
    from krea_dagster.prompts.trial import TrialRows
    from krea_dagster.spend.quote import Quote, QuoteLine


#: Partitions up to which a quote lists them.
_QUOTE_PARTITIONS: Final = 16
#: The counts of a quote's line, and their headings; those that are 0 throughout are left out.
_QUOTE_COUNTS: Final = {
    "asked": "asked",
    "reused": "reused",
    "refetched": "fetched again",
    "taken_up": "taken up",
    "replayed": "replayed",
    "held": "held",
    "ended": "ended",
    "to_buy": "to buy",
}
_ALWAYS: Final = frozenset({"asked", "reused", "to_buy"})


@click.command("quote")
@buying_options
@partition_option
@trial_options
@click.option("--by-partition", is_flag=True, help="List every partition, even if there are many.")
@prices_option
@json_option
def quote_command(
    partitions: Sequence[str],
    *,
    limit: int | None,
    sample: int | None,
    by_partition: bool,
    as_json: bool,
) -> None:
    """Say what materialize would buy now, and at most for how much. Buys nothing.

    Reads the prompt table, the journal and the files; needs no network. The price of a quality is
    the highest that this account has paid, and before the first purchase the published one.
    """
    krea = open_krea(reads_values=False)
    from krea_dagster.application.buy_options import BuyOptions

    options = BuyOptions(limit=limit, sample=sample)
    quoted = krea.quote(partitions=partitions, options=options)
    if as_json:
        show_json(quote_figures(quoted))
    else:
        show_quote(quoted, by_partition=by_partition)


def show_quote(quoted: Quoted, *, by_partition: bool) -> None:
    """Print a quote by partition and quality; of many partitions, by quality alone."""
    quote, total = quoted.quote, quoted.total
    many = len(quoted.partitions) > _QUOTE_PARTITIONS and not by_partition
    out.print(_quote_table(quote, quote.by_quality() if many else quote.lines, names=not many))
    if many:
        out.print(f"{len(quoted.partitions)} partitions; --by-partition lists them.")
    for quality, price in quote.prices.items():
        source = "published; this account has not paid for one yet"
        if not price.published:
            source = "the highest that the journal has seen"
        out.print(f"price of {quality}: {credits_text(price.units)} credits ({source})")
    credit = quote.credit_price
    out.print(f"1 {credit.currency} is {credit.credits.normalize():f} credits")
    if quoted.trial is not None:
        out.print(trial_line(quoted.trial))
    for note in quoted.notes:
        out.print(escape(printable(f"note: {note}")))
    if total.at_stake:
        since = f", the oldest since {_since(total)}" if total.at_stake_since else ""
        out.print(
            f"unknown: {total.at_stake} purchases may have been charged before; at most "
            f"{credits_text(total.at_stake_units)} credits{since}"
        )
    if quote.cap is not None:
        out.print(
            f"deferred: {total.deferred} purchases of "
            f"{credits_text(total.deferred_units)} credits: {escape(quote.cap)}"
        )
    for key in quoted.waiting:
        out.print(f"partition {escape(printable(key))} skipped: its date is in the future")
    if not total.to_buy:
        out.print("Nothing would be bought.")


def _quote_table(quote: Quote, lines: Sequence[QuoteLine], *, names: bool) -> Table:
    total = quote.total
    counts = [name for name in _QUOTE_COUNTS if name in _ALWAYS or getattr(total, name)]
    table = Table(box=None, pad_edge=False, show_footer=len(lines) > 1)
    if names:
        table.add_column("partition", "total", overflow="fold")
    table.add_column("quality", "" if names else "total")
    for name in counts:
        table.add_column(_QUOTE_COUNTS[name], str(getattr(total, name)), justify="right")
    table.add_column("credits", credits_text(total.units), justify="right")
    decimals = 2 if quote.cost(total.units) >= 1 else 4
    table.add_column(
        quote.credit_price.currency, f"{quote.cost(total.units):.{decimals}f}", justify="right"
    )
    for line in lines:
        table.add_row(
            *([escape(printable(line.partition_key))] if names else []),
            line.quality,
            *(str(getattr(line, name)) for name in counts),
            credits_text(line.units),
            f"{quote.cost(line.units):.{decimals}f}",
        )
    return table


def quote_figures(quoted: Quoted) -> dict[str, Any]:
    """Return a quote for JSON."""
    quote = quoted.quote
    return {
        "partitions": [_line_figures(quote, line) for line in quote.lines],
        "total": _line_figures(quote, quote.total),
        "prices": {
            quality: {"credits": credits_from_units(price.units), "published": price.published}
            for quality, price in quote.prices.items()
        },
        "credit_price": str(quote.credit_price),
        "cap": quote.cap,
        "waiting": list(quoted.waiting),
        "trial": trial_figures(quoted.trial),
        "notes": list(quoted.notes),
        "pruned": quoted.pruned,
    }


def trial_figures(trial: TrialRows | None) -> dict[str, int] | None:
    """Return the size of a trial for JSON."""
    return None if trial is None else {"rows": trial.rows, "of": trial.of}


def _line_figures(quote: Quote, line: QuoteLine) -> dict[str, Any]:
    names = {"partition": line.partition_key, "quality": line.quality} if line.quality else {}
    return {
        **names,
        "asked": line.asked,
        **{name: getattr(line, name) for name in _QUOTE_COUNTS if name != "asked"},
        "purchases": line.purchases,
        "credits": credits_from_units(line.units),
        quote.credit_price.currency.lower(): round(quote.cost(line.units), 4),
        "deferred": line.deferred,
        "credits_deferred": credits_from_units(line.deferred_units),
        "at_stake": line.at_stake,
        "credits_at_stake": credits_from_units(line.at_stake_units),
        "at_stake_since": _since(line),
    }


def _since(line: QuoteLine) -> str | None:
    at = line.at_stake_since
    return None if at is None else at.isoformat(timespec="seconds")

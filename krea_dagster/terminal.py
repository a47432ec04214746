"""What the command shows: progress, tables, warnings. Results on stdout, the rest on stderr."""

from __future__ import annotations

import csv
import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from rich.console import Console
from rich.markup import escape
from rich.panel import Panel
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.table import Table

from krea_dagster import redact
from krea_dagster.application.quotes import Quoted
from krea_dagster.application.spend import Spend
from krea_dagster.engine.record import Record
from krea_dagster.engine.run.report import Progress
from krea_dagster.models import credits_from_units, credits_text
from krea_dagster.plugin.materialize import Materialized, Salvaged
from krea_dagster.spend.proof.findings import Proof, ProofFigures
from krea_dagster.spend.quote import Quote, QuoteLine
from krea_dagster.spend.tables.query import SpendLine
from krea_dagster.spend.warnings.warnings import SpendWarning

#: Seconds between two lines of progress where there is no terminal.
_LINE_EVERY_S: Final = 5.0
#: Kinds of failure that are listed with their rows.
_REASONS: Final = 20

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

out: Final = Console(highlight=False, soft_wrap=True)
err: Final = Console(stderr=True, highlight=False)


def say_synthetic() -> None:
    """Say, so that nobody can miss it, that the pictures are not Krea's."""
    err.print(
        Panel(
            "The pictures are [bold]synthetic[/]: an emulator on this machine draws them, and "
            "nothing is charged.\nSet EVOLINK_API_KEY to buy real ones from EvoLink.",
            title="EMULATOR",
            border_style="yellow",
            expand=False,
        )
    )


def say_error(error: object) -> None:
    """Say what went wrong, without credentials: its text may hold anything."""
    err.print(f"[bold red]Error:[/] {escape(_plain(redact.text(str(error))))}", soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield what shows progress: a bar on a terminal, a line every few seconds elsewhere."""
    if not err.is_terminal:
        yield _Lines()
        return
    columns = (
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[credits]}"),
        TextColumn("{task.fields[trouble]}"),
    )
    with Bar(*columns, console=err) as bar:
        task = bar.add_task("images", total=None, rate="", credits="", trouble="")
        started_s = time.monotonic()

        def show(progress: Progress) -> None:
            done = progress.delivered / max(0.001, time.monotonic() - started_s)
            bar.update(
                task,
                total=progress.total,
                completed=progress.ended,
                rate=f"{done:.1f} images/s",
                credits=f"{_credits(progress.charged_units)} credits",
                trouble=_trouble(progress),
            )

        yield show


class _Lines:
    """Progress as plain lines, for logs."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_s = self._started_s

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s and progress.ended < progress.total:
            return
        self._next_s = now_s + _LINE_EVERY_S
        seconds = max(0.001, now_s - self._started_s)
        rate = progress.delivered / seconds
        to_come = progress.total - progress.ended
        eta = f", about {to_come / rate:.0f} s to go" if rate > 0 and to_come else ""
        err.print(
            f"{progress.ended}/{progress.total} images, {rate:.1f} images/s{eta}, "
            f"{_credits(progress.charged_units)} credits{_trouble(progress)}"
        )


def show_materialized(done: Materialized, *, where: str, ui: str) -> None:
    """Print how it ended: figures, reasons, places, and how to see it in Dagster."""
    progress = done.progress
    table = Table(show_header=False, box=None, pad_edge=False)
    rows: list[tuple[str, object]] = [
        ("asked", progress.total),
        ("delivered", progress.delivered),
        ("reused", progress.reused),
        ("failed", progress.failed),
        ("left for later", progress.left),
        ("credits", _credits(progress.charged_units)),
        ("seconds", f"{done.seconds:.1f}"),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    out.print(table)
    for reason, count, ids in _reasons(done.missing):
        out.print(escape(_plain(f"  {count} × {reason}: {ids}")))
    for price in done.dearer:
        out.print(escape(f"price: {price}"))
    for note in done.notes:
        out.print(escape(_plain(f"note: {note}")))
    for cap in done.caps_reached:
        out.print(escape(f"deferred: {cap}"))
    if done.missed_callbacks:
        out.print(
            f"callbacks: {done.missed_callbacks} images were found by looking, not called about"
        )
    show_unknown(done.unknown)
    if progress.total and progress.reused == progress.total:
        out.print("Nothing was bought: every image was at hand.")
    elif progress.ended == progress.total and not (
        progress.charged_units or progress.delivered or progress.left
    ):
        out.print("Nothing was bought.")
    for key in done.waiting:
        out.print(f"partition {escape(_plain(key))} waits: its day has not come")
    out.print(f"images     {escape(where)}/images")
    out.print(f"manifest   {escape(where)}/manifest")
    out.print(f"Dagster UI {escape(ui)}")


def show_unknown(records: Sequence[Record]) -> None:
    """Say how many purchases may have been charged, at most how much, and since when."""
    if records:
        figures = unknown_figures(records)
        out.print(
            f"unknown: {figures['count']} purchases got no usable answer; at most "
            f"{figures['credits_at_most']:g} credits, the oldest since {figures['since']}. "
            "Decide with krea-dagster materialize --resolve."
        )


def unknown_figures(records: Sequence[Record]) -> dict[str, Any]:
    """The same, as figures."""
    since = min((record.sent_at for record in records if record.sent_at), default=None)
    return {
        "count": len(records),
        "credits_at_most": credits_from_units(sum(record.committed_units for record in records)),
        "since": None if since is None else since.isoformat(timespec="seconds"),
        "request_keys": [record.request_key for record in records[:_REASONS]],
    }


def show_salvaged(done: Salvaged) -> None:
    """Print what a salvage collected."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in done.figures.items():
        table.add_row(name.replace("_", " "), f"{value:g}")
    out.print(table)
    if not done.figures.get("taken_up"):
        out.print("Nothing that was paid for is left behind.")
    show_unknown(done.unknown)


def materialized_figures(done: Materialized, *, where: str) -> dict[str, Any]:
    """The same, as figures."""
    progress = done.progress
    return {
        "partitions": list(done.partitions),
        "asked": progress.total,
        "delivered": progress.delivered,
        "reused": progress.reused,
        "failed": progress.failed,
        "left": progress.left,
        "credits_charged": credits_from_units(progress.charged_units),
        "seconds": round(done.seconds, 3),
        "not_delivered": [
            {"reason": reason, "count": count, "rows": ids}
            for reason, count, ids in _reasons(done.missing)
        ],
        "images": f"{where}/images",
        "manifest": f"{where}/manifest",
        "dagster_home": done.dagster_home,
        "run_ids": list(done.run_ids),
        "caps_reached": list(done.caps_reached),
        "dearer": list(done.dearer),
        "notes": list(done.notes),
        "missed_callbacks": done.missed_callbacks,
        "unknown": unknown_figures(done.unknown),
        "stopped": None if done.stopped is None else str(done.stopped),
        "failures": list(done.failures),
    }


def show_quote(quoted: Quoted, *, by_partition: bool) -> None:
    """Print what would be bought: by partition and quality, or by quality where they are many."""
    quote, total = quoted.quote, quoted.quote.total
    many = len(quoted.partitions) > _QUOTE_PARTITIONS and not by_partition
    out.print(_quote_table(quote, quote.by_quality() if many else quote.lines, names=not many))
    if many:
        out.print(f"{len(quoted.partitions)} partitions; --by-partition lists them.")
    for quality, price in quote.prices.items():
        source = "published; this account has not paid for one yet"
        if not price.published:
            source = "the highest that the journal has seen"
        out.print(f"price of {quality}: {_credits(price.units)} credits ({source})")
    out.print(f"USD at {quote.credits_per_usd:g} credits per USD")
    if total.purchases < total.to_buy:
        out.print(f"{total.to_buy} rows share {total.purchases} purchases.")
    if total.at_stake:
        since = f", the oldest since {_since(total)}" if total.at_stake_since else ""
        out.print(
            f"unknown: {total.at_stake} purchases may have been charged before; at most "
            f"{_credits(total.at_stake_units)} credits{since}"
        )
    if quote.cap is not None:
        out.print(
            f"deferred: {total.deferred} purchases of {_credits(total.deferred_units)} credits: "
            f"{escape(quote.cap)}"
        )
    for key in quoted.waiting:
        out.print(f"partition {escape(_plain(key))} waits: its day has not come")
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
    table.add_column("credits", _credits(total.units), justify="right")
    decimals = 2 if quote.usd(total.units) >= 1 else 4
    table.add_column("USD", f"{quote.usd(total.units):.{decimals}f}", justify="right")
    for line in lines:
        table.add_row(
            *([escape(_plain(line.partition_key))] if names else []),
            line.quality,
            *(str(getattr(line, name)) for name in counts),
            _credits(line.units),
            f"{quote.usd(line.units):.{decimals}f}",
        )
    return table


def quote_figures(quoted: Quoted) -> dict[str, Any]:
    """The same, as figures."""
    quote = quoted.quote
    return {
        "partitions": [_line_figures(quote, line) for line in quote.lines],
        "total": _line_figures(quote, quote.total),
        "prices": {
            quality: {"credits": credits_from_units(price.units), "published": price.published}
            for quality, price in quote.prices.items()
        },
        "credits_per_usd": quote.credits_per_usd,
        "cap": quote.cap,
        "waiting": list(quoted.waiting),
    }


def _line_figures(quote: Quote, line: QuoteLine) -> dict[str, Any]:
    names = {"partition": line.partition_key, "quality": line.quality} if line.quality else {}
    return {
        **names,
        "asked": line.asked,
        **{name: getattr(line, name) for name in _QUOTE_COUNTS if name != "asked"},
        "purchases": line.purchases,
        "credits": credits_from_units(line.units),
        "usd": round(quote.usd(line.units), 4),
        "deferred": line.deferred,
        "credits_deferred": credits_from_units(line.deferred_units),
        "at_stake": line.at_stake,
        "credits_at_stake": credits_from_units(line.at_stake_units),
        "at_stake_since": _since(line),
    }


def _since(line: QuoteLine) -> str | None:
    at = line.at_stake_since
    return None if at is None else at.isoformat(timespec="seconds")


@contextmanager
def proof_progress() -> Iterator[Callable[[ProofFigures], None]]:
    """Yield what shows how far a proof is: a line every few seconds."""
    next_s = time.monotonic() + _LINE_EVERY_S

    def show(figures: ProofFigures) -> None:
        nonlocal next_s
        if time.monotonic() >= next_s:
            next_s = time.monotonic() + _LINE_EVERY_S
            err.print(
                f"{figures.requests} requests, {figures.files_hashed} files read again "
                f"({figures.bytes_hashed / 1e9:.1f} GB)"
            )

    yield show


def show_proof(proof: Proof) -> None:
    """Print what was proved, in figures, and then what was found."""
    figures, account = proof.figures, proof.account
    rows: list[tuple[str, str]] = [
        ("requests", f"{figures.requests}, by {figures.events} events"),
        ("charges", f"{figures.charges} of {_credits(figures.charged_units)} credits"),
        ("tasks", str(figures.tasks)),
        ("files", f"{figures.files}, {figures.files_hashed} of them read again"),
        ("manifest rows", f"{figures.rows_agreeing} of {figures.rows} agree"),
        ("at stake", f"{figures.at_stake} of at most {_credits(figures.at_stake_units)} credits"),
        ("lost", f"{figures.lost} of at most {_credits(figures.lost_units)} credits"),
    ]
    if account is not None:
        first, last = account.stretches[0].before, account.stretches[-1].after
        explained = f"{_credits(account.journal_units)} credits"
        if account.in_flight_units:
            explained += f", and up to {_credits(account.in_flight_units)} in flight"
        rows += [
            ("account before", f"{_credits(first.used_units)} credits used"),
            ("account after", f"{_credits(last.used_units)} credits used"),
            ("of it charged", explained),
            ("unexplained", f"{_credits(account.unexplained_units)} credits"),
        ]
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in rows:
        table.add_row(name, value)
    out.print(table)
    shown: Counter[str] = Counter()
    for finding in proof.findings:
        shown[finding.kind.value] += 1
        mark = "[bold red]error[/]" if finding.severity.value == "error" else "note"
        out.print(f"{mark}: {escape(_plain(finding.text))}")
    for kind, count in proof.counts.items():
        if count > shown[kind.value]:
            out.print(f"… and {count - shown[kind.value]} more of the kind {kind.value}")
    if proof.adds_up:
        out.print("Every credit is accounted for.")
    else:
        many = "1 thing does" if proof.errors == 1 else f"{proof.errors} things do"
        out.print(f"[bold red]{many} not add up.[/]")


def proof_figures(proof: Proof) -> dict[str, Any]:
    """The same, as figures."""
    figures, account = proof.figures, proof.account
    return {
        "adds_up": proof.adds_up,
        "errors": proof.errors,
        "notes": proof.notes,
        "requests": figures.requests,
        "events": figures.events,
        "submissions": figures.submissions,
        "charges": figures.charges,
        "tasks": figures.tasks,
        "files": figures.files,
        "files_hashed": figures.files_hashed,
        "bytes_hashed": figures.bytes_hashed,
        "manifest_rows": figures.rows,
        "manifest_rows_agreeing": figures.rows_agreeing,
        "credits_charged": credits_from_units(figures.charged_units),
        "at_stake": figures.at_stake,
        "credits_at_stake": credits_from_units(figures.at_stake_units),
        "lost": figures.lost,
        "credits_lost": credits_from_units(figures.lost_units),
        "account": None
        if account is None
        else {
            "readings": account.readings,
            "credits_used_before": credits_from_units(account.stretches[0].before.used_units),
            "credits_used_after": credits_from_units(account.stretches[-1].after.used_units),
            "credits_used": credits_from_units(account.used_units),
            "credits_charged": credits_from_units(account.journal_units),
            "credits_in_flight": credits_from_units(account.in_flight_units),
            "credits_unexplained": credits_from_units(account.unexplained_units),
        },
        "counts": {kind.value: count for kind, count in proof.counts.items()},
        "credits": {kind.value: credits_from_units(units) for kind, units in proof.units.items()},
        "findings": [
            {
                "severity": finding.severity.value,
                "kind": finding.kind.value,
                "text": finding.text,
                "credits": credits_from_units(finding.units),
                "request_key": finding.request_key,
                "task_id": finding.task_id,
            }
            for finding in proof.findings
        ],
    }


def show_report(path: Path, warnings: Sequence[SpendWarning]) -> None:
    """Say where the report is, and its warnings."""
    for one in warnings:
        out.print(escape(f"{one.level.value}: {one.text}"))
    out.print(f"The report is in {escape(str(path))}")


def _spend_table(shown: Spend) -> Table:
    """The sums, without columns in which nothing stands: by two columns it fits a terminal."""
    lines, rate = shown.lines, shown.rate
    figures: dict[str, list[str]] = {
        "asked": [str(line.purchases) for line in lines],
        "images": [str(line.delivered) for line in lines],
        "accepted": [str(line.accepted) for line in lines],
        "failed": [str(line.failed + line.refused) for line in lines],
        "lost": [str(line.lost + line.rejected) for line in lines],
        "open": [str(line.unknown + line.pending) for line in lines],
        "credits": [_credits(line.charged_units) for line in lines],
        "USD": [f"{float(line.usd(rate)):.2f}" for line in lines],
        "at stake": [_credits(line.at_stake_units) for line in lines],
        "each": [_per_image(line) for line in lines],
    }
    if all(line.accepted == line.delivered - line.replaced for line in lines):
        del figures["accepted"]  # nobody has judged
    table = Table(box=None, pad_edge=False)
    columns: list[list[str]] = []
    for number, name in enumerate(shown.by):
        values = [line.of[number] for line in lines]
        columns.append([escape(_plain("–" if value is None else value)) for value in values])
        table.add_column(escape(_plain(name)), overflow="fold")
    for name, texts in figures.items():
        if name in ("failed", "lost", "open", "at stake") and set(texts) == {"0"}:
            continue
        columns.append(texts)
        table.add_column(name, justify="right", no_wrap=True)
    for row in zip(*columns, strict=True):
        table.add_row(*row)
    return table


def show_spend(shown: Spend) -> None:
    """Print what was spent: today, this month and in all, or by the columns that were named."""
    if not shown.lines:
        out.print("Nothing was bought in that time.")
    else:
        out.print(_spend_table(shown))
    out.print(f"USD at {float(shown.rate):g} credits per USD; days are UTC")
    out.print(f"tables     {escape(shown.where)}/spend")


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


def _per_image(line: SpendLine) -> str:
    """What an image came to, all charges together."""
    if not line.delivered:
        return "–"
    return f"{credits_from_units(line.charged_units) / line.delivered:.4f}"


def spend_figures(shown: Spend) -> dict[str, Any]:
    """The same, as figures."""
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
    """Print the same as CSV: a line of names, and exact decimals."""
    money = {"credits_charged", "credits_returned", "credits_at_stake"}
    rows = [_spend_row(shown, line) for line in shown.lines]
    names = [*shown.by, "purchases", *_SPEND_COUNTS, *sorted(money), "usd_charged"]
    writer = csv.writer(sys.stdout, lineterminator="\n")
    writer.writerow(names)
    for row, line in zip(rows, shown.lines, strict=True):
        exact = {name: _credits(getattr(line, f"{name[8:]}_units")) for name in money}
        writer.writerow([{**row, **exact}[name] for name in names])


def show_answer(answer: pa.Table, form: str) -> None:
    """Print the answer to a query: as a table, ``json`` or ``csv``."""
    rows = [[_cell(value) for value in row.values()] for row in answer.to_pylist()]
    if form == "json":
        show_json([dict(zip(answer.column_names, row, strict=True)) for row in rows])
    elif form == "csv":
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(answer.column_names)
        writer.writerows(rows)
    else:
        table = Table(box=None, pad_edge=False)
        for name, kind in zip(answer.column_names, answer.schema.types, strict=True):
            is_number = pa.types.is_integer(kind) or pa.types.is_floating(kind)
            justify: Any = "right" if is_number or pa.types.is_decimal(kind) else "left"
            table.add_column(escape(_plain(name)), justify=justify, overflow="fold")
        for row in rows:
            table.add_row(*(escape(_plain("–" if cell is None else str(cell))) for cell in row))
        out.print(table)


def _cell(value: Any) -> Any:
    """A value as JSON and CSV take it; decimals and times as exact text."""
    if value is None or isinstance(value, str | int | float | bool):
        return value
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def show_json(figures: object) -> None:
    """Print figures as JSON."""
    # In ASCII: a terminal takes some characters beyond it for commands.
    out.print_json(json.dumps(figures), ensure_ascii=True)


def _reasons(missing: pa.Table) -> list[tuple[str, int, str]]:
    """Why rows have no image: the reason, how many, and the first of their prompt_ids.

    Rows with the same code are one reason, in the words of the first: EvoLink's messages end in
    a request id, so that no two are alike.
    """
    codes = pc.coalesce(missing["error_code"], "")
    reasons = pc.binary_join_element_wise(missing["status"], codes, "\x1f")
    counts = {run["values"].as_py(): run["counts"].as_py() for run in pc.value_counts(reasons)}
    found: list[tuple[str, int, str]] = []
    for reason, count in sorted(counts.items(), key=lambda item: -item[1])[:_REASONS]:
        rows = missing.filter(pc.equal(reasons, reason)).slice(0, 5).to_pylist()
        code = f" ({rows[0]['error_code']})" if rows[0]["error_code"] else ""
        message = f", {rows[0]['error_message']}" if rows[0]["error_message"] else ""
        ids = ", ".join(str(row["prompt_id"])[:60] for row in rows)
        words = f"{rows[0]['status']}{code}{message}"
        found.append((words, count, ids + (" …" if count > 5 else "")))
    return found


def _trouble(progress: Progress) -> str:
    parts = []
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.left:
        parts.append(f"{progress.left} left")
    return ", " + ", ".join(parts) if parts else ""


def _credits(units: int) -> str:
    return credits_text(units)


def _plain(text: str) -> str:
    """Text without control characters: a prompt may hold what moves a terminal's cursor."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text
    )

"""Prints what a materialization or a salvage did."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

import pyarrow as pa
import pyarrow.compute as pc
from rich.markup import escape
from rich.table import Table

from krea_dagster.cli.quote import trial_figures
from krea_dagster.cli.terminal import out, printable
from krea_dagster.engine.record import Record
from krea_dagster.models import credits_from_units, credits_text

if TYPE_CHECKING:
    from krea_dagster.plugin.materialize import Materialized, Salvaged

#: Maximum number of kinds of failure that are listed.
_REASONS: Final = 20


def show_materialized(done: Materialized, *, where: str, commands: Mapping[str, str]) -> None:
    """Print the outcome: figures, reasons, paths, and the commands to go on with."""
    progress = done.progress
    table = Table(show_header=False, box=None, pad_edge=False)
    rows: list[tuple[str, object]] = [
        *([("trial", str(done.trial))] if done.trial is not None else []),
        ("asked", progress.total),
        ("delivered", progress.delivered),
        ("reused", progress.reused),
        ("failed", progress.failed),
        ("left for later", progress.left),
        ("credits", credits_text(progress.charged_units)),
        ("seconds", f"{done.seconds:.1f}"),
    ]
    for name, value in rows:
        table.add_row(name, str(value))
    out.print(table)
    for reason, count, ids in _reasons(done.missing):
        out.print(escape(printable(f"  {count} × {reason}: {ids}")))
    for price in done.price_increases:
        out.print(escape(f"price: {price}"))
    for note in done.notes:
        out.print(escape(printable(f"note: {note}")))
    for cap in done.caps_reached:
        out.print(escape(f"deferred: {cap}"))
    if done.missed_callbacks:
        out.print(
            f"callbacks: {done.missed_callbacks} tasks sent no callback and were found by polling"
        )
    show_unknown(done.unknown)
    if progress.total and progress.reused == progress.total:
        out.print("Nothing was bought: every image was already there.")
    elif progress.ended == progress.total and not (
        progress.charged_units or progress.delivered or progress.left
    ):
        out.print("Nothing was bought.")
    for key in done.waiting:
        out.print(f"partition {escape(printable(key))} skipped: its date is in the future")
    found = {"images": f"{where}/images", "manifest": f"{where}/manifest", **commands}
    out.print(escape("\n".join(f"{name:10} {text}" for name, text in found.items())))


def show_unknown(records: Sequence[Record]) -> None:
    """Print how many purchases may have been charged, at most how much, and since when."""
    if records:
        figures = unknown_figures(records)
        out.print(
            f"unknown: {figures['count']} purchases got no usable answer; at most "
            f"{figures['credits_at_most']:g} credits, the oldest since {figures['since']}. "
            "Decide with krea-dagster materialize --resolve."
        )


def unknown_figures(records: Sequence[Record]) -> dict[str, Any]:
    """Return the same for JSON."""
    since = min((record.sent_at for record in records if record.sent_at), default=None)
    return {
        "count": len(records),
        "credits_at_most": credits_from_units(sum(record.committed_units for record in records)),
        "since": None if since is None else since.isoformat(timespec="seconds"),
        "request_keys": [record.request_key for record in records[:_REASONS]],
    }


def show_salvaged(done: Salvaged) -> None:
    """Print the outcome of a salvage."""
    table = Table(show_header=False, box=None, pad_edge=False)
    for name, value in done.figures.items():
        table.add_row(name.replace("_", " "), f"{value:g}")
    out.print(table)
    if not done.figures.get("taken_up"):
        out.print("Nothing that was paid for is left behind.")
    show_unknown(done.unknown)


def materialized_figures(done: Materialized, *, where: str) -> dict[str, Any]:
    """Return the outcome of a materialization for JSON."""
    progress = done.progress
    return {
        "partitions": list(done.partitions),
        "trial": trial_figures(done.trial),
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
        "dearer": list(done.price_increases),
        "notes": [*done.table_notes, *done.notes],
        "missed_callbacks": done.missed_callbacks,
        "unknown": unknown_figures(done.unknown),
        "stopped": None if done.stopped is None else str(done.stopped),
        "failures": list(done.failures),
    }


def _reasons(missing: pa.Table) -> list[tuple[str, int, str]]:
    """Return why rows have no image: the reason, the number of rows, and the first prompt_ids.

    Rows with the same code are one reason, with the first row's message: EvoLink's messages end
    in a request id, so that each is different.
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

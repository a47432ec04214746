"""What the command shows: progress, tables, warnings. Results on stdout, the rest on stderr."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final

import pyarrow as pa
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

from krea_dagster.engine.progress import Progress
from krea_dagster.engine.record import Record
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.materialize import Materialized, Salvaged
from krea_dagster.plugin.metadata import missing_rows

#: Seconds between two lines of progress where there is no terminal.
_LINE_EVERY_S: Final = 5.0
#: Kinds of failure that are listed with their rows.
_REASONS: Final = 20

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
    """Say what went wrong, as it is: its text may hold anything."""
    err.print(f"[bold red]Error:[/] {escape(_plain(str(error)))}", soft_wrap=True)


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
    for reason, count, ids in _reasons(done.manifest):
        out.print(escape(_plain(f"  {count} × {reason}: {ids}")))
    for cap in done.caps_reached:
        out.print(escape(f"deferred: {cap}"))
    show_unknown(done.unknown)
    if progress.total and progress.reused == progress.total:
        out.print("Nothing was bought: every image was at hand.")
    elif not progress.charged_units and not progress.delivered:
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
            for reason, count, ids in _reasons(done.manifest)
        ],
        "images": f"{where}/images",
        "manifest": f"{where}/manifest",
        "dagster_home": done.dagster_home,
        "run_ids": list(done.run_ids),
        "caps_reached": list(done.caps_reached),
        "unknown": unknown_figures(done.unknown),
        "stopped": None if done.stopped is None else str(done.stopped),
        "failures": list(done.failures),
    }


def show_json(figures: object) -> None:
    """Print figures as JSON."""
    out.print_json(json.dumps(figures))


def _reasons(manifest: pa.Table) -> list[tuple[str, int, str]]:
    """Why rows have no image: the reason, how many, and the first of their prompt_ids."""
    counts: Counter[str] = Counter()
    ids: dict[str, list[str]] = {}
    columns = ("prompt_id", "status", "error_code", "error_message")
    for row in missing_rows(manifest).select(columns).to_pylist():
        code = f" ({row['error_code']})" if row["error_code"] else ""
        message = f", {row['error_message']}" if row["error_message"] else ""
        reason = f"{row['status']}{code}{message}"
        counts[reason] += 1
        ids.setdefault(reason, []).append(str(row["prompt_id"])[:60])
    return [
        (reason, count, ", ".join(ids[reason][:5]) + (" …" if count > 5 else ""))
        for reason, count in counts.most_common(_REASONS)
    ]


def _trouble(progress: Progress) -> str:
    parts = []
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.left:
        parts.append(f"{progress.left} left")
    return ", " + ", ".join(parts) if parts else ""


def _credits(units: int) -> str:
    return f"{credits_from_units(units):g}"


def _plain(text: str) -> str:
    """Text without control characters: a prompt may hold what moves a terminal's cursor."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text
    )

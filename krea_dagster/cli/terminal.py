"""Consoles, progress and errors of all commands. Results on stdout, the rest on stderr."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.markup import escape

from krea_dagster import redact
from krea_dagster.models import credits_text

if TYPE_CHECKING:
    from krea_dagster.engine.run.report import Progress

#: Seconds between two lines of progress without a terminal.
LINE_EVERY_S: Final = 5.0

out: Final = Console(highlight=False, soft_wrap=True)
err: Final = Console(stderr=True, highlight=False)


def say_synthetic() -> None:
    """Warn that the images are not Krea's."""
    from rich.panel import Panel

    err.print(
        Panel(
            "The images are [bold]synthetic[/]: they come from an emulator on this machine, and "
            "nothing is charged.\nSet EVOLINK_API_KEY to buy real ones from EvoLink.",
            title="EMULATOR",
            border_style="yellow",
            expand=False,
        )
    )


def say_error(error: object) -> None:
    """Print an error, without the credentials that its text may contain."""
    err.print(f"[bold red]Error:[/] {escape(printable(redact.text(str(error))))}", soft_wrap=True)


@contextmanager
def progress_bar() -> Iterator[Callable[[Progress], None]]:
    """Yield a callback that shows progress: a bar on a terminal, else a line every few seconds."""
    if not err.is_terminal:
        yield _Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

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
                credits=f"{credits_text(progress.charged_units)} credits",
                trouble=_trouble(progress),
            )

        yield show


class _Lines:
    """Prints progress as lines, for logs."""

    def __init__(self) -> None:
        self._started_s = time.monotonic()
        self._next_s = self._started_s

    def __call__(self, progress: Progress) -> None:
        now_s = time.monotonic()
        if now_s < self._next_s and progress.ended < progress.total:
            return
        self._next_s = now_s + LINE_EVERY_S
        seconds = max(0.001, now_s - self._started_s)
        rate = progress.delivered / seconds
        to_come = progress.total - progress.ended
        eta = f", about {to_come / rate:.0f} s to go" if rate > 0 and to_come else ""
        err.print(
            f"{progress.ended}/{progress.total} images, {rate:.1f} images/s{eta}, "
            f"{credits_text(progress.charged_units)} credits{_trouble(progress)}"
        )


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


def show_json(figures: object) -> None:
    """Print JSON on stdout."""
    # In ASCII: terminals interpret some other characters as commands.
    out.print_json(json.dumps(figures), ensure_ascii=True)


def _trouble(progress: Progress) -> str:
    parts = []
    if progress.failed:
        parts.append(f"{progress.failed} failed")
    if progress.left:
        parts.append(f"{progress.left} left")
    return ", " + ", ".join(parts) if parts else ""


def printable(text: str) -> str:
    """Escape control characters: a prompt may contain some that move a terminal's cursor."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text
    )

"""Consoles, progress and errors of all commands. Results on stdout, the rest on stderr."""

from __future__ import annotations

import json
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.highlighter import JSONHighlighter
from rich.markup import escape

from krea_dagster import redact
from krea_dagster.application.run_log import Listener, RunLog
from krea_dagster.application.run_text import rate_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from krea_dagster.application.settings import Settings
    from krea_dagster.engine.run.report import Progress

#: Seconds between two lines of progress without a terminal.
LINE_EVERY_S: Final = 5.0

out: Final = Console(highlight=False, soft_wrap=True)
err: Final = Console(stderr=True, highlight=False)


def say_synthetic(settings: Settings) -> None:
    """Warn that the images are not Krea's."""
    from rich.panel import Panel

    how = "Set" if settings.emulator else "Unset EVOLINK_BASE_URL and set"

    err.print(
        Panel(
            "The images are [bold]synthetic[/]: they come from an emulator on this machine, and "
            f"nothing is charged.\n{how} EVOLINK_API_KEY to buy real ones from EvoLink.",
            title="EMULATOR",
            border_style="yellow",
            expand=False,
        )
    )


def say_error(error: object) -> None:
    """Print an error, without the credentials that its text may contain."""
    err.print(f"[bold red]Error:[/] {escape(printable(redact.text(str(error))))}", soft_wrap=True)


@contextmanager
def run_shown() -> Iterator[Listener]:
    """Yield what shows a run: lines, and a bar on a terminal, else its progress now and then."""
    if not err.is_terminal:
        with RunLog(_print_line, LINE_EVERY_S) as log:
            yield log
        return
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
    )
    with Bar(*columns, console=err) as bar:
        yield _Bar(bar)


class _Bar:
    """Shows a run on a terminal."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("", total=None, rate="")
        self._since_s: float | None = None

    def say(self, line: str) -> None:
        _print_line(line)

    def doing(self, what: str) -> None:
        self._bar.update(self._task, description=escape(printable(what)))

    def progress(self, progress: Progress) -> None:
        now_s = time.monotonic()
        self._since_s = self._since_s or now_s
        self._bar.update(
            self._task,
            description="images",
            total=progress.total,
            completed=progress.ended,
            rate=rate_text(progress, now_s - self._since_s),
        )


def _print_line(line: str) -> None:
    err.print(escape(printable(line)), soft_wrap=True)


def show_json(figures: object) -> None:
    """Print JSON on stdout; a decimal becomes a number with all of its digits."""
    # In ASCII: terminals interpret some other characters as commands.
    marked = json.dumps(figures, indent=2, default=lambda value: f"{_EXACT}{value:f}")
    text = re.sub(f'"{_EXACT}([^"]*)"', r"\1", marked)
    out.print(JSONHighlighter()(text), markup=False)


#: Marks a number in a JSON text; no other text contains it.
_EXACT: Final = secrets.token_hex(16)


def printable(text: str) -> str:
    """Escape control characters: a prompt may contain some that move a terminal's cursor."""
    return "".join(
        char if char.isprintable() or char == "\n" else f"\\x{ord(char):02x}" for char in text
    )

"""Two workers on one account, which know nothing of each other: together, and how they share.

python -m benchmarks.workers [--quick] [--json]
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.books import figures_of, shares_of
from benchmarks.harness import WORKERS, Report, Server, Started, finish, note_progress, options_of
from benchmarks.makespan import MOST, A

IMAGES: Final = 1000
QUICK_IMAGES: Final = 200
#: From the start of the processes until both have imported all and begin.
READY_S: Final = 5.0
#: Six workers decode on one core: small pictures leave it idle enough to be on time.
SMALL: Final = ("--image-bytes", 1)
#: Most that the two together may take of the bound, and least that one may get.
RATIO: Final = 1.08
SHARE: Final = 0.40


@dataclass(frozen=True)
class Case:
    """Two workers, the second of which may begin later, with or without batch reads."""

    name: str
    late_s: float
    batch: bool


def main() -> None:
    """Run the command."""
    options = options_of("workers").parse_args()
    images, late_s = (QUICK_IMAGES, 4.0) if options.quick else (IMAGES, 20.0)
    cases = [
        Case("both at once, batch reads", 0.0, batch=True),
        Case("both at once, single reads", 0.0, batch=False),
        Case(f"the second {late_s:g} s later, batch reads", late_s, batch=True),
    ]
    report = Report(
        "workers",
        "Two workers on one account",
        setting=(
            f"{images:,} images of 13 KB each, 2 s ± 30 %, account {A.name}, n = 1; a process, a "
            "journal and a folder each; the cases run at the same time, each with its own server"
        ),
        columns=[
            "case",
            "makespan, s",
            "bound, s",
            "ratio",
            "share of the one that got less",
            "POSTs answered 429 after 10 s",
            "reads per image",
        ],
    )
    for case, books in _run(cases, images):
        figures, shares = figures_of(books, 2 * images), shares_of(books)
        report.add(
            case.name,
            f"{figures.makespan_s:.1f}",
            f"{figures.bound_s:.1f}",
            f"{figures.ratio:.3f}",
            f"{min(shares.values()):.1%}",
            f"{figures.turned_away_later:.1%}",
            f"{figures.single_reads + figures.batch_reads:.2f}",
        )
        report.claim(f"{case.name}: makespan to bound", figures.ratio, RATIO)
        # As the share of the one that got more, so that every limit is a most.
        report.claim(f"{case.name}: the larger share", max(shares.values()), 1 - SHARE)
    report.note(
        "Shares are of what was taken from when the second began until the first had its last one."
    )
    finish(report, options)


def _run(cases: list[Case], images: int) -> list[tuple[Case, dict[str, Any]]]:
    note_progress("; ".join(case.name for case in cases))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        begin_s = time.monotonic() + READY_S
        running = []
        for number, case in enumerate(cases):
            without = () if case.batch else ("--no-batch",)
            server = stack.enter_context(
                Server.start(*A.options, *without, *SMALL, "--api-keys", "first,second")
            )
            pair = []
            for order, key in enumerate(("first", "second")):
                command = ["benchmarks.worker", "engine", "--url", server.url, "--key", key]
                command += ["--images", str(images), "--first", str(order * images)]
                command += ["--most", str(MOST), "--folder", str(folder / f"{number}-{key}")]
                command += ["--begin-at", str(begin_s + order * case.late_s)]
                started = Started(command, core=WORKERS)
                stack.callback(started.stop)
                pair.append(started)
            running.append((case, server, pair))
        ended = []
        for case, server, pair in running:
            for started in pair:
                started.wait()
            ended.append((case, server.books()))
        return ended


if __name__ == "__main__":
    main()

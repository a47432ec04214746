"""Several processes on one account and one journal: their span, and how evenly they share it.

python -m benchmarks.processes [--quick] [--journal URL] [--json]
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import WORKERS, BenchmarkServer, RunningProcess, note_progress
from benchmarks.report import Report, finish, options_of
from benchmarks.run_figures import figures_of

IMAGES: Final = 160
PROCESSES: Final = (1, 2, 4, 8)
QUICK_PROCESSES: Final = (1, 4)
ACCOUNT: Final = ("--latency", 1, "--spread", 0.1, "--rate", 10, "--concurrent", 24)
#: All processes decode on one core: small images leave it idle enough.
SMALL: Final = ("--image-bytes", 1)
MOST: Final = 64
#: The most span compared with one process, the most 429s per image, and the least rate of the
#: slowest process compared with the mean.
SPAN: Final = 1.15
TURNED_AWAY: Final = 0.15
SLOWEST: Final = 0.6


def main() -> None:
    """Run the command."""
    parser = options_of("processes")
    parser.add_argument("--journal", help="a URL; default: a new SQLite file for each case")
    options = parser.parse_args()
    report = Report(
        "processes",
        "Several processes on one account and one journal",
        setting=(
            f"{IMAGES} images in all, 1 s ± 10 %, account 10/s, 24 at once, n = 1; all begin at "
            f"the same moment, once each has imported all; journal: "
            f"{'SQLite' if options.journal is None else 'PostgreSQL'}"
        ),
        columns=["processes", "span, s", "of one", "429s per image", "slowest of mean rate"],
    )
    one_s = 0.0
    for count in QUICK_PROCESSES if options.quick else PROCESSES:
        stats = _run(count, options.journal)
        figures, rates = figures_of(stats, IMAGES), _rates(stats)
        one_s = one_s or figures.makespan_s
        outcomes = [one["outcome"] for one in stats["creates"]]
        turned_away = outcomes.count("429") / IMAGES
        slowest = min(rates) / (sum(rates) / len(rates))
        report.add(
            count,
            f"{figures.makespan_s:.1f}",
            f"{figures.makespan_s / one_s:.3f}",
            f"{turned_away:.3f}",
            f"{slowest:.2f}",
        )
        report.claim(f"{count}: span to that of one", figures.makespan_s / one_s, SPAN)
        report.claim(f"{count}: 429s per image", turned_away, TURNED_AWAY)
        # As a difference, so that every limit is an upper limit.
        report.claim(f"{count}: what the slowest lacks of the mean", 1 - slowest, 1 - SLOWEST)
    report.note("A process's rate is its images by the time from the first POST to its last image.")
    finish(report, options)


def _rates(stats: dict[str, Any]) -> list[float]:
    """Return the images per second of each process."""
    done: dict[str, list[float]] = {}
    for task in stats["tasks"]:
        done.setdefault(task["worker"], []).append(task["downloaded_s"])
    return [len(times) / (max(times) - stats["first_post_s"]) for times in done.values()]


def _run(count: int, journal: str | None) -> dict[str, Any]:
    note_progress(f"{count} processes")
    images = IMAGES // count
    with ExitStack() as stack:
        folder = Path(stack.enter_context(TemporaryDirectory()))
        keys = [f"p{number}" for number in range(count)]
        server = stack.enter_context(
            BenchmarkServer.start(*ACCOUNT, *SMALL, "--api-keys", ",".join(keys))
        )
        gate = folder / "gate"
        gate.mkdir()
        running = []
        for number, key in enumerate(keys):
            command = ["benchmarks.worker", "engine", "--url", server.url, "--key", key]
            command += ["--images", str(images), "--first", str(number * images)]
            command += ["--most", str(MOST), "--folder", str(folder / key)]
            command += ["--journal", journal or f"sqlite:///{folder / 'journal.db'}"]
            command += ["--gate", str(gate)]
            started = RunningProcess(command, core=WORKERS)
            stack.callback(started.stop)
            running.append(started)
        while len(list(gate.glob("*.ready"))) < count:
            time.sleep(0.1)
        (gate / "open").touch()
        for started in running:
            started.wait()
        return server.stats()


if __name__ == "__main__":
    main()

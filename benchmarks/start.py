"""What a command takes from its start to its end, in units of ``import dagster``.

python -m benchmarks.start [--quick] [--json]
"""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.harness import EndedProcess, note_progress, run
from benchmarks.report import Report, finish, options_of

ROWS: Final = 64
TIMES: Final = 7
QUICK_TIMES: Final = 3
DAGSTER: Final = "import dagster"
#: The most that a command may take, in units of ``import dagster``.
LIMITS: Final = {
    "--version": 0.2,
    "--help": 0.2,
    "quote": 0.85,
    "spend": 0.85,
    "verify": 0.85,
    "materialize": 4.0,
}


def main() -> None:
    """Run the command."""
    options = options_of("start").parse_args()
    times = QUICK_TIMES if options.quick else TIMES
    report = Report(
        "start",
        "The start of a command",
        setting=(
            f"{ROWS} images in 8 partitions, all bought before, SQLite; each command in a fresh "
            f"process, in turns, n = {times}, of which the shortest counts"
        ),
        columns=["what", "CPU, s", f"of {DAGSTER}", "s in all"],
    )
    with TemporaryDirectory() as folder:
        environ = _project(Path(folder))
        found: dict[str, list[EndedProcess]] = {DAGSTER: [], **{name: [] for name in LIMITS}}
        for turn in range(times):
            note_progress(f"turn {turn + 1} of {times}")
            for name, ended in found.items():
                command = (
                    ["benchmarks.import_dagster"] if name == DAGSTER else ["krea_dagster.cli", name]
                )
                ended.append(run(command, environ=environ))
    least_s = {name: min(one.cpu_s for one in ended) for name, ended in found.items()}
    for name, ended in found.items():
        ratio = least_s[name] / least_s[DAGSTER]
        report.add(
            name,
            f"{least_s[name]:.2f}",
            f"{ratio:.2f}",
            f"{min(one.wall_s for one in ended):.2f}",
        )
        if name in LIMITS:
            report.claim(f"{name}: CPU to that of {DAGSTER}", ratio, LIMITS[name])
    report.note("`materialize` finds nothing to buy: it imports Dagster, and launches no run.")
    finish(report, options)


def _project(folder: Path) -> dict[str, str]:
    """Buy the images from an emulator, and return the environment of the project."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    prompts = [f"a boat in harbour {number}" for number in range(ROWS)]
    pq.write_table(pa.table({"prompt": prompts}), folder / "prompts.parquet")
    environ = {
        "KREA_PROMPTS": str(folder / "prompts.parquet"),
        "KREA_STORAGE": str(folder / "krea"),
    }
    note_progress("buying")
    run(["krea_dagster.cli", "materialize"], environ=environ)
    return environ


if __name__ == "__main__":
    main()

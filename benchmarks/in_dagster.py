"""The cost of Dagster: the same images by the engine alone and through Dagster.

python -m benchmarks.in_dagster [--quick] [--json]
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import BenchmarkServer, EndedProcess, note_progress, run
from benchmarks.report import Report, finish, options_of
from benchmarks.run_figures import RunFigures, figures_of

IMAGES: Final = 5_000
QUICK_IMAGES: Final = 500
MOST: Final = 256
RATIO: Final = 1.15

SERVER: Final = ("--latency", 0.5, "--spread", 0.3, "--concurrent", 64, "--image-bytes", 1)


def main() -> None:
    """Run the command."""
    options = options_of("in_dagster").parse_args()
    images = QUICK_IMAGES if options.quick else IMAGES
    report = Report(
        "in_dagster",
        "The cost of Dagster",
        setting=(
            f"{images:,} images of 13 KB, 0.5 s ± 30 %, 64 at once, no rate limit, {MOST} in "
            "flight at most; Dagster with its own instance on disk, 8 partitions, n = 1"
        ),
        columns=[
            "client",
            "images",
            "run, s",
            "process, s",
            "first POST to last image, s",
            "to the bound",
            "CPU, ms per image",
        ],
    )
    walls = {}
    for kind, name in (("engine", "engine alone"), ("dagster", "images + image_manifest")):
        ended, figures = _ours(kind, images)
        walls[kind] = float(ended.output["wall_s"])
        _report(report, name, ended, figures)
    report.claim("through Dagster to the engine alone", walls["dagster"] / walls["engine"], RATIO)
    report.note(
        "'run' leaves out Python's start and imports; 'process' and the CPU count them. Through "
        "Dagster, 'run' includes reading and checking the prompt table, all runs of the job, and "
        "the manifest."
    )
    finish(report, options)


def _ours(kind: str, images: int) -> tuple[EndedProcess, RunFigures]:
    note_progress(f"{kind}, {images:,} images")
    with BenchmarkServer.start(*SERVER) as server, TemporaryDirectory() as folder:
        command = ["--url", server.url, "--images", str(images), "--folder", folder]
        if kind == "dagster":
            run(["benchmarks.worker", "table", *command])
        ended = run(["benchmarks.worker", kind, *command, "--most", str(MOST)])
        _check(ended.output, images)
        return ended, figures_of(server.stats(), images)


def _check(said: dict[str, Any], images: int) -> None:
    if said["delivered"] != images or said.get("failures"):
        raise RuntimeError(f"{said} instead of {images} images")


def _report(report: Report, name: str, ended: EndedProcess, figures: RunFigures) -> None:
    report.add(
        name,
        f"{figures.images:,}",
        f"{ended.output['wall_s']:.1f}",
        f"{ended.wall_s:.1f}",
        f"{figures.makespan_s:.1f}",
        f"{figures.ratio:.2f}",
        f"{1000 * ended.cpu_s / figures.images:.1f}",
    )


if __name__ == "__main__":
    main()

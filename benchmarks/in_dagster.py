"""What Dagster costs: the same images by the engine alone, through Dagster, and an op each.

python -m benchmarks.in_dagster [--quick] [--json]
"""

from __future__ import annotations

from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.books import Figures, figures_of
from benchmarks.harness import Ran, Report, Server, finish, note_progress, options_of, run

IMAGES: Final = 5_000
QUICK_IMAGES: Final = 500
#: Images with an op each, from which the rest is reckoned.
OPS: Final = 16
QUICK_OPS: Final = 4
MOST: Final = 256
RATIO: Final = 1.15

SERVER: Final = ("--latency", 0.5, "--spread", 0.3, "--concurrent", 64, "--image-bytes", 1)


def main() -> None:
    """Run the command."""
    options = options_of("in_dagster").parse_args()
    images, ops = (QUICK_IMAGES, QUICK_OPS) if options.quick else (IMAGES, OPS)
    report = Report(
        "in_dagster",
        "What Dagster costs",
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
        ran, figures = _ours(kind, images)
        walls[kind] = float(ran.said["wall_s"])
        _report(report, name, ran, figures)
    report.claim("through Dagster to the engine alone", walls["dagster"] / walls["engine"], RATIO)
    note_progress(f"an op per prompt, {ops} images")
    ran, figures = _op_per_prompt(ops)
    _report(report, "an op per prompt (dynamic outputs)", ran, figures)
    reckoned_s = ran.said["wall_s"] / ops * images
    report.note(
        f"An op per prompt: {ops} images were measured. At the same pace {images:,} would take "
        f"{reckoned_s / 60:,.0f} minutes, {reckoned_s / walls['dagster']:,.0f} times as long as "
        "the assets of this package. It has Dagster's default executor: a process per op, one per "
        "core at a time."
    )
    report.note(
        "'run' leaves out Python's start and imports; 'process' and the CPU count them. Through "
        "Dagster, 'run' holds reading and checking the prompt table, all runs of the job, and the "
        "manifest."
    )
    finish(report, options)


def _ours(kind: str, images: int) -> tuple[Ran, Figures]:
    note_progress(f"{kind}, {images:,} images")
    with Server.start(*SERVER) as server, TemporaryDirectory() as folder:
        command = ["--url", server.url, "--images", str(images), "--folder", folder]
        if kind == "dagster":
            run(["benchmarks.worker", "table", *command])
        ran = run(["benchmarks.worker", kind, *command, "--most", str(MOST)])
        _check(ran.said, images)
        return ran, figures_of(server.books(), images)


def _op_per_prompt(images: int) -> tuple[Ran, Figures]:
    with Server.start(*SERVER) as server, TemporaryDirectory() as folder:
        command = ["benchmarks.op_per_prompt", "--url", server.url]
        ran = run([*command, "--images", str(images), "--folder", folder])
        _check(ran.said, images)
        return ran, figures_of(server.books(), images)


def _check(said: dict[str, Any], images: int) -> None:
    if said["delivered"] != images or said.get("failures"):
        raise RuntimeError(f"{said} instead of {images} images")


def _report(report: Report, name: str, ran: Ran, figures: Figures) -> None:
    report.add(
        name,
        f"{figures.images:,}",
        f"{ran.said['wall_s']:.1f}",
        f"{ran.wall_s:.1f}",
        f"{figures.makespan_s:.1f}",
        f"{figures.ratio:.2f}",
        f"{1000 * ran.cpu_s / figures.images:.1f}",
    )


if __name__ == "__main__":
    main()

"""The most memory that a run takes: with few and many images, and with large ones.

python -m benchmarks.memory [--quick] [--json]
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.harness import BenchmarkServer, EndedProcess, note_progress, run
from benchmarks.report import Report, finish, options_of
from benchmarks.run_figures import most_at_once

#: Few and many images, and how much more memory the many may take.
FEW: Final = 5_000
MANY: Final = 50_000
RATIO: Final = 1.2

#: Large images, how many at once, and the most memory for them.
LARGE: Final = 640
AT_ONCE: Final = 256
LARGE_BYTES: Final = 4_000_000
MOST_BYTES: Final = 1_000_000_000

SMALL: Final = ("--latency", 0, "--image-bytes", 1)
LARGE_SERVER: Final = (
    *("--latency", 2, "--spread", 0.3, "--concurrent", AT_ONCE),
    *("--qualities", "2K", "--format", "png", "--image-bytes", LARGE_BYTES),
)


def main() -> None:
    """Run the command."""
    options = options_of("memory").parse_args()
    few, many, large = (500, 2_000, 300) if options.quick else (FEW, MANY, LARGE)
    report = Report(
        "memory",
        "Peak memory",
        setting=(
            f"small: 1024×1024 JPEGs of 13 KB, no latency, no limits, {AT_ONCE} in flight at most. "
            f"Large: 2048×2048 PNGs of {LARGE_BYTES / 1e6:g} MB, 2 s ± 30 %, {AT_ONCE} at once. "
            "Every image is decoded. n = 1"
        ),
        columns=["case", "images", "peak memory, MB", "wall, s", "CPU, ms per image"],
    )
    for kind, name in (("engine", "engine"), ("dagster", "through Dagster")):
        peaks = []
        for images in (few, many):
            ended, _ = _measure(kind, images, SMALL, ())
            peaks.append(_report(report, f"{name}, small", images, ended))
        report.claim(f"{name}: {many:,} images to {few:,}", peaks[1] / peaks[0], RATIO)
    ended, at_once = _measure("engine", large, LARGE_SERVER, ("--quality", "2K"))
    peak = _report(report, f"engine, large ({at_once} at once)", large, ended)
    report.claim(f"2K images, {at_once} at once, in MB", peak / 1e6, MOST_BYTES / 1e6)
    report.note(
        "Peak memory is the largest resident set of the worker process (VmHWM), Python included."
    )
    finish(report, options)


def _measure(
    kind: str, images: int, server_options: Sequence[object], more: Sequence[str]
) -> tuple[EndedProcess, int]:
    note_progress(f"{kind}, {images:,} images")
    with BenchmarkServer.start(*server_options) as server, TemporaryDirectory() as folder:
        command = ["--url", server.url, "--images", str(images), "--folder", folder, *more]
        command += ["--most", str(AT_ONCE)]
        if kind == "dagster":
            run(["benchmarks.worker", "table", *command])
        ended = run(["benchmarks.worker", kind, *command])
        if ended.output["delivered"] != images:
            raise RuntimeError(f"{ended.output} instead of {images} images")
        stored = sum(path.stat().st_size for path in Path(folder).rglob("images/*/*"))
        stats = server.stats()
        if stored != stats["download_bytes"]:
            raise RuntimeError(f"{stored} bytes of {stats['download_bytes']} are stored")
        return ended, most_at_once(stats)


def _report(report: Report, name: str, images: int, ended: EndedProcess) -> int:
    peak = int(ended.output["peak_bytes"])
    report.add(
        name,
        f"{images:,}",
        f"{peak / 1e6:.0f}",
        f"{ended.output['wall_s']:.1f}",
        f"{1000 * ended.output['cpu_s'] / images:.2f}",
    )
    return peak


if __name__ == "__main__":
    main()

"""What an image costs: the CPU of the client, and the images per second, against bare loops.

python -m benchmarks.images [--quick] [--json]
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.harness import BenchmarkServer, EndedProcess, note_progress, run
from benchmarks.report import Report, finish, options_of

IMAGES: Final = 600
QUICK_IMAGES: Final = 300
#: A run of so few images costs what a run costs without any.
FEW: Final = 1
TRIES: Final = 2

AT_ONCE: Final = 64
SERVER: Final = ("--latency", 0.1, "--spread", 0.3, "--format", "png", "--image-bytes", 1_700_000)

#: Ours and the bare loops: their workers, and what they do with an image.
CLIENTS: Final = {
    "krea": "ours: decode and measure",
    "aiohttp-decode": "bare aiohttp: decode by Pillow in threads",
    "krea-unseen": "ours: verify_images off",
    "aiohttp-journal": "bare aiohttp: sha256, fsync, SQLite journal",
}


@dataclass(frozen=True)
class Cost:
    """The cost of one more image."""

    cpu_ms: float
    wall_ms: float


def main() -> None:
    """Run the command."""
    options = options_of("images").parse_args()
    images = QUICK_IMAGES if options.quick else IMAGES
    tries = 1 if options.quick else TRIES
    report = Report(
        "images",
        "The cost of an image",
        setting=(
            f"{images:,} images, PNG of 1.7 MB, 1024×1024; 0.1 s ± 30 %, no limits, "
            f"{AT_ONCE} at once, best of {tries}; one client at a time, on all cores"
        ),
        columns=["client", "CPU, ms per image", "images per s"],
    )
    costs = {}
    for client, name in CLIENTS.items():
        costs[client] = cost = _cost(client, images, tries)
        report.add(name, f"{cost.cpu_ms:.2f}", f"{1000 / cost.wall_ms:.1f}")
    seen, decoded = costs["krea"], costs["aiohttp-decode"]
    unseen, journaled = costs["krea-unseen"], costs["aiohttp-journal"]
    report.claim("decoded: CPU of ours to bare", seen.cpu_ms / decoded.cpu_ms, 0.75)
    report.claim("not decoded: CPU of ours to bare", unseen.cpu_ms / journaled.cpu_ms, 2.0)
    # As its inverse, so that every limit is an upper limit.
    report.claim("decoded: seconds of ours to bare", seen.wall_ms / decoded.wall_ms, 1 / 1.3)
    report.note(
        f"A cost is that of the process with {images:,} images less that of the same process with "
        f"{FEW}, by image: so without start, imports and the last poll."
    )
    report.note(
        "The journal of the bare loop has a row for each image: committed before the POST, with "
        "the task after it, and with the sha256 once the file is there."
    )
    finish(report, options)


def _cost(client: str, images: int, tries: int) -> Cost:
    many = [_measure(client, images) for _ in range(tries)]
    few = [_measure(client, FEW) for _ in range(tries)]
    more = images - FEW
    cpu_s = min(ended.cpu_s for ended in many) - min(ended.cpu_s for ended in few)
    wall_s = min(ended.wall_s for ended in many) - min(ended.wall_s for ended in few)
    return Cost(1000 * cpu_s / more, 1000 * wall_s / more)


def _measure(client: str, images: int) -> EndedProcess:
    note_progress(f"{client}, {images:,} images")
    with BenchmarkServer.start(*SERVER) as server, TemporaryDirectory() as folder:
        command = ["--url", server.url, "--images", str(images), "--folder", folder]
        command += ["--most", str(AT_ONCE)]
        if client.startswith("krea"):
            run(["benchmarks.worker", "table", *command])
        ended = run(["benchmarks.worker", client, *command])
        if ended.output["delivered"] != images:
            raise RuntimeError(f"{ended.output} instead of {images} images")
        stored = sum(path.stat().st_size for path in Path(folder).rglob("*.png"))
        if stored != server.stats()["download_bytes"]:
            raise RuntimeError(f"{stored} bytes of {server.stats()['download_bytes']} are stored")
        return ended


if __name__ == "__main__":
    main()

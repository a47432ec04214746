"""The client's CPU per image, against the bare loops, each on one core.

    python -m benchmarks.cpu [--images N] [--quick] [--json]

The server answers at once and runs on the other core. A figure is the slope between a run of few
images and one of many, so that neither Python's imports nor what a run does once are in it: user
and system time of the whole process, all threads.
"""

from __future__ import annotations

import io
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Final

from benchmarks.harness import ONE, Report, Server, finish, note_progress, options_of, run
from benchmarks.pictures import draw

IMAGES: Final = 2_000
#: The run that is taken off: connections made, statements compiled, caches filled.
FEW: Final = 200
AT_ONCE: Final = 64
FILE_BYTES: Final = 300_000
TIMES: Final = 3

#: At most so many times the bare loops, and so much above one decode.
OF_AIOHTTP: Final = 2.5
OF_HTTPX: Final = 0.5
OF_LOOK: Final = 1.15

KINDS: Final[dict[str, tuple[str, ...]]] = {
    "bare aiohttp": ("aiohttp",),
    "bare httpx": ("httpx",),
    "ours, without a look": ("engine", "--no-look"),
    "ours, with a look": ("engine",),
}


def main() -> None:
    """Run the command."""
    add = options_of("cpu")
    add.add_argument("--images", type=int, default=0, help=f"instead of {IMAGES}")
    options = add.parse_args()
    images = options.images or (800 if options.quick else IMAGES)
    report = Report(
        "cpu",
        "Client CPU per image",
        setting=(
            f"{images:,} images less {FEW}, 1024×1024 JPEGs of {FILE_BYTES / 1e3:g} KB, no "
            f"latency, no limits, {AT_ONCE} in flight at most, single reads. Journal and images on "
            f"disk, durably; the bare loops write a plain file. Median of "
            f"{1 if options.quick else TIMES}"
        ),
        columns=["client", "CPU, ms per image", "of bare aiohttp", "of bare httpx"],
    )
    found: dict[str, list[float]] = {name: [] for name in (*KINDS, "decode")}
    with TemporaryDirectory(prefix="krea-cpu-") as folder:
        # In turn, and the files stay until the end: ext4 is slower for minutes after a removal.
        for turn in range(1 if options.quick else TIMES):
            for name, command in KINDS.items():
                note_progress(f"{name}, {turn + 1}")
                found[name].append(_slope_ms(command, images, Path(folder), f"{turn}-{name}"))
            found["decode"].append(_decode_ms())
    ms = {name: median(values) for name, values in found.items()}
    aiohttp, httpx, ours = ms["bare aiohttp"], ms["bare httpx"], ms["ours, without a look"]
    for name in KINDS:
        report.add(name, f"{ms[name]:.2f}", f"{ms[name] / aiohttp:.2f}", f"{ms[name] / httpx:.2f}")
    report.add("one decode", f"{ms['decode']:.2f}", "", "")
    report.claim("ours to bare aiohttp", ours / aiohttp, OF_AIOHTTP)
    report.claim("ours to bare httpx", ours / httpx, OF_HTTPX)
    looked = ms["ours, with a look"]
    report.claim("with a look, to without and one decode", looked / (ours + ms["decode"]), OF_LOOK)
    report.note(
        "Ours hashes every file (SHA-256), which no bare loop does: "
        f"{_hash_ms():.2f} ms of these are that alone."
    )
    finish(report, options)


def _slope_ms(command: Sequence[str], images: int, folder: Path, name: str) -> float:
    """Milliseconds of CPU for one more image."""
    cpu_s = []
    for number, count in enumerate((FEW, images)):
        with Server.start("--latency", 0, "--image-bytes", FILE_BYTES, "--no-batch") as server:
            own = folder / f"{name}-{number}"
            more = ["--url", server.url, "--images", str(count), "--folder", str(own)]
            more += ["--most", str(AT_ONCE)]
            ran = run(["benchmarks.worker", *command, *more], core=ONE)
            if ran.said["delivered"] != count:
                raise RuntimeError(f"{ran.said} instead of {count} images")
            cpu_s.append(float(ran.said["cpu_s"]))
    return 1000 * (cpu_s[1] - cpu_s[0]) / (images - FEW)


def _decode_ms() -> float:
    """What Pillow takes to decode the server's picture, in a process of its own."""
    ran = run(["benchmarks.cpu", "decode"], core=ONE)
    return float(ran.said["decode_ms"])


def _hash_ms() -> float:
    import hashlib  # noqa: PLC0415 - only here

    data = bytes(FILE_BYTES)
    began_s = time.process_time()
    for _ in range(200):
        hashlib.sha256(data)
    return 1000 * (time.process_time() - began_s) / 200


def _decode() -> None:
    from PIL import Image  # noqa: PLC0415 - only here

    data = draw((1024, 1024), FILE_BYTES, "jpeg")
    began_s = 0.0
    for number in range(110):
        if number == 10:  # warm
            began_s = time.process_time()
        with Image.open(io.BytesIO(data)) as image:
            image.load()
    print(json.dumps({"decode_ms": 1000 * (time.process_time() - began_s) / 100}))


if __name__ == "__main__":
    if sys.argv[1:] == ["decode"]:
        _decode()
    else:
        main()

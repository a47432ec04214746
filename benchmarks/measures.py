"""What measuring costs beside the decode that verification makes anyway.

python -m benchmarks.measures [--images N] [--quick] [--json]

Beside it, where they are installed, the libraries that a user would take: pdqhash or ImageHash
for the perceptual hash, OpenCV for the sharpness, NumPy for the rest. The second part measures a
partition whose figures are known already.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from argparse import Namespace
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final

from benchmarks.harness import ONE, Report, finish, note_progress, options_of, peak_bytes, run

#: Rows of the partition whose figures are known.
KNOWN: Final = 100_000

#: Measuring to decoding, PNG of 1024×1024; seconds for a partition of known figures.
SHARE: Final = 1 / 3
KNOWN_S: Final = 10.0

#: Pixels along a side, format, and bytes of about such a picture.
_PICTURES: Final = (
    (1024, "png", 1_700_000),
    (1024, "jpeg", 250_000),
    (2048, "png", 6_800_000),
    (2048, "jpeg", 1_000_000),
)
_ROUNDS: Final = 9
_CALLS: Final = 6


def main() -> None:
    """Run the command: the report, or with ``--work`` one of its processes."""
    parser = options_of("measures")
    parser.add_argument("--images", type=int, default=KNOWN, help="rows whose figures are known")
    parser.add_argument("--work", choices=["pictures", "prepare", "known"], help="do this")
    parser.add_argument("--folder", type=Path, help="for --work")
    options = parser.parse_args()
    if options.work:
        work = {"pictures": pictures, "prepare": prepare, "known": known}[options.work]
        print(json.dumps(work(options)))
        return
    if options.quick:
        options.images //= 10
    with TemporaryDirectory() as name:
        options.folder = Path(name)
        _measure(options)


def _measure(options: Namespace) -> None:
    report = Report(
        "measures",
        "Measures of a picture",
        setting=(
            "A drawn picture with noise, decoded from memory in one thread on one core. CPU ms per "
            f"picture: median of {_ROUNDS} rounds of {_CALLS} calls, the rounds of all ways in turn"
        ),
        columns=["what", "CPU, ms per image", "to the decode", "wall, s", "peak memory, MB"],
    )
    for what, ways in _do("pictures", options)["pictures"].items():
        decode = ways["decode"]
        for way, cpu_ms in ways.items():
            report.add(f"{what}: {way}", f"{cpu_ms:.2f}", f"{cpu_ms / decode:.2f}", "", "")
        if what == "1024 png":
            report.claim("measures to decode, 1024×1024 PNG", ways["measures"] / decode, SHARE)
    _do("prepare", options)
    for what in ("figures known from the run", "figures known from the last time"):
        found = _do("known", options)
        cpu_ms, wall_s = found["cpu_s"] * 1000 / options.images, found["wall_s"]
        memory = f"{found['peak_bytes'] / 1e6:.0f}"
        named = f"{what}, {options.images:,} images"
        report.add(named, f"{cpu_ms:.3f}", "", f"{wall_s:.2f}", memory)
        report.claim(named, wall_s, KNOWN_S, "s")
    missing = [name for name in ("pdqhash", "imagehash", "cv2") if find_spec(name) is None]
    if missing:
        report.note(f"Not installed, so not compared: {', '.join(missing)}.")
    report.note(
        "Verify is the whole look: checksums, decode, dimensions, flatness. Measures are PDQ hash, "
        "sharpness, brightness, contrast, entropy, main colour and border, from the decoded "
        "picture. The libraries' sums begin with the decoded picture too, and have no main colour "
        "and no border."
    )
    report.note(
        "A JPEG decodes several times faster than a PNG, so that its measures cost more beside it: "
        "the limit is held for PNG only."
    )
    finish(report, options)


def _do(work: str, options: Namespace) -> dict[str, Any]:
    note_progress(work)
    command = ["benchmarks.measures", "--work", work, "--folder", str(options.folder)]
    command += ["--images", str(options.images), *["--quick"] * options.quick]
    return run(command, core=ONE if work == "pictures" else None).said


# -- the processes --------------------------------------------------------------------------------


def pictures(options: Namespace) -> dict[str, Any]:
    """CPU milliseconds of each way, by picture."""
    from benchmarks.pictures import draw  # noqa: PLC0415 - only what is measured is imported

    found = {}
    for side, kind, file_bytes in _PICTURES:
        if options.quick and side > 1024:
            continue
        data = draw((side, side), file_bytes, kind)
        found[f"{side} {kind}"] = _in_turn(_ways(data, side), 3 if options.quick else _ROUNDS)
    return {"pictures": found}


def _ways(data: bytes, side: int) -> Mapping[str, Callable[[], object]]:
    from PIL import Image  # noqa: PLC0415 - only what is measured is imported

    from krea_dagster.curation.measures.builtin import measure  # noqa: PLC0415
    from krea_dagster.engine.storage.verify import verify_image  # noqa: PLC0415

    def decode() -> Image.Image:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            decoded: Image.Image = image
            return decoded

    picture = decode()
    ways: dict[str, Callable[[], object]] = {
        "decode": decode,
        "verify": lambda: verify_image(data, (side, side)),
        "verify and measures": lambda: verify_image(data, (side, side), seen=measure),
        "measures": lambda: measure(picture),
    }
    if find_spec("cv2") is None:
        return ways
    if find_spec("pdqhash") is not None:
        ways["pdqhash, OpenCV and NumPy"] = _by_libraries("pdqhash", picture)
        ways["the same, pdqhash at 512 pixels"] = _by_libraries("pdqhash", picture, (512, 512))
    if find_spec("imagehash") is not None:
        ways["ImageHash, OpenCV and NumPy"] = _by_libraries("imagehash", picture)
    return ways


def _by_libraries(
    name: str, picture: Any, scaled: tuple[int, int] | None = None
) -> Callable[[], object]:
    from importlib import import_module  # noqa: PLC0415 - only what is measured is imported

    import numpy as np  # noqa: PLC0415

    cv2, hashing = import_module("cv2"), import_module(name)

    def hashed(colours: Any) -> object:
        if name == "imagehash":
            return hashing.phash(picture, 16)
        if scaled:
            colours = cv2.resize(colours, scaled, interpolation=cv2.INTER_AREA)
        return hashing.compute(colours)

    def take() -> object:
        colours = np.asarray(picture.convert("RGB"))
        grey = cv2.cvtColor(colours, cv2.COLOR_RGB2GRAY)
        share = cv2.calcHist([grey], [0], None, [256], [0, 256]).ravel() / grey.size
        there = share[share > 0]
        return (
            hashed(colours),
            cv2.Laplacian(grey, cv2.CV_64F).var(),
            grey.mean(),
            grey.std(),
            -(there * np.log2(there)).sum(),
        )

    return take


def _in_turn(ways: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of a call; the first round warms up."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, way in ways.items():
            began_s = time.process_time()
            for _ in range(_CALLS):
                way()
            taken[name].append((time.process_time() - began_s) * 1000 / _CALLS)
    return {name: median(times[1:]) for name, times in taken.items()}


def prepare(options: Namespace) -> dict[str, Any]:
    """Write a manifest, and the figures that its run would have taken note of."""
    import numpy as np  # noqa: PLC0415 - only what is measured is imported
    import pyarrow as pa  # noqa: PLC0415

    from krea_dagster.curation.measures.cache import MeasureCache, MeasureWriter  # noqa: PLC0415
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415
    from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest  # noqa: PLC0415

    storage, generator = Storage(str(options.folder)), np.random.default_rng(0)
    sha256 = [hashlib.sha256(b"%d" % number).hexdigest() for number in range(options.images)]
    columns: dict[str, Any] = dict.fromkeys(MANIFEST_SCHEMA.names, [None] * len(sha256))
    columns |= {
        "prompt_id": [f"row-{number}" for number in range(len(sha256))],
        "sample": [0] * len(sha256),
        "status": ["stored"] * len(sha256),
        "image_sha256": sha256,
        "image_path": [storage.locate(f"images/{one[:2]}/{one}.png") for one in sha256],
        "width": [1024] * len(sha256),
        "height": [1024] * len(sha256),
    }
    write_manifest(storage, "a", pa.table(columns, schema=MANIFEST_SCHEMA))
    figures = generator.random((len(sha256), 6))
    with MeasureWriter(MeasureCache.builtin(storage)) as writer:
        for one, values in zip(sha256, figures.tolist(), strict=True):
            writer.add(one, (generator.bytes(32), 80, *values))
    return {}


def known(options: Namespace) -> dict[str, Any]:
    """Measure the partition; every figure is known."""
    from krea_dagster.curation.measures.measure_partitions import measure_partitions  # noqa: PLC0415
    from krea_dagster.engine.storage.storage import Storage  # noqa: PLC0415

    wall_s, cpu_s = time.perf_counter(), time.process_time()
    (measured,) = measure_partitions(Storage(str(options.folder)), ["a"])
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    assert (measured.read, len(measured.table)) == (0, options.images)
    return {"wall_s": wall_s, "cpu_s": cpu_s, "peak_bytes": peak_bytes()}


if __name__ == "__main__":
    main()

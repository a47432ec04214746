"""What verification finds of damaged files, by which of its checks, and what each check costs.

python -m benchmarks.damage [--files N] [--quick] [--json]

Files are damaged in ways that are drawn with a fixed seed. A damage that leaves every pixel as it
was is safe_cause, and is counted apart.
"""

from __future__ import annotations

import io
import json
import random
import time
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any, Final

from benchmarks.harness import ONE, Report, finish, note_progress, options_of, run

#: Damaged files of each format and kind of damage, and pixels along a side.
FILES: Final = 300
SIDE: Final = 1024

#: Format and how it is written, by name.
_FORMATS: Final[Mapping[str, tuple[str, dict[str, Any]]]] = {
    "PNG": ("PNG", {"compress_level": 6}),
    "JPEG baseline": ("JPEG", {"quality": 90}),
    "JPEG progressive": ("JPEG", {"quality": 90, "progressive": True}),
    "WebP lossy": ("WEBP", {"quality": 85}),
    "WebP lossless": ("WEBP", {"lossless": True, "quality": 20, "method": 1}),
    "AVIF": ("AVIF", {"quality": 75, "speed": 9}),
}
_DAMAGES: Final = ("byte changed", "cut", "cut, end mark added", "rest zeroed")

#: In the order in which they are asked.
_CHECKS: Final = ("header", "structure", "rows", "strict decode", "Pillow", "flatness")
_ROUNDS: Final = 15

#: EXIF's tag for a description.
_DESCRIPTION: Final = 0x010E

#: The whole look to a plain decode.
RATIO: Final = 2.5


def main() -> None:
    """Run the command: the report, or with ``--work`` its process."""
    parser = options_of("damage")
    parser.add_argument("--files", type=int, default=FILES, help="of each format and damage")
    parser.add_argument("--work", choices=list(_FORMATS), help="damage files of this format")
    options = parser.parse_args()
    if options.quick:
        options.files = min(options.files, 20)
    if options.work:
        print(json.dumps(_work(options.work, options.files)))
        return
    _measure(options)


def _measure(options: Namespace) -> None:
    report = Report(
        "damage",
        "Damaged files",
        setting=(
            f"A drawn picture of {SIDE}×{SIDE} pixels with noise and 2 KB of EXIF; {options.files} "
            "files of each damage, drawn with a fixed seed. CPU ms per whole file: median of "
            f"{_ROUNDS} calls on one core"
        ),
        columns=["what", "found", *(f"by {check}" for check in _CHECKS), "missed", "safe_cause"],
    )
    costs, ratios, missed = [], [], 0
    for name in _FORMATS:
        note_progress(name)
        work = ["benchmarks.damage", "--work", name, "--files", str(options.files)]
        said = run(work, core=ONE).said
        for damage, counted in said["found"].items():
            found = sum(counted.get(check, 0) for check in _CHECKS)
            missed += counted.get("missed", 0) * damage.startswith("cut")
            harmful = found + counted.get("missed", 0)
            cells = [counted.get(check, 0) or "" for check in (*_CHECKS, "missed", "safe_cause")]
            report.add(f"{name}, {damage}", f"{found / max(1, harmful):.1%}", *cells)
        cost = said["cost_ms"]
        ratios.append(cost["look"] / cost["Pillow"])
        cells = [f"{cost[check]:.2f} ms" if check in cost else "" for check in _CHECKS]
        costs.append((f"{name}, {said['bytes']:,} bytes", f"{cost['look']:.2f} ms", *cells, "", ""))
    for row in costs:
        report.add(*row)
    report.claim("cut files that are missed", missed, 0)
    report.claim("the whole look to a plain decode, in any format", max(ratios), RATIO)
    report.note(
        "Found is the share of the files whose pixels the damage changed, or that were refused. "
        "Missed files decode, to other pixels; safe_cause ones to the same. The last rows are what "
        "each check takes of a whole file (the rows, the strict decode and flatness with what goes "
        "before them), and under found the whole look."
    )
    report.note(
        "An end mark is that of JPEG. WebP and AVIF hold no checksum: of their data only what does "
        "not decode is found. Zeros to the end of a WebP are found by its EXIF, which comes last: "
        "without it nine of ten are missed in a lossy file, and all in a lossless one."
    )
    finish(report, options)


def _work(name: str, files: int) -> dict[str, Any]:
    """Damage files of a format, and count which check finds each; and what the checks cost."""
    from krea_dagster.engine.storage.verify import verify_image  # noqa: PLC0415 - only what is measured

    kind, options = _FORMATS[name]
    whole = _file(kind, options)
    pixels = _decoded(whole).tobytes()
    checks = _checks(kind)
    for check in checks.values():
        check(whole)
    found = {}
    for damage in _DAMAGES:
        if damage == "cut, end mark added" and kind != "JPEG":
            continue
        source = random.Random(f"{name} {damage}")
        files_of = (_damaged(whole, damage, source) for _ in range(files))
        found[damage] = Counter(_verdict(data, checks, pixels) for data in files_of)
    checks["look"] = lambda data: verify_image(data, (SIDE, SIDE))
    cost = {check: _cpu_ms(call, whole) for check, call in checks.items()}
    return {"bytes": len(whole), "found": found, "cost_ms": cost}


def _file(kind: str, options: Mapping[str, Any]) -> bytes:
    import numpy as np  # noqa: PLC0415 - only the process that works needs it
    from PIL import Image  # noqa: PLC0415

    place = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    waves = [np.sin(9 * place[0] + k) + np.cos(7 * place[1] - 2 * k) for k in range(3)]
    noise = np.random.default_rng(0).normal(0, 4, (SIDE, SIDE, 3))
    colours = np.clip(128 + 50 * np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)
    target = io.BytesIO()
    exif = Image.Exif()
    exif[_DESCRIPTION] = "A harbour at dawn, in the manner of a woodcut. " * 40
    Image.fromarray(colours).save(target, kind, exif=exif, **options)
    return target.getvalue()


def _damaged(whole: bytes, damage: str, source: random.Random) -> bytes:
    place = source.randrange(1, len(whole))
    match damage:
        case "byte changed":
            changed = bytes([whole[place] ^ source.randrange(1, 256)])
            return whole[:place] + changed + whole[place + 1 :]
        case "cut":
            return whole[:place]
        case "cut, end mark added":
            return whole[: min(place, len(whole) - 3)] + b"\xff\xd9"
        case _:
            return whole[:place] + bytes(len(whole) - place)


def _checks(kind: str) -> dict[str, Callable[[bytes], object]]:
    """The checks that a format has, in the order in which ``verify_image`` asks them."""
    from krea_dagster.engine.storage.verify import verify_image  # noqa: PLC0415 - only what is measured
    from krea_dagster.engine.storage.verify_jpeg import check_jpeg, end_of_jpeg  # noqa: PLC0415
    from krea_dagster.engine.storage.verify_png import check_png, chunks_of_png  # noqa: PLC0415
    from krea_dagster.engine.storage.verify_webp import check_webp  # noqa: PLC0415

    own: dict[str, dict[str, Callable[[bytes], object]]] = {
        "PNG": {"structure": lambda data: list(chunks_of_png(data)), "rows": check_png},
        "JPEG": {"structure": end_of_jpeg, "strict decode": check_jpeg},
        "WEBP": {"structure": check_webp},
    }
    return {
        "header": lambda data: verify_image(data, (SIDE, SIDE), decode=False),
        **own.get(kind, {}),
        "Pillow": _decoded,
        "flatness": _refuse_flat,
    }


def _verdict(data: bytes, checks: Mapping[str, Callable[[bytes], object]], pixels: bytes) -> str:
    from krea_dagster.engine.storage.verify import DAMAGED, verify_image  # noqa: PLC0415 - only what is measured
    from krea_dagster.errors import DownloadError  # noqa: PLC0415

    found = ""
    for name, check in checks.items():
        try:
            check(data)
        except (DownloadError, *DAMAGED):
            found = name
            break
    try:
        verify_image(data, (SIDE, SIDE))
    except DownloadError:
        assert found, "the look found what no check of it does"
        return found
    assert not found, f"the look did not ask: {found}"
    return "safe_cause" if _decoded(data).tobytes() == pixels else "missed"


def _decoded(data: bytes) -> Any:
    from PIL import Image  # noqa: PLC0415 - only what is measured is imported

    with Image.open(io.BytesIO(data)) as image:
        image.load()
        return image


def _refuse_flat(data: bytes) -> None:
    from krea_dagster.engine.storage.verify import is_flat  # noqa: PLC0415 - only what is measured
    from krea_dagster.errors import NoUsableBody  # noqa: PLC0415

    if is_flat(_decoded(data)):
        raise NoUsableBody("flat")


def _cpu_ms(call: Callable[[bytes], object], data: bytes) -> float:
    taken = []
    for _ in range(_ROUNDS + 1):
        began_s = time.process_time()
        call(data)
        taken.append((time.process_time() - began_s) * 1000)
    return median(taken[1:])


if __name__ == "__main__":
    main()

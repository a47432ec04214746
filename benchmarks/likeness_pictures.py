"""Near-duplicates among real pictures: what is found of each kind of change, at each limit.

python -m benchmarks.likeness_pictures [--pictures N] [--quick] [--json]

Pictures are drawn, half by the emulator and half as soft fields of colour with shapes; each is
changed in each way, and original and changed one are hashed as ``image_measures`` does it. Wrong
are pairs of different originals within the limit, all of them compared.
"""

from __future__ import annotations

import io
import os
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from benchmarks.harness import Report, finish, note_progress, options_of
from krea_dagster.curation.measures.builtin import to_grey_or_rgb
from krea_dagster.curation.measures.pdq import LEAST_QUALITY, NEAR_BITS, perceptual_hash
from krea_dagster.curation.similarity.multi_index_hash import words_of
from krea_dagster.emulator.render import render

PICTURES: Final = 500
LIMITS: Final = (8, 15, 23, 31, 39, 47)
#: As EvoLink delivers at 1K.
_SIDE: Final = 1024
_WORDS: Final = ("harbor", "dawn", "kite", "heron", "forest", "tower", "bridge", "cellist", "lamp")

_Hashes = npt.NDArray[np.uint8]
Change = Callable[[Image.Image, np.random.Generator], Image.Image]


def main() -> None:
    """Run the command."""
    parser = options_of("likeness_pictures")
    parser.add_argument("--pictures", type=int, default=PICTURES, help="originals")
    options = parser.parse_args()
    if options.quick:
        options.pictures //= 10
    _measure(options)


def _measure(options: Namespace) -> None:
    report = Report(
        "likeness_pictures",
        f"{options.pictures:,} pictures, each changed in {len(CHANGES)} ways: share found by limit",
        setting=(
            f"{_SIDE}×{_SIDE} pixels; even numbers by the emulator, odd ones fields of colour with "
            "shapes. PDQ by krea_dagster.curation. A change is found where its hash lies within "
            "so many bits of its original's."
        ),
        columns=["change", *(f"≤ {limit} bits" for limit in LIMITS), "median bits"],
    )
    note_progress(f"{options.pictures:,} pictures")
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        found = list(pool.map(hashes_of, range(options.pictures), chunksize=16))
    hashes = np.array([[bits for bits, _ in one] for one in found], np.uint8)
    quality = np.array([[number for _, number in one] for one in found])
    usable = quality[:, 0] >= LEAST_QUALITY
    originals = hashes[usable, 0]
    for at, name in enumerate(CHANGES, 1):
        both = usable & (quality[:, at] >= LEAST_QUALITY)
        bits = _differ(hashes[both, 0], hashes[both, at])
        shares = [f"{(bits <= limit).mean():.4f}" for limit in LIMITS]
        report.add(name, *shares, f"{np.median(bits):g}")
        if name in MUST_FIND:
            missed = float((bits > NEAR_BITS).mean())
            report.claim(f"{name}, not found at {NEAR_BITS} bits", missed, MUST_FIND[name])
    wrong = _pairs_within(originals)
    pairs = len(originals) * (len(originals) - 1) // 2
    report.add("wrong: pairs of different originals", *(f"{one:,}" for one in wrong), "–")
    report.claim(
        f"wrong pairs at {NEAR_BITS} bits, in a million",
        wrong[LIMITS.index(NEAR_BITS)] / pairs * 1e6,
        1,
    )
    skies = [_hash(sky(number)) for number in range(200)]
    near = _pairs_within(np.array([bits for bits, _ in skies]))[LIMITS.index(NEAR_BITS)]
    clear = [one for _, one in skies]
    report.note(
        f"{pairs:,} pairs of different originals. {int((~usable).sum())} originals have a quality "
        f"below {LEAST_QUALITY} and are not compared."
    )
    report.note(
        f"200 nearly flat skies: quality {min(clear)} to {max(clear)}; {near:,} of "
        f"{199 * 100:,} pairs within {NEAR_BITS} bits, were they compared."
    )
    report.note(
        "The index compares "
        f"{_candidates(originals):.1f} times as many pairs of these as of even, independent bits."
    )
    share = np.unpackbits(originals, axis=1).mean(axis=0)
    report.note(
        f"Share of ones by bit, over the originals: {share.min():.2f} to {share.max():.2f}, "
        f"deviation {share.std():.2f}."
    )
    finish(report, options)


def _differ(some: _Hashes, others: _Hashes) -> npt.NDArray[np.int64]:
    return np.asarray(np.bitwise_count(some ^ others).sum(axis=1), np.int64)


def _pairs_within(hashes: _Hashes) -> list[int]:
    """How many pairs lie within each limit; all are compared."""
    counts = np.zeros(257, np.int64)
    for at in range(len(hashes) - 1):
        counts += np.bincount(_differ(hashes[at + 1 :], hashes[at : at + 1]), minlength=257)
    return [int(counts[: limit + 1].sum()) for limit in LIMITS]


def _candidates(hashes: _Hashes) -> float:
    """How often two pictures agree in a piece of the index but for a bit, to what chance gives."""
    keys = words_of(hashes).view(np.uint16).reshape(-1, 16)
    found = sum(
        int((np.bitwise_count(keys[at + 1 :] ^ keys[at]) <= 1).sum()) for at in range(len(keys) - 1)
    )
    pairs = len(keys) * (len(keys) - 1) / 2
    return found / (pairs * 16 * 17 / 65_536)


# -- pictures -------------------------------------------------------------------------------------


def hashes_of(number: int) -> list[tuple[Any, int]]:
    """The hash and quality of a picture, and of each change of it."""
    drawn = np.random.default_rng(number)
    image = original(number)
    pictures = [image, *(change(image, drawn) for change in CHANGES.values())]
    return [_hash(one) for one in pictures]


def _hash(image: Image.Image) -> tuple[_Hashes, int]:
    """As measures.measure takes it, without the other figures."""
    bits, quality = perceptual_hash(np.asarray(to_grey_or_rgb(image).convert("L")))
    return np.frombuffer(bits, np.uint8), quality


def original(number: int) -> Image.Image:
    """A picture, always the same one for a number."""
    drawn = np.random.default_rng(10_000_000 + number)
    if number % 2 == 0:
        prompt = " ".join(drawn.choice(_WORDS, 8))
        return render(prompt, int(drawn.integers(1, 1_048_577)), _SIDE, _SIDE)
    cells = drawn.integers(0, 256, (int(drawn.integers(3, 9)), int(drawn.integers(3, 9)), 3))
    image = Image.fromarray(cells.astype(np.uint8)).resize((_SIDE, _SIDE), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(int(drawn.integers(3, 12))):
        left, top = drawn.integers(0, _SIDE, 2).tolist()
        width, height = drawn.integers(_SIDE // 20, _SIDE // 3, 2).tolist()
        fill = tuple(drawn.integers(0, 256, 3).tolist())
        shape = draw.ellipse if drawn.random() < 0.5 else draw.rectangle
        shape((left, top, left + width, top + height), fill=fill)
    return image.filter(ImageFilter.GaussianBlur(1))


def sky(number: int) -> Image.Image:
    """A nearly flat picture: from above to below a little lighter, more so on one side."""
    drawn = np.random.default_rng(number)
    ramp = np.linspace(0, drawn.uniform(6, 30), _SIDE)[:, None] + drawn.uniform(80, 180)
    return Image.fromarray((ramp + np.linspace(0, drawn.uniform(1, 9), _SIDE)).astype(np.uint8))


def _saved(image_format: str, quality: int, image: Image.Image, _: object) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, image_format, quality=quality)
    return Image.open(buffer)


def _resized(share: float, image: Image.Image, _: object) -> Image.Image:
    return image.resize((round(_SIDE * share),) * 2, Image.Resampling.LANCZOS)


def _cropped(share: float, image: Image.Image, drawn: np.random.Generator) -> Image.Image:
    """Without so much of the width and of the height, at a random place."""
    left, top = (int(drawn.integers(0, round(_SIDE * share) + 1)) for _ in range(2))
    side = round(_SIDE * (1 - share))
    return image.crop((left, top, left + side, top + side))


def _brighter(factor: float, image: Image.Image, _: object) -> Image.Image:
    return ImageEnhance.Brightness(image).enhance(factor)


def _contrasted(factor: float, image: Image.Image, _: object) -> Image.Image:
    return ImageEnhance.Contrast(image).enhance(factor)


def _noisy(deviation: float, image: Image.Image, drawn: np.random.Generator) -> Image.Image:
    noise = drawn.normal(0, deviation, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


CHANGES: Final[dict[str, Change]] = {
    "JPEG, quality 85": partial(_saved, "JPEG", 85),
    "JPEG, quality 30": partial(_saved, "JPEG", 30),
    "WebP, quality 60": partial(_saved, "WEBP", 60),
    "resized to 25 %": partial(_resized, 0.25),
    "resized to 50 %": partial(_resized, 0.5),
    "resized to 200 %": partial(_resized, 2.0),
    "cropped by 2 %": partial(_cropped, 0.02),
    "cropped by 3 %": partial(_cropped, 0.03),
    "cropped by 5 %": partial(_cropped, 0.05),
    "brightness + 15 %": partial(_brighter, 1.15),
    "brightness − 30 %": partial(_brighter, 0.7),
    "contrast + 25 %": partial(_contrasted, 1.25),
    "noise, deviation 8 of 255": partial(_noisy, 8.0),
    "blurred, 2 pixels": lambda image, _: image.filter(ImageFilter.GaussianBlur(2)),
    "mirrored": lambda image, _: ImageOps.mirror(image),
}

#: The share of these that may be missed at the published limit.
MUST_FIND: Final = {
    "JPEG, quality 85": 0.001,
    "JPEG, quality 30": 0.01,
    "WebP, quality 60": 0.001,
    "resized to 50 %": 0.001,
    "resized to 200 %": 0.001,
    "noise, deviation 8 of 255": 0.01,
}

if __name__ == "__main__":
    main()

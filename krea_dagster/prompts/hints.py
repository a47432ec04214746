"""What a cell that cannot be used probably means. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from typing import Any, Final

import numpy as np

from krea_dagster.models import QUALITIES, SEED_MAX, SIZES

_TWO_NUMBERS: Final = re.compile(r"\s*([0-9]{1,6})\s*[x×*:/,]\s*([0-9]{1,6})\s*", re.IGNORECASE)
#: Moduli that are tried; each takes a sort of all seeds.
_TRIED: Final = 200


def size_hint(value: Any) -> str:
    """Return the nearest size of a width and a height, or of another ratio."""
    found = _TWO_NUMBERS.fullmatch(value) if isinstance(value, str) else None
    if found is None or not int(found[1]) or not int(found[2]):
        return ""
    shape = math.log(int(found[1]) / int(found[2]))
    ratios = {size: math.log(math.prod(_parts(size))) for size in SIZES}
    nearest = min(SIZES, key=lambda size: abs(ratios[size] - shape))
    is_same = math.isclose(ratios[nearest], shape)
    return f"{value.strip()} is {nearest}" if is_same else f"the nearest is {nearest}"


def quality_hint(value: Any) -> str:
    """Return the quality of another case, or with blanks."""
    meant = value.strip().upper() if isinstance(value, str) else ""
    return f"write {meant}" if meant in QUALITIES else ""


def seeds_hint(seeds: Iterable[int]) -> str:
    """Return how seeds of which some are too large are brought into the range, still different."""
    distinct = {seed for seed in seeds if 0 < seed < 2**64}
    if max(distinct, default=0) <= SEED_MAX:
        return ""
    if (modulus := _modulus(distinct)) is None:
        return (
            f"seeds above {SEED_MAX}: no remainder keeps these {len(distinct):,} seeds different. "
            "Leave seed empty, and keep the old one in a column of another name."
        )
    return (
        f"seeds above {SEED_MAX}: (seed - 1) % {modulus} + 1 is in the range for all of these "
        f"{len(distinct):,} seeds, and keeps them different."
    )


def _modulus(seeds: set[int]) -> int | None:
    numbers = np.fromiter(seeds, np.uint64, len(seeds)) - np.uint64(1)
    for modulus in range(SEED_MAX, max(SEED_MAX - _TRIED, len(seeds) - 1), -1):
        if len(np.unique(numbers % np.uint64(modulus))) == len(numbers):
            return modulus
    return None


def _parts(size: str) -> tuple[float, float]:
    width, height = size.split(":")
    return int(width), 1 / int(height)

"""PDQ: the 256-bit perceptual hash of a picture, and how much structure it stands on. Pure.

The algorithm is the published one of Meta's ThreatExchange (pdq/ in its repository): luminance, a
tent filter down to 64×64, the 16×16 lowest frequencies of a cosine transform without the
constant one, and a bit for each that lies above their median. Filter and transform are linear and
work on rows and columns alike, so both are done here as products with small matrices, which
are kept for each length of a side. Grey is in whole levels, so that a few bits of pictures below
some 500 pixels a side may be other than the reference's; larger ones that were tried had the same.

The same picture at another size, or compressed anew, differs in a few of the 256 bits; 31 or
fewer count as the same picture by that project's advice, and quality below 50 as too little
structure to compare by.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

#: Bytes of a hash.
HASH_BYTES: Final = 32

#: Hashes that differ in at most so many bits count as the same picture.
NEAR_BITS: Final = 31

#: Below this quality a hash says too little to compare by.
LEAST_QUALITY: Final = 50

_SIDE: Final = 64
_FREQUENCIES: Final = 16
#: Pictures with a shorter side have no hash: all bits are 0, and so is the quality.
_LEAST_SIDE: Final = 5

Grey = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def perceptual_hash(grey: Grey) -> tuple[bytes, int]:
    """Return the hash of a picture in grey, of rows × columns, and its quality, 0 to 100.

    The first byte holds what the usual hex text begins with.
    """
    if min(grey.shape) < _LEAST_SIDE:
        return bytes(HASH_BYTES), 0
    small = _small(grey)
    waves = _transform()
    found = waves @ small @ waves.T
    # The lower of the two middle values: with 256 of them that is what the published form takes.
    median = np.partition(found, found.size // 2 - 1, axis=None)[found.size // 2 - 1]
    bits = (found > median).ravel()
    return np.packbits(bits[::-1]).tobytes(), _quality(small)


def _small(grey: Grey) -> _Floats:
    """The picture after the tent filter, at the middles of 64×64 cells."""
    rows, columns = grey.shape
    lines = np.empty((_SIDE, columns), np.float32)
    for at, (first, weights) in enumerate(_tents(rows)):
        np.dot(weights, grey[first : first + len(weights)].astype(np.float32), out=lines[at])
    small = np.empty((_SIDE, _SIDE), np.float32)
    for at, (first, weights) in enumerate(_tents(columns)):
        small[:, at] = lines[:, first : first + len(weights)] @ weights
    return small


@lru_cache(maxsize=64)
def _tents(length: int) -> tuple[tuple[int, _Floats], ...]:
    """For each of 64 cells along a side: the first pixel that it takes, and the pixels' weights.

    Two running means, each of a 128th of the side, rounded up; at the ends over what is there.
    """
    window = -(-length // (2 * _SIDE))
    ahead = (window + 2) // 2 - 1
    behind = window - 1 - ahead

    def mean(at: int) -> range:
        return range(max(0, at - behind), min(length, at + ahead + 1))

    tents = []
    for cell in range(_SIDE):
        middle = int((cell + 0.5) * length / _SIDE)
        first = mean(mean(middle)[0])[0]
        weights = np.zeros(mean(mean(middle)[-1])[-1] + 1 - first)
        for near in mean(middle):
            far = mean(near)
            weights[far[0] - first : far[-1] + 1 - first] += 1 / (len(mean(middle)) * len(far))
        tents.append((first, weights.astype(np.float32)))
    return tuple(tents)


@lru_cache(maxsize=1)
def _transform() -> _Floats:
    """The cosine transform from 64 values to its frequencies 1 to 16."""
    frequency = np.arange(1, _FREQUENCIES + 1)[:, None]
    place = 2 * np.arange(_SIDE)[None, :] + 1
    waves = np.sqrt(2 / _SIDE) * np.cos(np.pi / (2 * _SIDE) * frequency * place)
    return np.asarray(waves, np.float32)


def _quality(small: _Floats) -> int:
    """How much structure there is, from the steps between neighbouring cells that are large."""
    steps = 0.0
    for axis in (0, 1):
        hundredths = np.trunc(np.diff(small, axis=axis) * 100 / 255)
        steps += float(np.abs(hundredths).sum())
    return min(100, int(steps) // 90)

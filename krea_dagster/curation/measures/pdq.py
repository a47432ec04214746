"""PDQ: the 256-bit perceptual hash of an image, and its quality. Pure.

The algorithm of Meta's ThreatExchange (pdq/ in its repository): luminance, a tent filter down to
64×64, the 16×16 lowest frequencies of a cosine transform without the constant one, and one bit per
frequency above their median. Filter and transform are linear and separable, so both are products
with small matrices, cached per side length. Grey has whole levels, so images below about 500 pixels
a side may differ from the reference in a few bits; the larger ones that were tried did not.

The same image resized or recompressed differs in a few of the 256 bits. That project recommends
treating up to 31 bits as the same image, and a quality below 50 as too little structure.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Final

import numpy as np
import numpy.typing as npt

#: Bytes of a hash.
HASH_BYTES: Final = 32

#: Hashes that differ in at most this many bits show the same image.
NEAR_BITS: Final = 31

#: Below this quality a hash is not compared.
LEAST_QUALITY: Final = 50

_SIDE: Final = 64
_FREQUENCIES: Final = 16
#: Images with a shorter side have no hash: all bits and the quality are 0.
_LEAST_SIDE: Final = 5

Grey = npt.NDArray[np.uint8]
_Floats = npt.NDArray[np.float32]


def perceptual_hash(grey: Grey) -> tuple[bytes, int]:
    """Return the hash of a grey image (rows × columns) and its quality, 0 to 100.

    The bytes are in the order of the usual hexadecimal text.
    """
    if min(grey.shape) < _LEAST_SIDE:
        return bytes(HASH_BYTES), 0
    small = _small(grey)
    waves = _transform()
    found = waves @ small @ waves.T
    # The lower of the two middle values, as in the published algorithm.
    median = np.partition(found, found.size // 2 - 1, axis=None)[found.size // 2 - 1]
    bits = (found > median).ravel()
    return np.packbits(bits[::-1]).tobytes(), _quality(small)


def _small(grey: Grey) -> _Floats:
    """Return the image after the tent filter, at the centres of 64×64 cells."""
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
    """Return for each of 64 cells along a side its first pixel and the pixels' weights.

    Two running means, each over a 128th of the side, rounded up; shorter at the ends.
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
    """Return the cosine transform of 64 values to frequencies 1 to 16."""
    frequency = np.arange(1, _FREQUENCIES + 1)[:, None]
    place = 2 * np.arange(_SIDE)[None, :] + 1
    waves = np.sqrt(2 / _SIDE) * np.cos(np.pi / (2 * _SIDE) * frequency * place)
    return np.asarray(waves, np.float32)


def _quality(small: _Floats) -> int:
    """Return the amount of structure, from the large steps between neighbouring cells."""
    steps = 0.0
    for axis in (0, 1):
        hundredths = np.trunc(np.diff(small, axis=axis) * 100 / 255)
        steps += float(np.abs(hundredths).sum())
    return min(100, int(steps) // 90)

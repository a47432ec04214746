"""Decides which images are the same picture, and which of them to keep. Pure.

- **exact**: one file under several request keys, so bought more than once. Rows of the prompt
  table that ask for the very same thing share one request key and one purchase: that is the
  table's wish, and no duplicate.
- **near**: two files whose perceptual hashes differ in at most so many bits.

**The one to keep** is the first by: verdict (keep, then none or flag, then reject), sharpness
(largest; not measured last), when it was stored (earliest), request key (smallest). That is an
order of all images, so that the result depends neither on the order of rows nor on chance.

**Clusters are stars, not chains**: in that order, an image that is in no cluster yet begins one,
and takes all later ones in none that are within the limit of it. Whatever is in a cluster is thus
that near to the one that is kept; A like B and B like C does not put A beside C.

**Too little structure**: the hashes of nearly flat pictures are made of noise, and all flat ones
have the same. They would put together what is not alike, in clusters without end. Below a quality
of 50 (of PDQ) images are compared by sha256 only.

What 31 bits find, by benchmarks.likeness_pictures: files compressed anew, resized by half or to
twice the size, blurred a little, with noise, brighter or darker; of pictures cropped by 2 % a
third, by 5 % none. 47 bits find most that are cropped by 2 %.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from krea_dagster.curation.similarity.multi_index_hash import find_stars
from krea_dagster.digests import Digests, Mask, find_sorted

Places = npt.NDArray[np.int64]

#: Verdicts by how much they speak for keeping an image.
_VERDICTS: Final[Mapping[str, int]] = {"keep": 0, "reject": 2}
_NO_VERDICT: Final = 1
#: When nothing is known of when it was stored: after all others.
NEVER: Final = np.iinfo(np.int64).max


@dataclass(frozen=True)
class Purchases:
    """Pictures that were bought, a line for each: image and request, and when it was stored.

    ``sha256`` and ``request_key`` are n × 32 bytes, ``stored_at`` microseconds since 1970, or
    ``NEVER``. Lines may repeat one another and stand in any order.
    """

    sha256: Digests
    request_key: Digests
    stored_at: Places


@dataclass(frozen=True)
class ImageHashes:
    """What is known of images: their perceptual hash, its quality, and their sharpness.

    ``sharpness`` is NaN where it is not known.
    """

    sha256: Digests
    perceptual_hash: Digests
    quality: npt.NDArray[np.int32]
    sharpness: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ImageClusters:
    """Which cluster each bought image is in. All arrays are sorted by ``sha256``.

    ``centre`` is the place of the image that is kept, its own where it is alone; ``name`` the
    place of the cluster's smallest sha256. ``purchases`` is how many request keys have brought
    the file, and ``best_key`` the one of them to keep. ``clustered`` are the images in a cluster
    of two or more purchases. ``pairs`` were compared; ``compared`` says of which images there was
    a hash to compare, ``measured`` which have one at all.
    """

    sha256: Digests
    centre: Places
    name: Places
    distance: npt.NDArray[np.int32]
    purchases: Places
    best_key: Digests
    clustered: Mask
    measured: Mask
    compared: Mask
    pairs: int

    def find(self, sha256: Digests) -> Places:
        """The places of images, -1 where they are not among these."""
        return find_sorted(_words(self.sha256), _words(sha256))


def find_clusters(
    purchases: Iterable[Purchases],
    measured: Iterable[ImageHashes],
    verdicts: Mapping[str, str],
    *,
    most_bits: int,
    least_quality: int,
    threads: int | None = None,
) -> ImageClusters:
    """Find the clusters, as this file's head says. ``verdicts`` are by sha256, in hexadecimal.

    ``purchases`` and ``measured`` are given in parts, so that none need be held twice. Raises
    ValueError for a number of bits that cannot be compared (``find_stars``).
    """
    lines = _Lines.of(*_together(purchases))
    words = lines.images
    hashes, quality, sharpness, known = _measures(words, measured)
    verdict = np.full(len(words), _NO_VERDICT, np.int8)
    if verdicts:
        digests = np.frombuffer(bytes.fromhex("".join(verdicts)), np.uint8).reshape(-1, 32)
        places = find_sorted(words, _words(digests))
        ranks = np.array([_VERDICTS.get(one, _NO_VERDICT) for one in verdicts.values()], np.int8)
        verdict[places[places >= 0]] = ranks[places >= 0]
    blunt = np.where(np.isnan(sharpness), np.inf, -sharpness)
    preferred = np.lexsort((*lines.best_key.T[::-1], lines.stored_at, blunt, verdict))

    compared = known & (quality >= least_quality)
    chosen = preferred[compared[preferred]]
    stars = find_stars(hashes[chosen], most_bits, threads=threads)
    centre = np.arange(len(words))
    centre[chosen] = chosen[stars.centre]
    distance = np.zeros(len(words), np.int32)
    distance[chosen] = stars.distance

    name = np.arange(len(words))
    np.minimum.at(name, centre, np.arange(len(words)))
    sizes = np.bincount(centre, weights=lines.purchases, minlength=len(words))
    return ImageClusters(
        sha256=_bytes(words),
        centre=centre,
        name=name[centre],
        distance=distance,
        purchases=lines.purchases,
        best_key=_bytes(lines.best_key),
        clustered=np.asarray(sizes[centre] > 1),
        measured=known,
        compared=compared,
        pairs=stars.pairs,
    )


@dataclass(frozen=True)
class _Lines:
    """Distinct images, sorted, and what their purchases say: all as numbers of 8 bytes."""

    images: npt.NDArray[np.uint64]
    purchases: Places
    best_key: npt.NDArray[np.uint64]
    stored_at: Places

    @classmethod
    def of(
        cls, images: npt.NDArray[np.uint64], keys: npt.NDArray[np.uint64], stored_at: Places
    ) -> _Lines:
        # The best purchase of each image comes first: earliest stored, then the smallest key.
        order = np.lexsort((*keys.T[::-1], stored_at, *images.T[::-1]))
        images, keys, stored_at = images[order], keys[order], stored_at[order]
        first = _begins(images)
        which = np.cumsum(first) - 1
        # Lines that repeat a purchase stand side by side, unless they differ in their time.
        repeated = ~_begins(keys) & ~first
        if (~first & ~repeated).any():
            again = np.lexsort((*keys.T[::-1], which))
            new = np.zeros(len(keys), np.bool_)
            new[again] = _begins(keys[again]) | _begins(which[again][:, None])
            repeated = ~new
        count = np.bincount(which[~repeated], minlength=int(first.sum()))
        return cls(images[first], count, keys[first], stored_at[first])


def _together(
    parts: Iterable[Purchases],
) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64], Places]:
    images, keys = [np.empty((0, 4), np.uint64)], [np.empty((0, 4), np.uint64)]
    stored_at = [np.empty(0, np.int64)]
    for part in parts:
        images.append(_words(part.sha256))
        keys.append(_words(part.request_key))
        stored_at.append(part.stored_at)
    return np.concatenate(images), np.concatenate(keys), np.concatenate(stored_at)


def _measures(
    words: npt.NDArray[np.uint64], measured: Iterable[ImageHashes]
) -> tuple[Digests, npt.NDArray[np.int32], npt.NDArray[np.float64], Mask]:
    """What is known of these images; an image that was measured twice has the same figures."""
    hashes = np.zeros((len(words), 32), np.uint8)
    quality = np.zeros(len(words), np.int32)
    sharpness = np.full(len(words), np.nan)
    known = np.zeros(len(words), np.bool_)
    for part in measured:
        places = find_sorted(words, _words(part.sha256))
        here = places >= 0
        places = places[here]
        hashes[places] = part.perceptual_hash[here]
        quality[places] = part.quality[here]
        sharpness[places] = part.sharpness[here]
        known[places] = True
    return hashes, quality, sharpness, known


def _words(digests: Digests) -> npt.NDArray[np.uint64]:
    """Hashes as four numbers each, which are sorted as the hashes' hexadecimal text is."""
    return np.ascontiguousarray(digests).view(">u8").reshape(-1, 4).astype(np.uint64)


def _bytes(words: npt.NDArray[np.uint64]) -> Digests:
    return words.astype(">u8").view(np.uint8).reshape(-1, 32)


def _begins(rows: npt.NDArray[Any]) -> Mask:
    """Which rows differ from the one before."""
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return begins

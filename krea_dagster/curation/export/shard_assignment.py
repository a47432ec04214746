"""Assigns images to shards. Pure.

Shards are numbered from 0 without gaps. An image stays in its shard while it is in the export. New
images first fill the shards that have lost some, which are rewritten anyway, then the last shard,
then new ones. A shard that has lost all images takes those of the last shard, so that no number is
missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def place(
    old: Numbers, sizes: Numbers, lost: frozenset[int], *, most_images: int, most_bytes: int
) -> Numbers:
    """Return the shard of each image of a split; new ones are assigned in this order.

    ``old`` is the previous shard of each, -1 for a new one; ``sizes`` are bytes; ``lost`` are the
    shards that have lost images since.
    """
    shards: Numbers = np.array(old, np.int64)
    _close_gaps(shards)
    count = int(shards.max(initial=-1)) + 1
    kept = shards >= 0
    images = np.bincount(shards[kept], minlength=count).astype(np.int64).tolist()
    held = np.bincount(shards[kept], sizes[kept], minlength=count).astype(np.int64).tolist()
    open_ones = sorted({one for one in lost if one < count} | ({count - 1} if count else set()))
    for row in np.flatnonzero(~kept):
        size = int(sizes[row])
        while open_ones:
            shard = open_ones[0]
            if images[shard] < most_images and held[shard] + size <= most_bytes:
                break
            open_ones.pop(0)
        else:
            shard = len(images)
            images.append(0)
            held.append(0)
            open_ones = [shard]
        shards[row] = shard
        images[shard] += 1
        held[shard] += size
    return shards


def _close_gaps(shards: Numbers) -> None:
    """Give unused numbers to the images of the last shards."""
    present = np.unique(shards[shards >= 0]).tolist()
    gaps = sorted(set(range(len(present))) - set(present))
    for gap, last in zip(gaps, reversed(present), strict=False):
        shards[shards == last] = gap

"""Which shard an image is in: where it was, and for a new one the last shard or a further one.

Pure. Shards are numbered from 0 without gaps. An image stays in its shard as long as it is in the
export. New images fill the shards that have lost some, for these are written again anyway, then
the last one, and then new ones. A shard that has lost all takes over those of the last shard, so
that no number is missing.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Numbers = npt.NDArray[np.int64]


def place(
    old: Numbers, sizes: Numbers, lost: frozenset[int], *, most_images: int, most_bytes: int
) -> Numbers:
    """Return the shard of each image of a split, in the order in which new ones are placed.

    ``old`` says where each was, -1 for a new one; ``sizes`` are bytes; ``lost`` are the shards
    that have lost images since.
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
    """Give the numbers that nobody has to the images of the last shards."""
    present = np.unique(shards[shards >= 0]).tolist()
    gaps = sorted(set(range(len(present))) - set(present))
    for gap, last in zip(gaps, reversed(present), strict=False):
        shards[shards == last] = gap

"""How to find out which of some images an object store has: by listing, or one by one. Pure.

An image's name begins with its request key, a hash, so images are spread evenly over all
beginnings of keys. A listing of a beginning costs as much as its images, and a question about one
image as much as a listing of ``_OBJECTS_PER_QUESTION``. So what a run asks for depends on what it
wants, and not on how much the store has.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt

from krea_dagster.digests import Digests

_Places = npt.NDArray[np.int64]

#: Objects that a page of a listing has in S3; the others' pages are larger.
PAGE: Final = 1000

#: Measured against SeaweedFS: 0.08 ms of CPU for a listed object, 4 ms for a question.
_OBJECTS_PER_QUESTION: Final = 50


#: Digits of a key in the name of its folder.
_FOLDER_DIGITS: Final = 2


@dataclass(frozen=True)
class Lookup:
    """What to ask for the images at some places: one listing of a beginning, or each of them.

    ``beginning`` are the first digits of their keys; None for one question each.
    """

    beginning: str | None
    places: _Places


def plan_lookups(wanted: Digests, stored: int, *, by_prefix: bool) -> Iterator[Lookup]:
    """Yield how to look up the wanted keys, as bytes, 32 per row.

    Args:
        wanted: The keys.
        stored: About how many images the store has.
        by_prefix: Whether any beginning can be listed, or only whole folders, of two digits.
    """
    digits = digits_for(stored, by_prefix=by_prefix)
    numbers = _beginnings(wanted, digits)
    order = np.argsort(numbers, kind="stable")
    starts = np.flatnonzero(np.diff(numbers[order], prepend=-1))
    objects = stored / 16**digits
    singly: list[_Places] = []
    for places in np.split(order, starts[1:]) if len(order) else ():
        if len(places) * _OBJECTS_PER_QUESTION < objects:
            singly.append(places)
        else:
            number = int(numbers[places[0]])
            yield Lookup(f"{number:0{digits}x}" if digits else "", places)
    if singly:
        yield Lookup(None, np.concatenate(singly))


def digits_for(stored: int, *, by_prefix: bool) -> int:
    """Return how many digits of a key make a beginning with about a page of images, or fewer."""
    if not by_prefix:
        return 0 if stored <= PAGE else 2
    digits = 0
    while stored > PAGE * 16**digits:
        digits += 1
    return digits


def listing_of(beginning: str) -> str:
    """Return the beginning of names, for ``Storage.listed``, of images whose keys begin so."""
    folder = f"{beginning[:_FOLDER_DIGITS]}/" if len(beginning) >= _FOLDER_DIGITS else ""
    return f"images/{folder}{beginning}"


def _beginnings(digests: Digests, digits: int) -> _Places:
    """Return the first digits of each key as a number."""
    width = (digits + 1) // 2
    numbers = np.zeros(len(digests), np.int64)
    for column in range(width):
        numbers = numbers * 256 + digests[:, column]
    return numbers // 16 if digits % 2 else numbers

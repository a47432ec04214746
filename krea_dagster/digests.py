"""Sets of request keys as numpy arrays of 32 bytes each: a million are 32 MB, and no objects."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Digests = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
_Words = npt.NDArray[np.uint64]


class DigestSet:
    """Request keys to look others up in, each with a number beside it (0 where none is given)."""

    def __init__(self, digests: Digests, values: npt.NDArray[np.int64] | None = None) -> None:
        words = _words(digests)
        order = np.argsort(np.ascontiguousarray(words[:, 0]))
        self.words = words[order]
        self._firsts = np.ascontiguousarray(self.words[:, 0])
        self.values = np.zeros(len(order), np.int64) if values is None else values[order]

    def __len__(self) -> int:
        return len(self.words)

    def find(self, digests: Digests) -> npt.NDArray[np.int64]:
        """Return the place of each in ``words`` and ``values``, -1 where it is not here.

        Two keys that agree in their first 8 bytes and differ in the others, of which only the
        first is found, would take 10^9 images to come about.
        """
        if not len(self.words):
            return np.full(len(digests), -1)
        words = _words(digests)
        # In their order, so that memory is walked through and not jumped about in.
        order = np.argsort(np.ascontiguousarray(words[:, 0]))
        words = words[order]
        places = np.searchsorted(self._firsts, words[:, 0])
        places[places == len(self.words)] = 0
        found = np.empty(len(words), np.int64)
        found[order] = np.where((self.words[places] == words).all(axis=1), places, -1)
        return found

    def contains(self, digests: Digests) -> Mask:
        """Return which of them are here."""
        return np.asarray(self.find(digests) >= 0)


def first_of_each(digests: Digests) -> tuple[Mask, npt.NDArray[np.int64]]:
    """Return which are the first of their kind, and how many there are of each kind."""
    words = _words(digests)
    order = np.argsort(words[:, 0], kind="stable")
    alike = words[order[1:], 0] == words[order[:-1], 0]
    if (alike & (words[order[1:]] != words[order[:-1]]).any(axis=1)).any():
        order = np.lexsort(words.T[::-1])  # stable too; hardly ever needed
    words = words[order]
    begins = np.ones(len(words), np.bool_)
    begins[1:] = (words[1:] != words[:-1]).any(axis=1)
    kinds = np.cumsum(begins) - 1
    sizes = np.bincount(kinds, minlength=int(begins.sum())) if len(kinds) else kinds
    first = np.zeros(len(words), np.bool_)
    first[order[begins]] = True
    counts = np.empty(len(words), np.int64)
    counts[order] = sizes[kinds]
    return first, counts


def _words(digests: Digests) -> _Words:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)

"""SHA-256 digests as numpy arrays of 32 bytes a row: a million are 32 MB, and no objects. Pure."""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

#: Shape (rows, 32), or (rows, digits) where hexadecimal digits are meant.
Digests = npt.NDArray[np.uint8]
Mask = npt.NDArray[np.bool_]
_Words = npt.NDArray[np.uint64]
_Indices = npt.NDArray[np.int64]

#: The two hexadecimal digits of each byte, in the order in which they lie in memory.
_CHARACTERS: Final = np.frombuffer(bytes(range(256)).hex().encode(), np.uint16)

#: Digests that are looked up together: more would only take memory.
_AT_ONCE: Final = 100_000


# -- hexadecimal text and bytes ---------------------------------------------------------------


def digits_from_hex(hexadecimal: pa.Array, digits: int = 64) -> Digests:
    """Return the values, 0 to 15, of the first digits of each digest: shape (rows, digits)."""
    if not len(hexadecimal):
        return np.empty((0, digits), np.uint8)
    characters = np.frombuffer(
        hexadecimal.buffers()[2],
        np.uint8,
        count=64 * len(hexadecimal),
        offset=64 * hexadecimal.offset,
    )
    return _digit_values(characters.reshape(-1, 64)[:, :digits])


def digests_from_hex(hexadecimal: pa.Array) -> Digests:
    """Return digests of 64 lower-case hexadecimal digits as bytes."""
    return _packed(digits_from_hex(hexadecimal))


def digests_from_joined_hex(hexadecimal: str) -> Digests:
    """Return digests whose digits follow one another in one text as bytes."""
    return digests_from_ascii(np.frombuffer(hexadecimal.encode(), np.uint8).reshape(-1, 64))


def digests_from_ascii(characters: Digests) -> Digests:
    """Return digests whose digits are ASCII codes, shape (rows, 64), as bytes."""
    return _packed(_digit_values(characters))


def hex_from_digests(digests: Digests) -> pa.Array:
    """Return digests as text of 64 hexadecimal digits."""
    characters = _CHARACTERS[digests]
    ends = np.arange(0, 64 * len(digests) + 1, 64, dtype=np.int32)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(np.ascontiguousarray(characters))]
    return pa.Array.from_buffers(pa.string(), len(digests), buffers)


def _digit_values(characters: Digests) -> Digests:
    values: Digests = (characters & np.uint8(15)) + np.uint8(9) * (characters >> np.uint8(6))
    return values


def _packed(digits: Digests) -> Digests:
    digests: Digests = (digits[:, 0::2] << np.uint8(4)) | digits[:, 1::2]
    return digests


# -- sets -------------------------------------------------------------------------------------


class DigestSet:
    """A set of digests, each with a number (0 by default)."""

    def __init__(self, digests: Digests | list[Digests], values: _Indices | None = None) -> None:
        """Sort digests, given in one array or in several; a list of these is emptied."""
        parts = digests if isinstance(digests, list) else [digests]
        firsts = np.concatenate([np.empty(0, np.uint64), *(_words(one)[:, 0] for one in parts)])
        order = np.argsort(firsts)
        self._firsts = firsts[order]
        self.values = np.zeros(len(order), np.int64) if values is None else values[order]
        places = np.empty(len(order), np.int64)
        places[order] = np.arange(len(order))
        # Part by part, so that a million are not in memory twice.
        self.words = np.empty((len(order), 4), np.uint64)
        end = len(order)
        while parts:
            words = _words(parts.pop())
            self.words[places[end - len(words) : end]] = words
            end -= len(words)

    def __len__(self) -> int:
        return len(self.words)

    def find(self, digests: Digests) -> _Indices:
        """Return the index of each in ``words`` and ``values``, -1 where it is not in the set."""
        words = _words(digests)
        found = np.empty(len(words), np.int64)
        for start in range(0, len(words), _AT_ONCE):
            part = words[start : start + _AT_ONCE]
            # Looked up in sorted order, so that memory is read sequentially.
            order = np.argsort(part[:, 0])
            found[start + order] = find_sorted(self.words, part[order], self._firsts)
        return found

    def contains(self, digests: Digests) -> Mask:
        """Return which of them are in the set."""
        return np.asarray(self.find(digests) >= 0)


def find_sorted(words: _Words, wanted: _Words, firsts: _Words | None = None) -> _Indices:
    """Return the index of each wanted digest in ``words``, -1 where it is missing.

    Digests are four words each, shape (rows, 4), and ``words`` is sorted by the first of them.
    ``firsts`` is that column as a contiguous array, where the caller keeps one.

    Of two digests with the same first 8 bytes, only the first is found: that would take 10^9
    images.
    """
    if not len(words):
        return np.full(len(wanted), -1)
    places = np.searchsorted(words[:, 0] if firsts is None else firsts, wanted[:, 0])
    places[places == len(words)] = 0
    return np.where((words[places] == wanted).all(axis=1), places, -1)


def first_of_each(digests: Digests) -> tuple[Mask, _Indices]:
    """Return which rows are the first with their digest, and how many rows share each digest."""
    words = _words(digests)
    first, counts = np.ones(len(words), np.bool_), np.ones(len(words), np.int64)
    order = np.argsort(words[:, 0])
    firsts = words[:, 0][order]
    repeats = np.zeros(len(words) + 1, np.bool_)
    repeats[1:-1] = firsts[1:] == firsts[:-1]
    # Nearly all digests differ, already in their first word. Only the others are compared.
    if repeats.any():
        some = np.sort(order[repeats[1:] | repeats[:-1]])
        first[some], counts[some] = _first_of_alike(words[some])
    return first, counts


def _first_of_alike(words: _Words) -> tuple[Mask, _Indices]:
    order = np.lexsort(words.T[::-1])  # stable
    words = words[order]
    begins = np.ones(len(words), np.bool_)
    begins[1:] = (words[1:] != words[:-1]).any(axis=1)
    groups = np.cumsum(begins) - 1
    first = np.zeros(len(words), np.bool_)
    first[order[begins]] = True
    counts = np.empty(len(words), np.int64)
    counts[order] = np.bincount(groups)[groups]
    return first, counts


def _words(digests: Digests) -> _Words:
    return np.ascontiguousarray(digests).view(np.uint64).reshape(-1, 4)

"""A stable 64-bit hash of prompt_ids: MurmurHash64A with seed 0, of one text and of whole columns.

It spreads rows over the buckets of ``hash:N``, and finds prompt_ids that are there twice; it keeps
no secret. The same on every machine. Source: Austin Appleby, MurmurHash2.cpp, in the public
domain. A column takes it a tenth of the time that MD5 takes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Numbers = npt.NDArray[np.uint64]

_FACTOR: Final = 0xC6A4A7935BD1E995
_SHIFT: Final = 47
_WORD: Final = 8
_MASK: Final = (1 << 64) - 1


def hash_of_text(text: str) -> int:
    """Return the hash of the text's UTF-8 form, from 0 to 2**64 - 1."""
    data = text.encode()
    number = len(data) * _FACTOR & _MASK
    end = len(data) - len(data) % _WORD
    for at in range(0, end, _WORD):
        word = int.from_bytes(data[at : at + _WORD], "little") * _FACTOR & _MASK
        word = (word ^ word >> _SHIFT) * _FACTOR & _MASK
        number = (number ^ word) * _FACTOR & _MASK
    if end < len(data):
        number = (number ^ int.from_bytes(data[end:], "little")) * _FACTOR & _MASK
    number = (number ^ number >> _SHIFT) * _FACTOR & _MASK
    return number ^ number >> _SHIFT


def hashes_of_texts(texts: pa.Array) -> Numbers:
    """Return the same for a column of strings; a null is as an empty text."""
    rows = len(texts)
    if not rows:
        return np.empty(0, np.uint64)
    if texts.null_count:
        texts = texts.fill_null("")
    _, ends, data = texts.buffers()
    places = np.frombuffer(ends, np.int32, rows + 1, texts.offset * 4).astype(np.int64)
    lengths = np.diff(places)
    words = _words_of(data, int(places[0]), int(places[-1]))
    starts = places[:-1] - places[0]
    if (step := int(lengths[0])) == lengths.min() == lengths.max():
        # A slice takes a tenth of the time that numbers of places take.
        return _hashes(lambda at, count: words[at :: max(1, step)][:count].copy(), lengths)
    # The longest first: of the texts that have a certain word, none is then behind one without.
    order = np.argsort(-lengths, kind="stable")
    hashes = np.empty(rows, np.uint64)
    starts, lengths = starts[order], lengths[order]
    hashes[order] = _hashes(lambda at, count: words[starts[:count] + at], lengths)
    return hashes


def _words_of(data: pa.Buffer | None, first: int, end: int) -> Numbers:
    """Return the eight bytes at every place of the data, those behind its end as zeros."""
    own = np.zeros(end - first + _WORD, np.uint8)
    if data is not None:
        own[:-_WORD] = np.frombuffer(data, np.uint8, end - first, first)
    words: Numbers = np.ndarray(len(own) - _WORD + 1, "<u8", own.data, 0, (1,))
    return words


def _hashes(words: Callable[[int, int], Numbers], lengths: npt.NDArray[np.int64]) -> Numbers:
    """Return the hashes of texts of these lengths, the longest first.

    ``words`` gives the eight bytes at a place of each of the first so many texts.
    """
    factor, shift = np.uint64(_FACTOR), np.uint64(_SHIFT)
    hashes = lengths.astype(np.uint64) * factor
    for at in range(0, int(lengths[0]) + 1, _WORD):
        # So many begin their last word here or later, and so many have more than that.
        count = int(np.searchsorted(-lengths, -at, side="right"))
        whole = int(np.searchsorted(-lengths, -at - _WORD, side="right"))
        word = words(at, count)
        if whole:
            full = word[:whole] * factor
            full ^= full >> shift
            full *= factor
            hashes[:whole] ^= full
            hashes[:whole] *= factor
        rest = (lengths[whole:count] - at).astype(np.uint64)
        tail = word[whole:] & ~(np.uint64(_MASK) << rest * np.uint64(8))
        ended = (hashes[whole:count] ^ tail) * factor
        hashes[whole:count] = np.where(rest > 0, ended, hashes[whole:count])
    hashes ^= hashes >> shift
    hashes *= factor
    mixed: Numbers = hashes ^ (hashes >> shift)
    return mixed

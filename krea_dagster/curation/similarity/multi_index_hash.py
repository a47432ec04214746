"""Finds which of a million hashes differ in few bits, without comparing all pairs. Pure.

This is multi-index hashing (Norouzi, Punjani and Fleet, 2012), which is exact. A hash of 256 bits
is cut into 16 pieces of 16 bits; where two hashes differ in at most 31 bits, at least one piece
differs in at most one bit. So only hashes that share a piece, or nearly, are compared. The pieces
are stored in four words of 64 bits, and the same holds for each word: in a matching pair some word
differs in at most 7 bits, and a piece of that word in at most one. So one word settles all but one
in a million of the comparisons.

faiss has such an index (``IndexBinaryMultiHash``), but a million queries take minutes there,
because each candidate is a jump in memory. Here many queries walk through sorted words together.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import combinations
from threading import Lock
from typing import Final

import numpy as np
import numpy.typing as npt

#: Bytes of a hash.
HASH_BYTES: Final = 32
#: The largest limit: beyond it the pieces would have to be looked up too often.
MOST_BITS: Final = 47

_PIECES: Final = 16
_PIECE_BITS: Final = 16
_KEYS: Final = 1 << _PIECE_BITS
_PER_WORD: Final = 4
#: Hashes whose neighbours are searched together: fewer where many are similar.
_BATCH: Final = 4096
_SMALL_BATCH: Final = 64
#: Pairs that are compared together: few enough to stay in a core's cache.
_PAIRS: Final = 1 << 16
#: The most near pairs kept for one batch: more occur only where very many hashes are similar.
_HITS: Final = 1 << 18
#: The share of settled hashes at which the index is rebuilt without them.
_DONE_SHARE: Final = 1 / 16

Hashes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]
_Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Stars:
    """The star of each hash.

    ``centre`` is the index of the star's first hash (a hash's own index where it is a centre or
    alone), ``distance`` the bits between the two, ``pairs`` how many pairs were compared.
    """

    centre: _Places
    distance: npt.NDArray[np.int32]
    pairs: int


def find_stars(hashes: Hashes, most_bits: int, *, threads: int | None = None) -> Stars:
    """Group hashes (n × 32 bytes) that are in the order of preference.

    From first to last, a hash without a star starts one and takes all later hashes without a star
    that differ from it in at most ``most_bits`` bits. So each member is near its centre, and there
    are no chains. Exact; takes about 250 bytes per hash. Raises ValueError where ``most_bits`` is
    below 0 or above ``MOST_BITS``.
    """
    if not 0 <= most_bits <= MOST_BITS:
        raise ValueError(f"most_bits must be 0 to {MOST_BITS}, not {most_bits}")
    words = words_of(hashes)
    search = _Search(words, most_bits)
    with ThreadPoolExecutor(threads or os.cpu_count() or 1) as pool:
        search.run(pool)
    centre = np.where(search.owner < len(words), search.owner, np.arange(len(words)))
    return Stars(centre, _distances(words, centre), search.pairs)


class _Search:
    """The state of one search: ``owner`` is the centre of each hash."""

    def __init__(self, words: _Words, most_bits: int) -> None:
        self.words = words
        self.pairs = 0
        self.owner = np.full(len(words), len(words), np.int64)  # the length means none
        self._most_bits = most_bits
        self._lookups = list(_lookups(most_bits))
        self._lock = Lock()

    def run(self, pool: ThreadPoolExecutor) -> None:
        """Assign every hash to its centre, batch by batch of possible centres."""
        left = np.arange(len(self.words))
        index, indexed = self._index(left, pool), len(left)
        size = _BATCH
        while len(left):
            if len(left) < (1 - _DONE_SHARE) * indexed:
                wanted = np.zeros(len(self.words), np.bool_)
                wanted[left] = True
                list(pool.map(lambda table, wanted=wanted: table.keep(wanted), index))
                indexed = len(left)
            if not self._settle(left[:size], index, pool):
                size = max(_SMALL_BATCH, size // 8)
                continue
            left = left[size:]
            left = left[self.owner[left] == len(self.words)]
            size = min(_BATCH, 2 * size)

    def _settle(self, batch: _Places, index: list[_Table], pool: ThreadPoolExecutor) -> bool:
        """Find the centres of a batch, and assign the near hashes in and after it to them.

        Return False where too many are similar: then a smaller batch should be settled first, which
        removes most of them.
        """
        found = _Pairs(_HITS)
        self._look_up(batch, index, pool, found.add)
        if not found.too_many:
            ones, others = found.all()
            inside = others <= batch[-1]
            self._choose(ones[inside], others[inside])
            theirs = self.owner[ones] == len(self.words)
            self._claim(ones[theirs], others[theirs])
            return True
        if len(batch) > _SMALL_BATCH:
            return False
        # The pairs within the batch are few. Afterwards only its centres are looked up, and no two
        # of them are near.
        found = _Pairs(None)
        self._look_up(batch, self._index(batch, pool), pool, found.add)
        self._choose(*found.all())
        self._look_up(batch[self.owner[batch] == len(self.words)], index, pool, self._claim)
        return True

    def _choose(self, ones: _Places, others: _Places) -> None:
        """Assign the neighbours of centres, from the pairs of a batch in order."""
        order = np.argsort(ones, kind="stable")
        ones, others = ones[order], others[order]
        firsts, begins = np.unique(ones, return_index=True)
        for first, neighbours in zip(firsts, np.split(others, begins)[1:], strict=True):
            if self.owner[first] == len(self.words):
                free = neighbours[self.owner[neighbours] == len(self.words)]
                self.owner[free] = first

    def _claim(self, centres: _Places, others: _Places) -> bool:
        """Assign hashes to the first near centre; an earlier assignment stays."""
        np.minimum.at(self.owner, others, centres)
        return True

    def _index(self, places: _Places, pool: ThreadPoolExecutor) -> list[_Table]:
        return list(pool.map(lambda one: _Table(self.words, places, one), self._lookups))

    def _look_up(
        self,
        places: _Places,
        index: list[_Table],
        pool: ThreadPoolExecutor,
        take: Callable[[_Places, _Places], bool],
    ) -> None:
        """Pass near pairs to ``take``, of these hashes and later ones of the index.

        Stops where ``take`` returns False. A pair may be found by several pieces.
        """
        lock, queries = Lock(), self.words[places]

        def look_up(table: _Table) -> int:
            compared = 0
            for asked, maybe, looked_at in table.candidates(queries):
                compared += looked_at
                later = maybe > places[asked]
                ones, others = places[asked[later]], maybe[later]
                bits = np.bitwise_count(self.words[ones] ^ self.words[others])
                near = bits.sum(axis=1, dtype=np.int32) <= self._most_bits
                with lock:
                    if not take(ones[near], others[near]):
                        break
            return compared

        self.pairs += sum(pool.map(look_up, index))


class _Pairs:
    """The pairs that were found, up to a limit."""

    def __init__(self, most: int | None) -> None:
        self._most, self._count = most, 0
        self._found: list[tuple[_Places, _Places]] = []

    @property
    def too_many(self) -> bool:
        """Whether the limit was exceeded, so that pairs are missing."""
        return self._most is not None and self._count > self._most

    def add(self, ones: _Places, others: _Places) -> bool:
        """Add pairs; return False once the limit is exceeded."""
        self._found.append((ones, others))
        self._count += len(ones)
        return not self.too_many

    def all(self) -> tuple[_Places, _Places]:
        """Return all pairs."""
        empty = np.empty(0, np.int64)
        return (
            np.concatenate([empty, *(ones for ones, _ in self._found)]),
            np.concatenate([empty, *(others for _, others in self._found)]),
        )


@dataclass(frozen=True)
class _Lookup:
    """How one piece is looked up: the masks, and the most bits in which its word may differ."""

    piece: int
    masks: npt.NDArray[np.int64]
    word_bits: int


def _lookups(most_bits: int) -> Iterator[_Lookup]:
    """Distribute the bits among the pieces so that no pair can be missed.

    Where a piece is looked up with r bits changed, the sum of r + 1 over all pieces must be
    most_bits + 1: a pair that differs in more than r bits of each piece differs in more than
    most_bits. The same holds for the pieces of one word.
    """
    least, more = divmod(most_bits + 1, _PIECES)
    # Every fourth piece first, so that the words get equal shares.
    order = sorted(range(_PIECES), key=lambda piece: (piece % _PER_WORD, piece))
    takes = {piece: least + (rank < more) for rank, piece in enumerate(order)}
    for piece, bits in sorted(takes.items()):
        if bits:
            first = piece - piece % _PER_WORD
            of_word = sum(takes[one] for one in range(first, first + _PER_WORD))
            yield _Lookup(piece, _masks(bits - 1), of_word - 1)


def _masks(radius: int) -> npt.NDArray[np.int64]:
    """Return all patterns of 16 bits with at most ``radius`` ones."""
    masks = [
        sum(1 << place for place in places)
        for ones in range(radius + 1)
        for places in combinations(range(_PIECE_BITS), ones)
    ]
    return np.array(masks, np.int64)


class _Table:
    """The words of some hashes, sorted by one of their pieces."""

    def __init__(self, words: _Words, places: _Places, lookup: _Lookup) -> None:
        self._lookup, self._word = lookup, lookup.piece // _PER_WORD
        keys = self._keys(words)[places]
        order = np.argsort(keys, kind="stable")  # of 16 bits: a radix sort
        self._places = places[order].astype(np.int32)
        self._words = words[self._places, self._word]
        self._begins = np.zeros(_KEYS + 1, np.int64)
        np.cumsum(np.bincount(keys, minlength=_KEYS), out=self._begins[1:])

    def keep(self, wanted: npt.NDArray[np.bool_]) -> None:
        """Remove all hashes but those that ``wanted`` marks."""
        kept = wanted[self._places]
        before = np.zeros(len(kept) + 1, np.int64)
        np.cumsum(kept, out=before[1:])
        self._begins = before[self._begins]
        self._places, self._words = self._places[kept], self._words[kept]

    def candidates(self, queries: _Words) -> Iterator[tuple[_Places, _Places, int]]:
        """Yield query numbers, the places of hashes that may be near, and the pairs compared."""
        own = self._keys(queries)
        order = np.argsort(own, kind="stable")  # so that memory is read in order
        masks = self._lookup.masks
        keys = (masks[:, None] ^ own[order].astype(np.int64)).ravel()
        begins = np.take(self._begins, keys)
        counts = np.take(self._begins, keys + 1)
        counts -= begins
        words = np.tile(queries[order, self._word], len(masks))
        ends = np.cumsum(counts)
        done, before = 0, 0
        while len(ends) and before < ends[-1]:
            stop = max(done + 1, int(np.searchsorted(ends, before + _PAIRS, "right")))
            part = slice(done, stop)
            total = int(ends[stop - 1]) - before
            places = np.repeat(begins[part] - (ends[part] - counts[part] - before), counts[part])
            places += _UP_TO[:total] if total <= _PAIRS else np.arange(total)
            # All are in range; clipping only saves the check.
            differ = np.take(self._words, places, mode="clip")
            differ ^= np.repeat(words[part], counts[part])
            hits = np.flatnonzero(np.bitwise_count(differ) <= self._lookup.word_bits)
            asked = done + np.searchsorted(ends[part] - before, hits, "right")
            found = self._places[places[hits]].astype(np.int64)
            yield order[asked % len(order)], found, total
            done, before = stop, before + total

    def _keys(self, words: _Words) -> npt.NDArray[np.uint16]:
        return words.view(np.uint16)[:, self._lookup.piece]


_UP_TO: Final = np.arange(_PAIRS)


def _distances(words: _Words, centre: _Places) -> npt.NDArray[np.int32]:
    distance = np.zeros(len(words), np.int32)
    members = np.flatnonzero(centre != np.arange(len(words)))
    differ = np.bitwise_count(words[members] ^ words[centre[members]])
    distance[members] = differ.sum(axis=1, dtype=np.int32)
    return distance


def words_of(hashes: Hashes) -> _Words:
    """Return hashes (n × 32 bytes) as four words each (n × 4), with their bits permuted.

    The bits of PDQ are 16 × 16 frequencies, and neighbours correlate in many images. Each piece
    takes a diagonal of them, so that its bits are as independent as possible.
    """
    row = np.arange(_PIECE_BITS)[None, :]
    source = (_PIECE_BITS * row + (np.arange(_PIECES)[:, None] - row) % _PIECES).ravel()
    words = np.empty((len(hashes), HASH_BYTES // 8), np.uint64)
    for first in range(0, len(hashes), _KEYS):
        part = slice(first, first + _KEYS)
        bits = np.unpackbits(np.ascontiguousarray(hashes[part]), axis=1)
        bits = np.ascontiguousarray(np.take(bits, source, axis=1))
        words[part] = np.packbits(bits, axis=1).view(np.uint64)
    return words

"""Which split a prompt is in: by a hash of its text, so that it never leaks or moves. Pure.

A split is a range of the hash's values. Nothing else decides, neither the other rows nor their
order, so that a row stays where it is as the table grows. Two rows with the same text, whatever
their prompt_id, sample or seed, are in the same split; so are texts that differ only in case,
in white space, or in how Unicode writes the same letters.

Images that are alike may come from different prompts. Then the split named last keeps its own,
and the others leave theirs out: no image moves, and growth of the first split, which is usually
what is trained on, takes nothing from those that are held out.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.errors import ConfigError

_VALUES: Final = 1 << 64

#: Texts that are Python's at once.
_PIECE: Final = 10_000

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

#: Names that the datasets library gives a meaning of their own.
_RESERVED: Final = frozenset({"all"})

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A name, and its share of the prompts: an exact decimal above 0."""

    name: str
    share: Decimal

    @classmethod
    def whole(cls, name: str) -> Split:
        """The one split that has all."""
        return cls(name, Decimal(1))

    def __str__(self) -> str:
        return f"{self.name}={self.share.normalize():f}"


def parse_splits(texts: Sequence[str]) -> tuple[Split, ...]:
    """Read ``NAME=SHARE``, in order; the shares must sum to 1. None at all is ``train=1``.

    Raises ConfigError.
    """
    splits: list[Split] = []
    for text in texts:
        name, equals, number = text.partition("=")
        try:
            share = Decimal(number)
        except InvalidOperation:
            share = Decimal(0)
        if not equals or not share.is_finite() or share <= 0:
            raise ConfigError(f"the split {text!r} is not NAME=SHARE, such as train=0.9")
        if not _NAME.fullmatch(name) or name.lower() in _RESERVED:
            raise ConfigError(
                f"a split cannot be called {name!r}: up to 40 letters, digits or _, of which the "
                "first is a letter, and not the word all"
            )
        if name.lower() in {one.name.lower() for one in splits}:
            raise ConfigError(f"the split {name!r} is given twice")
        splits.append(Split(name, share))
    if not splits:
        return (Split.whole("train"),)
    if (total := sum(one.share for one in splits)) != 1:
        raise ConfigError(f"the shares of the splits sum to {total} instead of 1")
    return tuple(splits)


def normal(text: str) -> str:
    """A prompt's text as it is hashed: without case, and with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_numbers(prompts: pa.ChunkedArray, splits: Sequence[Split]) -> Numbers:
    """Return of each prompt the number of its split."""
    if len(splits) == 1:
        return np.zeros(len(prompts), np.int64)
    texts = pc.fill_null(prompts.cast(pa.large_string()).combine_chunks(), "").dictionary_encode()
    different = texts.dictionary
    hashes = np.empty(len(different), np.uint64)
    for begin in range(0, len(different), _PIECE):
        piece = different.slice(begin, _PIECE).to_pylist()
        hashes[begin : begin + _PIECE] = [_hash(text) for text in piece]
    ends, total = [], Decimal(0)
    for one in splits[:-1]:
        total += one.share
        ends.append(int(total * _VALUES))
    of = np.searchsorted(np.array(ends, np.uint64), hashes, side="right")
    return np.asarray(of[texts.indices.to_numpy()], np.int64)


def leaking(splits: Numbers, alike: Numbers) -> npt.NDArray[np.bool_]:
    """Return which rows are left out, because a later split has an image that is alike.

    ``alike`` numbers the groups of images that are alike, from 0.
    """
    if not len(splits):
        return np.zeros(0, np.bool_)
    last = np.zeros(int(alike.max()) + 1, np.int64)
    np.maximum.at(last, alike, splits)
    return np.asarray(splits < last[alike])


def _hash(text: str) -> int:
    hashed = hashlib.sha256(b"krea-dagster/1/split\x1f" + normal(text).encode())
    return int.from_bytes(hashed.digest()[:8], "big")

"""Assigns prompts to splits by a hash of their text, so that they never leak or move. Pure.

A split is a range of hash values. It does not depend on the other rows or their order, so a row
keeps its split as the table grows. Rows with the same text are in the same split, with any
prompt_id, sample or seed, and so are texts that differ only in case, white space or Unicode
normalization.

Similar images may have different prompts. Then the last split keeps its own, and the others leave
theirs out. So no image moves, and growth of the first split, usually the training set, takes
nothing from the held-out ones.
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

#: Texts converted to Python at a time.
_PIECE: Final = 10_000

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,39}")

#: Names with a special meaning in the datasets library.
_RESERVED: Final = frozenset({"all"})

Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Split:
    """A split.

    Args:
        name: Up to 40 letters, digits and underscores, beginning with a letter.
        share: Its share of the prompts, above 0.
    """

    name: str
    share: Decimal

    @classmethod
    def whole(cls, name: str) -> Split:
        """Return a split of all prompts."""
        return cls(name, Decimal(1))

    def __str__(self) -> str:
        return f"{self.name}={self.share.normalize():f}"


def parse_splits(texts: Sequence[str]) -> tuple[Split, ...]:
    """Parse ``NAME=SHARE`` texts, whose shares must sum to 1; none mean ``train=1``.

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
                f"invalid split name {name!r}; use up to 40 letters, digits or _, beginning with a "
                "letter, and not 'all'"
            )
        if name.lower() in {one.name.lower() for one in splits}:
            raise ConfigError(f"duplicate split {name!r}")
        splits.append(Split(name, share))
    if not splits:
        return (Split.whole("train"),)
    if (total := sum(one.share for one in splits)) != 1:
        raise ConfigError(f"the shares of the splits sum to {total} instead of 1")
    return tuple(splits)


def normal(text: str) -> str:
    """Return a prompt's text for hashing: casefolded, normalized, with single spaces."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def split_numbers(prompts: pa.ChunkedArray, splits: Sequence[Split]) -> Numbers:
    """Return the number of each prompt's split."""
    if len(splits) == 1:
        return np.zeros(len(prompts), np.int64)
    texts = pc.fill_null(prompts.cast(pa.large_string()).combine_chunks(), "").dictionary_encode()
    distinct = texts.dictionary
    hashes = np.empty(len(distinct), np.uint64)
    for begin in range(0, len(distinct), _PIECE):
        piece = distinct.slice(begin, _PIECE).to_pylist()
        hashes[begin : begin + _PIECE] = [_hash(text) for text in piece]
    ends, total = [], Decimal(0)
    for one in splits[:-1]:
        total += one.share
        ends.append(int(total * _VALUES))
    of = np.searchsorted(np.array(ends, np.uint64), hashes, side="right")
    return np.asarray(of[texts.indices.to_numpy()], np.int64)


def leaking(splits: Numbers, groups: Numbers) -> npt.NDArray[np.bool_]:
    """Return which rows to leave out because a later split has a similar image.

    ``groups`` numbers the groups of similar images, from 0.
    """
    if not len(splits):
        return np.zeros(0, np.bool_)
    last = np.zeros(int(groups.max()) + 1, np.int64)
    np.maximum.at(last, groups, splits)
    return np.asarray(splits < last[groups])


def _hash(text: str) -> int:
    hashed = hashlib.sha256(b"krea-dagster/1/split\x1f" + normal(text).encode())
    return int.from_bytes(hashed.digest()[:8], "big")

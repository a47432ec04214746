"""White space and invisible characters in prompts. Pure.

A prompt of nothing else is a problem. Two prompts that differ by nothing else are two purchases.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from krea_dagster.prompts.murmur import Hashes, hashes_of_texts

#: Unicode's Default_Ignorable_Code_Point, and the empty Braille pattern: nothing is drawn of them.
_INVISIBLE: Final = (
    "\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e"
    "\u2060-\u206f\u2800\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
)
#: White space other than a blank, for Python and for Arrow's RE2, whose \s is ASCII.
_OTHER_SPACE: Final = "\t-\r\x1c-\x1f\x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000"

_NOTHING: Final = f"^[ {_OTHER_SPACE}{_INVISIBLE}]*$"
_UNUSUAL: Final = f"^ | $|  |[{_OTHER_SPACE}{_INVISIBLE}]"
#: How many rows a message names.
_NAMED: Final = 5


def is_invisible(prompt: str) -> bool:
    """Return whether a prompt has nothing but white space and invisible characters."""
    return re.fullmatch(_NOTHING, prompt) is not None


def are_invisible(prompts: pa.Array) -> pa.Array:
    """Return which prompts have nothing but white space and invisible characters."""
    return pc.match_substring_regex(prompts, _NOTHING)


def unusual_hashes(prompts: pa.Array) -> Hashes:
    """Return the hashes of the plain form of prompts that are not in it: nearly always none."""
    unusual = pc.match_substring_regex(prompts, _UNUSUAL)
    if not pc.any(unusual).as_py():
        return np.empty(0, np.uint64)
    return hashes_of_texts(_plain(prompts.filter(unusual)))


def rows_that_differ_by_blanks(
    batches: Iterable[tuple[int, pa.Array]], suspects: Hashes
) -> list[tuple[int, int]]:
    """Return the rows whose prompt differs from an earlier one only by blanks, with that row.

    ``batches`` are the prompts of the table, each with the number of its first row. ``suspects``
    are the hashes from ``unusual_hashes``: only the prompts of these are compared.
    """
    suspects = np.unique(suspects)
    parts: list[npt.NDArray[np.uint64]] = []
    for first, prompts in batches:
        plain = hashes_of_texts(_plain(prompts))
        at = np.flatnonzero(np.isin(plain, suspects))
        exact = hashes_of_texts(prompts.take(pa.array(at)))
        parts.append(np.column_stack([plain[at], exact, (first + at).astype(np.uint64)]))
    # Sorted by plain form, then by exact form; in the order of the rows.
    found = np.concatenate([np.empty((0, 3), np.uint64), *parts])
    found = found[np.lexsort((found[:, 2], found[:, 1], found[:, 0]))]
    forms = found[_begins(found[:, :2])]
    forms = forms[np.lexsort((forms[:, 2], forms[:, 0]))]
    begins = _begins(forms[:, :1])
    firsts = forms[:, 2][begins][np.cumsum(begins) - 1]
    pairs = np.column_stack([forms[:, 2], firsts])[~begins]
    return [(int(row), int(first)) for row, first in pairs[np.argsort(pairs[:, 0])]]


def blanks_note(pairs: Sequence[tuple[int, int]]) -> str:
    """Return what is said of the rows from ``rows_that_differ_by_blanks``."""
    named = ", ".join(f"row {row} from row {first}" for row, first in pairs[:_NAMED])
    more = f" and {len(pairs) - _NAMED:,} more" if len(pairs) > _NAMED else ""
    many = "1 prompt differs" if len(pairs) == 1 else f"{len(pairs):,} prompts differ"
    return (
        f"{many} from another only by blanks or invisible characters, and each is an image of its "
        f"own: {named}{more}"
    )


def _plain(prompts: pa.Array) -> pa.Array:
    """Return prompts without invisible characters, and with single blanks between words."""
    visible = pc.replace_substring_regex(prompts, f"[{_INVISIBLE}]", "")
    return pc.utf8_trim(pc.replace_substring_regex(visible, f"[ {_OTHER_SPACE}]+", " "), " ")


def _begins(rows: npt.NDArray[np.uint64]) -> npt.NDArray[np.bool_]:
    """Return which rows differ from the one before."""
    begins = np.ones(len(rows), np.bool_)
    begins[1:] = (rows[1:] != rows[:-1]).any(axis=1)
    return begins

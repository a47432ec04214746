"""The order and the forms in which letters are drawn: right to left, and joined. Pure.

Each line is put into visual order, and Arabic letters are replaced by the forms that Unicode has
for their place in a word. That is less than a shaping library does, and the same on every machine.
"""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Sequence
from itertools import groupby
from typing import Final

#: Arabic's forms of presentation.
_FORMS: Final = (range(0xFB50, 0xFDC0), range(0xFE80, 0xFEFD))
_LAM: Final = "\u0644"
#: Joins on both sides without a form of its own.
_TATWEEL: Final = "\u0640"
_RIGHT: Final = frozenset({"R", "AL"})
_LEFT: Final = frozenset({"L", "EN", "AN"})
_MIRRORED: Final = str.maketrans("()[]{}<>«»", ")(][}{><»«")


def clusters(text: str) -> list[str]:
    """Return letters, each with the marks that are drawn over it."""
    found: list[str] = []
    for letter in text:
        if found and is_mark(letter):
            found[-1] += letter
        else:
            found.append(letter)
    return found


def is_mark(letter: str) -> bool:
    """Return whether a letter is drawn over the one before."""
    return unicodedata.category(letter) in {"Mn", "Mc", "Me"}


def visual(line: str) -> list[str]:
    """Return the clusters of a line from left to right."""
    found = clusters(line)
    directions = [_direction(cluster) for cluster in found]
    if "R" not in directions:
        return found
    base = next((one for one in directions if one), "L")
    directions = _resolved(directions, base)
    runs = [
        (direction, [cluster for _, cluster in run])
        for direction, run in groupby(zip(directions, found, strict=True), key=lambda one: one[0])
    ]
    ordered = reversed(runs) if base == "R" else runs
    return [cluster for direction, run in ordered for cluster in _in_run(direction, run)]


def joined(text: str) -> str:
    """Return a text whose Arabic letters have the forms of their places in the words."""
    forms = _forms()
    letters = list(text)
    out: list[str] = []
    at, before = 0, ""
    while at < len(letters):
        letter, after = letters[at], at + 1
        while after < len(letters) and unicodedata.category(letters[after]) == "Mn":
            after += 1
        follower = letters[after] if after < len(letters) else ""
        key = letter
        if letter == _LAM and letter + follower in forms:
            key, marks = letter + follower, letters[at + 1 : after]
            at = after
            after, follower = at + 1, letters[at + 1] if at + 1 < len(letters) else ""
        else:
            marks = letters[at + 1 : after]
        to_left = _joins(key, forms, "initial") and _joins(follower, forms, "final")
        to_right = _joins(before, forms, "initial") and _joins(key, forms, "final")
        name = {(0, 0): "isolated", (0, 1): "final", (1, 0): "initial", (1, 1): "medial"}
        form = name[int(to_left), int(to_right)]
        out += [forms.get(key, {}).get(form, letter), *marks]
        at, before = after, key
    return "".join(out)


def _joins(letter: str, forms: dict[str, dict[str, str]], form: str) -> bool:
    """Return whether a letter has the form that joins to a neighbour."""
    return letter == _TATWEEL or form in forms.get(letter, {})


@functools.cache
def _forms() -> dict[str, dict[str, str]]:
    """Return the forms of each Arabic letter, and of lam with alef, by their names in Unicode."""
    found: dict[str, dict[str, str]] = {}
    for code in (code for codes in _FORMS for code in codes):
        name, *letters = unicodedata.decomposition(chr(code)).split(" ")
        text = "".join(chr(int(letter, 16)) for letter in letters)
        if name[1:-1] in {"isolated", "final", "initial", "medial"} and (
            len(text) == 1 or (len(text) == 2 and text[0] == _LAM and text[1] in "آأإا")
        ):
            found.setdefault(text, {})[name[1:-1]] = chr(code)
    return found


def _direction(cluster: str) -> str:
    kind = unicodedata.bidirectional(cluster[0])
    return "R" if kind in _RIGHT else "L" if kind in _LEFT else ""


def _resolved(directions: Sequence[str], base: str) -> list[str]:
    """Return a direction for each; between two of the same they have that, else the base."""
    before: list[str] = []
    for direction in directions:
        before.append(direction or (before[-1] if before else base))
    after: list[str] = []
    for direction in reversed(directions):
        after.append(direction or (after[-1] if after else base))
    pairs = zip(before, reversed(after), strict=True)
    return [one if one == other else base for one, other in pairs]


def _in_run(direction: str, run: list[str]) -> list[str]:
    if direction == "L":
        return run
    return [cluster.translate(_MIRRORED) for cluster in reversed(run)]

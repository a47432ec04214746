"""Make text and JSON from outside safe to print and to store. Pure."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from typing import Any, Final

#: Returns a text from outside without the API key.
Hide = Callable[[str], str]

MESSAGE_MAX_CHARS: Final = 500

_MAX_DEPTH: Final = 64

# Terminal escapes whole (CSI, OSC, then any other), so that no remainder such as "[31m" is left.
_ESCAPES = re.compile(
    "\x1b\\[[0-?]*[ -/]*[@-~]|[\x1b]\\][^\x07\x1b]{0,300}(?:\x07|\x1b\\\\)?|\x1b[@-Z\\\\^_]?"
)
# Controls, surrogates, and the marks that change the reading direction of what follows.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\u2028\u2029\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]+"
)
# A database cannot store lone surrogates and NUL in a text.
_UNSTORABLE = re.compile("[\x00\ud800-\udfff]")


def unchanged(text: str) -> str:
    """Return a text as it is: hides nothing."""
    return text


def safe_text(value: Any, hide: Hide = unchanged, max_chars: int = MESSAGE_MAX_CHARS) -> str:
    """Return a text from outside, safe to print and to store; "" if it is not a text or number.

    Terminal escapes, controls and direction marks are removed, and white space becomes single
    spaces. The key is hidden before that, because removing could split it, and after it. Only then
    is the text shortened, so that no half of a key is left at the end.
    """
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return ""
    text = hide(str(value)[:100_000])
    if not (text.isascii() and text.isprintable()):
        text = _UNPRINTABLE.sub(" ", _ESCAPES.sub("", text))
    return shortened(hide(" ".join(text.split())), max_chars)


def shortened(text: str, max_chars: int) -> str:
    """Return a text of at most ``max_chars`` characters, with an ellipsis if it was cut."""
    return text if len(text) <= max_chars else text[: max_chars - 1] + "…"


def parse_json(body: bytes) -> Any:
    """Return the JSON value of a body, None if it is not usable JSON.

    Its texts can be stored, its numbers are finite, and it is at most 64 levels deep.
    """
    try:
        value = _JSON.decode(body.decode("utf-8-sig", "replace"))
        # Without numeric escapes there are neither lone surrogates nor NULs in it.
        if b"\\u" not in body and body.count(b"[") + body.count(b"{") <= _MAX_DEPTH:
            return value
        return map_texts(value, lambda text: _UNSTORABLE.sub("\ufffd", text))
    except (ValueError, RecursionError):
        return None


def map_texts(value: Any, change: Callable[[str], str], depth: int = 0) -> Any:
    """Return the same JSON value with every text changed. Raise ValueError if it is too deep."""
    if depth > _MAX_DEPTH:
        raise ValueError("nested too deeply")
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [map_texts(item, change, depth + 1) for item in value]
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return value if change(str(value)) == str(value) else change(str(value))
    if isinstance(value, dict):
        return {change(key): map_texts(item, change, depth + 1) for key, item in value.items()}
    return value


def _parse_int(digits: str) -> int | None:
    # No count of EvoLink has 40 digits, and parsing a million of them takes seconds.
    return int(digits) if len(digits) <= 40 else None


def _parse_float(digits: str) -> float | None:
    number = float(digits) if len(digits) <= 400 else math.inf
    return number if math.isfinite(number) else None


_JSON: Final = json.JSONDecoder(
    parse_int=_parse_int,
    parse_float=_parse_float,
    parse_constant=lambda _name: None,  # NaN and Infinity are not JSON, and cannot be stored
)

"""Frozen values that several parts share: requests, and the answers of EvoLink.

Sizes are in pixels, times in UTC. Money is in units, integer 1/10,000 credits, so that sums are
exact (EvoLink's amounts have at most four decimals).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from decimal import ROUND_HALF_UP, Decimal, InvalidOperation
from typing import Any, Final, TypeVar

from krea_dagster.errors import ConfigError

_T = TypeVar("_T")

MODEL: Final = "krea-2-turbo"

#: Output pixels (width, height) by size and quality, from EvoLink's documentation.
PIXELS: Final[Mapping[tuple[str, str], tuple[int, int]]] = {
    ("1:1", "1K"): (1024, 1024),
    ("1:1", "2K"): (2048, 2048),
    ("4:3", "1K"): (1152, 896),
    ("4:3", "2K"): (2304, 1728),
    ("3:4", "1K"): (896, 1152),
    ("3:4", "2K"): (1728, 2304),
    ("5:4", "1K"): (1152, 896),
    ("5:4", "2K"): (2240, 1792),
    ("4:5", "1K"): (896, 1152),
    ("4:5", "2K"): (1792, 2240),
    ("2:3", "1K"): (832, 1280),
    ("2:3", "2K"): (1664, 2496),
    ("3:2", "1K"): (1280, 832),
    ("3:2", "2K"): (2496, 1664),
    ("9:16", "1K"): (768, 1344),
    ("9:16", "2K"): (1472, 2688),
    ("16:9", "1K"): (1344, 768),
    ("16:9", "2K"): (2688, 1472),
    ("1:2", "1K"): (704, 1472),
    ("1:2", "2K"): (1408, 2816),
    ("2:1", "1K"): (1472, 704),
    ("2:1", "2K"): (2816, 1408),
}
SIZES: Final = tuple(dict.fromkeys(size for size, _ in PIXELS))
QUALITIES: Final = ("1K", "2K")

#: The seeds that are sent. With 0 the server would draw one and not report it.
SEED_MIN: Final = 1
SEED_MAX: Final = 1_048_576

UNITS_PER_CREDIT: Final = 10_000

#: A task id is part of a URL's path, where dots alone would mean another place.
_TASK_ID: Final = re.compile(r"(?!\.+\Z)[A-Za-z0-9._:-]{1,128}", re.ASCII)

#: The largest cap in credits, and the syntax of one.
MOST_CREDITS: Final = 1_000_000_000
_CREDITS: Final = re.compile(r"[0-9]{1,10}(?:\.[0-9]{1,4})?", re.ASCII)
_WHOLE: Final = re.compile(r"[0-9]{1,9}", re.ASCII)
#: Amounts of credits beyond this are refused: they would not fit the journal.
_ABSURD: Final = 10**14


def is_task_id(value: object) -> bool:
    """Return whether a value is a valid task id."""
    return isinstance(value, str) and _TASK_ID.fullmatch(value) is not None


def evolve(value: _T, **fields: Any) -> _T:
    """Return a frozen value with other fields, ten times as fast as ``dataclasses.replace``.

    No field is checked and ``__post_init__`` is not called.
    """
    after = object.__new__(type(value))
    after.__dict__.update(value.__dict__)
    after.__dict__.update(fields)
    return after


def units_from_credits(credits: float | str | Decimal) -> int:
    """Return credits in units, rounded to the nearest 1/10,000 credit.

    Uses the number's shortest decimal text, so that 0.45 is exactly 4,500. Raises ValueError for
    values that are not numbers, or beyond 10^14.
    """
    try:
        amount = Decimal(str(credits))
    except InvalidOperation:
        amount = Decimal("NaN")
    if not amount.is_finite() or abs(amount) > _ABSURD:
        raise ValueError(f"{str(credits)[:40]!r} is not an amount of credits")
    return int((amount * UNITS_PER_CREDIT).quantize(Decimal(1), ROUND_HALF_UP))


def parse_cap(value: float | str, name: str) -> int:
    """Parse a cap in credits that a person wrote, and return it in units.

    Accepts digits with an optional point and at most four decimals: no sign, exponent, space or
    grouping, because a misread number would be a wrong cap. Raises ConfigError, which contains
    ``name`` and the rule.
    """
    if not _CREDITS.fullmatch(str(value)) or Decimal(str(value)) > MOST_CREDITS:
        raise ConfigError(
            f"{name} is {str(value)[:60]!r}; use a number of credits from 0 to {MOST_CREDITS}, in "
            "plain digits with at most 4 decimals, such as 900 or 0.45"
        )
    return units_from_credits(str(value))


def parse_whole_number(text: str, name: str, *, most: int) -> int:
    """Parse a whole number from 1 to ``most`` that a person wrote, by the same rule."""
    if not _WHOLE.fullmatch(text) or not 1 <= int(text) <= most:
        raise ConfigError(
            f"{name} is {text[:60]!r}; use a whole number from 1 to {most}, in plain digits"
        )
    return int(text)


def credits_from_units(units: int) -> float:
    """Return units as credits."""
    return units / UNITS_PER_CREDIT


def credits_text(units: int) -> str:
    """Return units as exact decimal text in credits, such as ``0.45``."""
    return f"{Decimal(units) / UNITS_PER_CREDIT:f}"


@dataclass(frozen=True)
class Acknowledgement:
    """Why a warning about the spend is expected, who said so, and when."""

    reason: str
    by: str
    at: datetime


@dataclass(frozen=True)
class ImageRequest:
    """A request for one image: everything that determines it, and its identity.

    ``request_key`` is the hash of the other fields (``krea_dagster.prompts.requests``).
    ``seed`` is from 1 to 1048576, never 0.
    """

    request_key: str
    prompt: str
    size: str
    quality: str
    seed: int
    nsfw_check: bool
    attempt: int
    model: str = MODEL

    @property
    def pixels(self) -> tuple[int, int]:
        """Return the width and height that the image must have."""
        return PIXELS[self.size, self.quality]


@dataclass(frozen=True)
class Submission:
    """The answer to an accepted create call. The server does not send it again.

    ``credits_reserved_units`` is None if the answer did not say. ``replayed``: the server
    recognised the Idempotency-Key and created nothing. ``answer`` is the whole JSON object.
    """

    task_id: str
    status: str
    credits_reserved_units: int | None
    billing_rule: str | None
    user_group: str | None
    replayed: bool
    answer: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class TaskFailure:
    """Why a task failed. ``code`` is lower-cased, ``unknown_error`` if there was none."""

    code: str
    message: str


@dataclass(frozen=True)
class Task:
    """The state of a task, as the server reports it.

    ``status`` is ``pending``, ``processing``, ``completed``, ``failed``, ``cancelled``, or another
    text. ``progress`` is 0 to 100. ``results`` are links, if there are any. ``credits_used_units``
    and ``created_at`` are None unless the server reports them.
    """

    task_id: str
    status: str
    progress: int
    results: tuple[str, ...] = ()
    failure: TaskFailure | None = None
    credits_used_units: int | None = None
    created_at: datetime | None = None


@dataclass(frozen=True)
class AccountCredits:
    """The answer of ``GET /v1/credits``, in units. ``token_*`` is the key's own limit.

    ``token_remaining_units`` is meaningless if ``token_unlimited``. ``user_remaining_units`` may be
    negative.
    """

    user_remaining_units: int
    user_used_units: int
    token_remaining_units: int | None
    token_used_units: int | None
    token_unlimited: bool
    read_at: datetime

"""A reviewer's verdict on one image. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from krea_dagster.errors import InputError

KEEP: Final = "keep"
REJECT: Final = "reject"
FLAG: Final = "flag"
#: Takes back the last verdict.
NONE: Final = "none"
VERDICTS: Final = (KEEP, REJECT, FLAG, NONE)

_HEX: Final = frozenset("0123456789abcdef")
#: The most characters of each text.
_LONGEST: Final = {"verdict_id": 64, "reviewer": 255, "reason": 2000, "request_key": 64}
#: Texts of any length.
_NAMES: Final = ("prompt_id", "partition_key")


@dataclass(frozen=True)
class Verdict:
    """A reviewer's verdict on one image. Raises InputError if it cannot be stored.

    ``verdict_id`` is made by the caller and unique for each verdict, such as a UUID. ``verdict`` is
    one of ``VERDICTS``. The columns of the request, and ``table_id``, tell for which row the image
    was reviewed. ``number`` and ``at`` (UTC) are set when it is stored, unless ``at`` is given.
    """

    verdict_id: str
    image_sha256: str
    verdict: str
    reviewer: str
    request_key: str
    prompt_id: str
    sample: int
    attempt: int
    partition_key: str
    reason: str | None = None
    at: datetime | None = None
    number: int = 0
    table_id: str = ""

    def __post_init__(self) -> None:
        if self.verdict not in VERDICTS:
            raise InputError(f"unknown verdict {self.verdict!r}; use one of {', '.join(VERDICTS)}")
        if len(self.image_sha256) != 64 or not _HEX.issuperset(self.image_sha256):
            raise InputError(f"{self.image_sha256!r} is not a SHA-256 in lower case")
        for name, most in _LONGEST.items():
            value = getattr(self, name)
            if value is None and name == "reason":
                continue
            if not _can_be_kept(value, most) or (name != "reason" and not value.strip()):
                raise InputError(
                    f"a verdict's {name} must be a text of at most {most} characters, "
                    f"not {str(value)[:40]!r}"
                )
        for name in _NAMES:
            value = getattr(self, name)
            if not _can_be_kept(value, len(value)):
                raise InputError(f"a verdict's {name} has characters that cannot be stored")


def _can_be_kept(value: object, most: int) -> bool:
    """Whether every database takes a text: PostgreSQL takes no NUL, and none a lone surrogate."""
    if not isinstance(value, str) or len(value) > most or "\x00" in value:
        return False
    return value.encode("utf-8", "replace").decode() == value

"""What somebody thinks of one image: the words that there are, and the value. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Final

from krea_dagster.errors import InputError

KEEP: Final = "keep"
REJECT: Final = "reject"
FLAG: Final = "flag"
#: Takes the last verdict back.
NONE: Final = "none"
VERDICTS: Final = (KEEP, REJECT, FLAG, NONE)

_HEX: Final = frozenset("0123456789abcdef")
#: The longest texts that are kept, in characters.
_LONGEST: Final = {"verdict_id": 64, "reviewer": 255, "reason": 2000, "request_key": 64}
#: Texts of any length.
_NAMES: Final = ("prompt_id", "partition_key")


@dataclass(frozen=True)
class Verdict:
    """What somebody thinks of one image. Raises InputError where it could not be kept.

    ``verdict_id`` is made by whoever gives it, anew for each (a UUID does). ``verdict`` is one of
    ``VERDICTS``. The request's columns say what the image was made for when it was looked at.
    ``table_id`` is the prompt table that it was looked at for. ``number`` and ``at`` (UTC) are
    given when it is remembered; an ``at`` that is there already is kept.
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
            raise InputError(f"{self.verdict!r} is no verdict; give one of {', '.join(VERDICTS)}")
        if len(self.image_sha256) != 64 or not _HEX.issuperset(self.image_sha256):
            raise InputError(f"{self.image_sha256!r} is no image's SHA-256, in lower case")
        for name, most in _LONGEST.items():
            value = getattr(self, name)
            if value is None and name == "reason":
                continue
            if not _can_be_kept(value, most) or (name != "reason" and not value.strip()):
                raise InputError(
                    f"a verdict's {name} is a text of at most {most} characters, "
                    f"not {str(value)[:40]!r}"
                )
        for name in _NAMES:
            value = getattr(self, name)
            if not _can_be_kept(value, len(value)):
                raise InputError(f"a verdict's {name} holds characters that cannot be kept")


def _can_be_kept(value: object, most: int) -> bool:
    """Whether every database takes a text: PostgreSQL no zero, and neither half a character."""
    if not isinstance(value, str) or len(value) > most or "\x00" in value:
        return False
    return value.encode("utf-8", "replace").decode() == value

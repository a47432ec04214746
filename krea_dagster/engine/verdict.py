"""A reviewer's verdict on one image. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
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
_LONGEST: Final = {
    "verdict_id": 64,
    "reviewer": 255,
    "reason": 2000,
    "note": 2000,
    "request_key": 64,
}
_MAY_BE_EMPTY: Final = ("reason", "note")
#: Texts of any length.
_NAMES: Final = ("prompt_id", "partition_key")
#: The most tags of an image, and characters of a tag.
MOST_TAGS: Final = 50
LONGEST_TAG: Final = 64
#: Characters that separate tags, so that a tag contains none of them.
TAG_SEPARATORS: Final = ",;"


@dataclass(frozen=True)
class TagChange:
    """Tags to add to an image's tags, and tags to remove from them."""

    add: tuple[str, ...] = ()
    remove: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        checked_tags((*self.add, *self.remove))

    def applied_to(self, tags: Iterable[str]) -> tuple[str, ...]:
        """Return the tags after the change. Raises InputError if they are too many."""
        return checked_tags({*tags, *self.add} - set(self.remove))


@dataclass(frozen=True)
class Verdict:
    """A reviewer's verdict on one image.

    ``verdict_id`` is made by the caller and unique for each verdict, such as a UUID. ``verdict`` is
    one of ``VERDICTS``. The columns of the request, and ``table_id``, tell for which row the image
    was reviewed. ``number`` and ``at`` (UTC) are set when it is stored, unless ``at`` is given.

    Each stored verdict says everything about its image. A verdict that is given may leave out what
    it does not change: ``tags`` and ``note`` of None stay as they are (an empty note removes it),
    and ``tag_change`` changes some tags. With ``annotates`` only tags and note change: verdict and
    reason are those of the verdict before.
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
    note: str | None = None
    tags: tuple[str, ...] | None = None
    annotates: bool = False
    tag_change: TagChange | None = None

    def check(self) -> None:
        """Raise InputError if the verdict cannot be stored. Stored ones are not checked again."""
        if self.verdict not in VERDICTS:
            raise InputError(f"unknown verdict {self.verdict!r}; use one of {', '.join(VERDICTS)}")
        if len(self.image_sha256) != 64 or not _HEX.issuperset(self.image_sha256):
            raise InputError(f"{self.image_sha256!r} is not a SHA-256 in lower case")
        for name, most in _LONGEST.items():
            value = getattr(self, name)
            if value is None and name in _MAY_BE_EMPTY:
                continue
            if not _can_be_kept(value, most) or (name not in _MAY_BE_EMPTY and not value.strip()):
                raise InputError(
                    f"a verdict's {name} must be a text of at most {most} characters, "
                    f"not {str(value)[:40]!r}"
                )
        for name in _NAMES:
            value = getattr(self, name)
            if not _can_be_kept(value, len(value)):
                raise InputError(f"a verdict's {name} has characters that cannot be stored")
        if self.tags is not None:
            checked_tags(self.tags)

    def after(self, before: Verdict | None, at: datetime) -> Verdict:
        """Return the verdict as it is stored at a time after ``before``, the last on its image."""
        tags = () if before is None else before.tags or ()
        if self.tags is not None:
            tags = checked_tags(self.tags)
        if self.tag_change is not None:
            tags = self.tag_change.applied_to(tags)
        note = self.note
        if note is None and before is not None:
            note = before.note
        verdict, reason = self.verdict, self.reason
        if self.annotates:
            verdict = NONE if before is None else before.verdict
            reason = None if before is None else before.reason
        return replace(
            self,
            verdict=verdict,
            reason=reason,
            tags=tags,
            note=note or None,
            tag_change=None,
            at=at,
        )

    def said_after(self, before: Verdict | None) -> Verdict:
        """Return what counts once this verdict is stored: who judged stays with an annotation."""
        if not self.annotates or before is None:
            return self
        return replace(before, tags=self.tags, note=self.note)


def checked_tags(tags: Iterable[str]) -> tuple[str, ...]:
    """Return tags sorted, each once. Raises InputError where one cannot be stored."""
    found = tuple(sorted(set(tags)))
    for tag in found:
        if (
            not _can_be_kept(tag, LONGEST_TAG)
            or not tag
            or tag != " ".join(tag.split())
            or not tag.isprintable()
            or any(one in tag for one in TAG_SEPARATORS)
        ):
            raise InputError(
                f"{str(tag)[:LONGEST_TAG]!r} is not a tag: a tag has 1 to {LONGEST_TAG} "
                "characters, without commas, semicolons and surplus spaces"
            )
    if len(found) > MOST_TAGS:
        raise InputError(f"an image has at most {MOST_TAGS} tags, not {len(found)}")
    return found


def _can_be_kept(value: object, most: int) -> bool:
    """Whether every database takes a text: PostgreSQL takes no NUL, and none a lone surrogate."""
    if not isinstance(value, str) or len(value) > most or "\x00" in value:
        return False
    return value.isascii() or value.encode("utf-8", "replace").decode() == value

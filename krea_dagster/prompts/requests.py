"""The formulas for the identity and the seed of one image, and the defaults of a row.

Pure: no table, file or clock. The same row gives the same request on every machine and in every
version of this package: a change of a formula makes every stored image look like one that was
never bought. ``identity`` computes the same for whole columns. The first part of each hashed text
names the version of its formula.

All hashed texts are parts joined by the unit separator (U+001F), in UTF-8. The user's free text
is the last part, so that two different lists of parts never give the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from krea_dagster.errors import ConfigError, InputError
from krea_dagster.models import MODEL, QUALITIES, SEED_MIN, SIZES, ImageRequest

#: Most images that one row can request.
MAX_IMAGES: Final = 100

SEPARATOR: Final = "\x1f"


@dataclass(frozen=True)
class Defaults:
    """The settings of rows whose table leaves them empty or has no such column.

    Args:
        size: Aspect ratio, one of :data:`~krea_dagster.models.SIZES`.
        quality: ``1K`` or ``2K``.
        nsfw_check: Whether EvoLink applies its stricter content check.
        num_images: Images per row, 1 to 100.

    Raises:
        ConfigError: A value that EvoLink does not accept.
    """

    size: str = "1:1"
    quality: str = "1K"
    nsfw_check: bool = False
    num_images: int = 1

    def __post_init__(self) -> None:
        for name, allowed in (("size", SIZES), ("quality", QUALITIES)):
            value = getattr(self, name)
            if value not in allowed:
                raise ConfigError(
                    f"default {name} is {value!r}; it must be one of {', '.join(allowed)}"
                )
        if not isinstance(self.nsfw_check, bool):
            raise ConfigError(f"default nsfw_check is {self.nsfw_check!r}; it must be a bool")
        if type(self.num_images) is not int or not 1 <= self.num_images <= MAX_IMAGES:
            raise ConfigError(
                f"default num_images is {self.num_images!r}; "
                f"it must be a whole number from 1 to {MAX_IMAGES}"
            )


@dataclass(frozen=True)
class PlannedImage:
    """One image that a row requests. Several may share a request, which is bought once."""

    prompt_id: str
    sample: int
    partition_key: str
    request: ImageRequest


def request_key(
    *,
    prompt: str,
    size: str,
    quality: str,
    seed: int,
    nsfw_check: bool,
    attempt: int = 0,
    model: str = MODEL,
) -> str:
    """Return the identity of a request: 64 hexadecimal digits.

    It depends on what decides the image and on nothing else. Raises
    :class:`~krea_dagster.errors.InputError` for text that has no UTF-8 form.
    """
    flag = "1" if nsfw_check else "0"
    parts = ("krea-dagster/1", model, size, quality, str(seed), flag, str(attempt), prompt)
    return digest_of(parts)


def drawn_seed(prompt_id: str, sample: int = 0, attempt: int = 0) -> int:
    """Return the seed, 1 to 1048576, of a row that does not name one.

    Five hexadecimal digits are 1,048,576 values: every seed is equally likely.
    """
    digest = digest_of(("krea-dagster/1/seed", str(sample), str(attempt), prompt_id))
    return SEED_MIN + int(digest[:5], 16)


def digest_of(parts: Iterable[str]) -> str:
    """Return the SHA-256 of parts joined by the separator, in hexadecimal digits."""
    text = SEPARATOR.join(parts)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt or prompt_id is not valid text: {error.object[error.start]!a} "
            f"has no UTF-8 form; remove it"
        ) from error
    return hashlib.sha256(data).hexdigest()

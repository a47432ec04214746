"""Turn validated prompt rows into image requests: defaults, seeds, identity.

Pure: no table, no file, no clock. The same row gives the same requests on every machine and
in every version of this package; a change of a formula below makes every stored image look
like one that was never bought. The first part of each hashed text names the formula's version.

All hashed texts are parts joined by the unit separator (U+001F), in UTF-8. The one part that a
person writes freely comes last, so that no two different lists of parts give the same text.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from krea_dagster.errors import ConfigError, InputError
from krea_dagster.models import MODEL, QUALITIES, SEED_MAX, SEED_MIN, SIZES, ImageRequest

#: Most pictures that one row can ask for.
MAX_IMAGES: Final = 100

_SEPARATOR: Final = "\x1f"

#: How often a person asked for another picture of ``(prompt_id, sample)``; 0 where not named.
Attempts = Mapping[tuple[str, int], int] | Callable[[str, int], int]


@dataclass(frozen=True)
class Defaults:
    """What a row asks for where its table says nothing.

    Raises :class:`~krea_dagster.errors.ConfigError` for a value that EvoLink does not take.
    """

    size: str = "1:1"
    quality: str = "1K"
    nsfw_check: bool = False
    num_images: int = 1

    def __post_init__(self) -> None:
        if self.size not in SIZES:
            raise ConfigError(f"default size is {self.size!r}; it must be one of {_listed(SIZES)}")
        if self.quality not in QUALITIES:
            raise ConfigError(
                f"default quality is {self.quality!r}; it must be one of {_listed(QUALITIES)}"
            )
        if not isinstance(self.nsfw_check, bool):
            raise ConfigError(f"default nsfw_check is {self.nsfw_check!r}; it must be a bool")
        if type(self.num_images) is not int or not 1 <= self.num_images <= MAX_IMAGES:
            raise ConfigError(
                f"default num_images is {self.num_images!r}; "
                f"it must be a whole number from 1 to {MAX_IMAGES}"
            )


@dataclass(frozen=True)
class PromptRow:
    """One validated row of the prompt table, with the defaults filled in.

    ``row`` counts from 1 in the table's order. ``seed`` is None where one is to be drawn,
    else from 1 to 1048576.
    """

    row: int
    prompt_id: str
    prompt: str
    size: str
    quality: str
    seed: int | None
    nsfw_check: bool
    num_images: int
    partition_key: str


@dataclass(frozen=True)
class PlannedImage:
    """One image that a row asks for. Several may share a request; it is bought once.

    ``row`` is the row's number, 0 where it is not known.
    """

    prompt_id: str
    sample: int
    partition_key: str
    request: ImageRequest
    row: int = 0


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

    It hangs on what decides the picture and on nothing else. Raises
    :class:`~krea_dagster.errors.InputError` for text that has no UTF-8 form.
    """
    parts = (
        "krea-dagster/1",
        model,
        size,
        quality,
        str(seed),
        _flag(nsfw_check),
        str(attempt),
        prompt,
    )
    return _digest(parts)


def drawn_seed(prompt_id: str, sample: int = 0, attempt: int = 0) -> int:
    """Return the seed, 1 to 1048576, of a row that does not name one.

    Five hexadecimal digits are 1,048,576 values: every seed is equally likely.
    """
    digest = _digest(("krea-dagster/1/seed", str(sample), str(attempt), prompt_id))
    return SEED_MIN + int(digest[:5], 16)


def seed_for(seed: int | None, prompt_id: str, sample: int = 0, attempt: int = 0) -> int:
    """Return the seed of one image of a row.

    A seed of the row's own is used as it is for sample 0. Samples 1, 2 … take the next seeds,
    with 1 after 1048576, since the same seed would give the same picture. A raised ``attempt``
    keeps it: the attempt is part of the identity, and the person asked for this very seed.
    """
    if seed is None:
        return drawn_seed(prompt_id, sample, attempt)
    return SEED_MIN + (seed - SEED_MIN + sample) % (SEED_MAX - SEED_MIN + 1)


def derived_prompt_id(
    *, prompt: str, size: str, quality: str, seed: int | None, nsfw_check: bool
) -> str:
    """Return the prompt_id of a row whose table has no such column.

    Drawn from the row's content, so that it survives a new order of the rows. Rows that ask
    for the same thing share it.
    """
    parts = ("krea-dagster/1/id", size, quality, str(seed or 0), _flag(nsfw_check), prompt)
    return f"p-{_digest(parts)[:16]}"


def plan_images(
    rows: Iterable[PromptRow], attempts: Attempts | None = None
) -> Iterator[PlannedImage]:
    """Yield the images that the rows ask for: row by row, sample by sample.

    ``attempts`` says how often a person asked for another picture of ``(prompt_id, sample)``:
    a mapping, or a function of the two. It counts from 0, which is the default.
    """
    attempt_of = _attempt_reader(attempts)
    for row in rows:
        for sample in range(row.num_images):
            attempt = attempt_of(row.prompt_id, sample)
            seed = seed_for(row.seed, row.prompt_id, sample, attempt)
            key = request_key(
                prompt=row.prompt,
                size=row.size,
                quality=row.quality,
                seed=seed,
                nsfw_check=row.nsfw_check,
                attempt=attempt,
            )
            request = ImageRequest(
                request_key=key,
                prompt=row.prompt,
                size=row.size,
                quality=row.quality,
                seed=seed,
                nsfw_check=row.nsfw_check,
                attempt=attempt,
            )
            yield PlannedImage(row.prompt_id, sample, row.partition_key, request, row.row)


def partition_version(request_keys: Iterable[str]) -> str:
    """Return the data version of a partition: 16 hexadecimal digits.

    It hangs on the request keys alone: their order changes nothing, their number does.
    """
    return _digest(("krea-dagster/1/partition", *sorted(request_keys)))[:16]


def _attempt_reader(attempts: Attempts | None) -> Callable[[str, int], int]:
    if attempts is None:
        return lambda _prompt_id, _sample: 0
    if callable(attempts):
        return attempts
    table = attempts
    return lambda prompt_id, sample: table.get((prompt_id, sample), 0)


def _digest(parts: Iterable[str]) -> str:
    text = _SEPARATOR.join(parts)
    try:
        data = text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a prompt or prompt_id is not valid text: {error.object[error.start]!a} "
            f"has no UTF-8 form; remove it"
        ) from error
    return hashlib.sha256(data).hexdigest()


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(names)

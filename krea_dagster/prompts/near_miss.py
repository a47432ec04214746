"""Columns that nothing reads, although their names suggest it. Pure.

A name that clearly means a field which decides what is bought, in a table without that field, is a
problem: the table would buy other images than its owner expects. Any other is said.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from krea_dagster.prompts.cells import plain
from krea_dagster.prompts.column_names import read_as

#: Names of other APIs and tools for what a recognised column holds.
_OTHER_NAMES: Final[Mapping[str, str]] = {
    "n": "num_images",  # OpenAI
    "n_images": "num_images",
    "num_outputs": "num_images",  # Replicate
    "num_images_per_prompt": "num_images",  # diffusers
    "number_of_images": "num_images",  # Imagen
    "batch_size": "num_images",  # Stable Diffusion web UI
    "aspect_ratio": "size",  # Replicate, Imagen
    "aspect": "size",  # Midjourney
    "image_size": "size",  # fal
    "resolution": "quality",
    "random_seed": "seed",
    "rng_seed": "seed",
    "manual_seed": "seed",
    "enable_safety_checker": "nsfw_check",  # fal
    "webhook": "callback_url",
    "webhook_url": "callback_url",  # fal
}

#: Names of parameters that Krea 2 Turbo does not have.
_NO_EFFECT: Final[Mapping[str, str]] = {
    "negative_prompt": "negative prompt",
    "step": "number of steps",
    "steps": "number of steps",
    "num_steps": "number of steps",
    "num_inference_steps": "number of steps",
    "guidance": "guidance scale",
    "guidance_scale": "guidance scale",
    "cfg": "guidance scale",
    "cfg_scale": "guidance scale",
    "scheduler": "scheduler",
    "sampler": "sampler",
    "sampler_name": "sampler",
    "strength": "strength",
    "image_url": "input image",
    "reference_image": "input image",
}

#: Names under which other tables have their prompts.
_PROMPT_NAMES: Final = ("text", "caption", "description", "instruction", "query")

#: The columns that decide what is bought; ``prompt_id`` decides the seeds.
_DECIDING: Final = ("prompt", "prompt_id", "size", "quality", "seed", "nsfw_check", "num_images")
_FIELDS: Final = (*_DECIDING, "callback_url")

#: Names as short as these are one letter from other words (site, need): no letter is replaced.
_SHORT: Final = 4


@dataclass(frozen=True)
class NearMiss:
    """A column that nothing reads, and what is said of it. It may be a problem, which ``stops``."""

    column: str
    said: str
    stops: bool


def near_misses(names: Sequence[str], accepted: Collection[str]) -> Iterator[NearMiss]:
    """Yield the columns that seem to mean something, except the ``accepted`` ones."""
    there = set(names)
    for name in dict.fromkeys(names):
        if name in _FIELDS or name in accepted:
            continue
        if (field := field_meant(name)) is not None:
            if field == "prompt" and field not in there:
                continue  # the missing column is a problem, which names this one
            # With the field itself there, the other column decides nothing that is expected of it.
            yield NearMiss(name, _meant(name, field), field in _DECIDING and field not in there)
        elif (parameter := _BY_LETTERS.get(_letters(name))) is not None:
            yield NearMiss(
                name,
                f"Krea 2 Turbo has no {parameter}, and the column is only copied to the manifest",
                stops=False,
            )


def field_meant(name: str) -> str | None:
    """Return the recognised column that a name almost is, or that other tools call so."""
    letters = _letters(name)
    if (other := _OTHERS.get(letters)) is not None:
        return other
    for field in _FIELDS:
        if _is_close(letters, _letters(field)):
            return field
    return None


def prompt_meant(names: Sequence[str]) -> str | None:
    """Return the column that holds the prompts of a table without ``prompt``, by its name."""
    by_letters = {_letters(name): name for name in reversed(names)}
    return next((by_letters[name] for name in _PROMPT_NAMES if name in by_letters), None)


def _meant(name: str, field: str) -> str:
    return (
        f"is {field} meant? Rename it, or read it by {read_as(name, field)}; "
        f"{plain(name.strip())} alone there only copies it to the manifest"
    )


def _letters(name: str) -> str:
    """Return a name without what people write differently: case, blanks, signs between words."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return "".join(character for character in folded if character.isalnum())


def _is_close(name: str, field: str) -> bool:
    """Return whether two names are the same but for one letter."""
    if name == field:
        return True
    if abs(len(name) - len(field)) > 1:
        return False
    start = _common(name, field)
    end = _common(name[start:][::-1], field[start:][::-1])
    one, other = name[start : len(name) - end], field[start : len(field) - end]
    if len(name) == len(field):
        swapped = len(one) == 2 and one == other[::-1]
        return swapped or (len(one) == 1 and len(field) > _SHORT)
    # A number behind a name makes another name: prompt2.
    return len(one) + len(other) == 1 and not one.isdigit()


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


_OTHERS: Final = {_letters(name): field for name, field in _OTHER_NAMES.items()}
_BY_LETTERS: Final = {_letters(name): parameter for name, parameter in _NO_EFFECT.items()}

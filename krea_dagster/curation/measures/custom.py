"""Custom measures: a user's function, called on batches of images, with checked results."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA
from krea_dagster.errors import ConfigError

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


@dataclass(frozen=True)
class Measure:
    """A custom measure of images, such as an aesthetic or CLIP score.

    Values are cached by the image's sha256, ``name`` and ``version``, so a function runs once per
    image. It is called in one thread. Load a model on the first call, for example with
    ``functools.cache``::

        def aesthetic(images: list[Image.Image]) -> list[float]:
            return model()(images).tolist()

        Measure("aesthetic", aesthetic, version="2", batch_size=64)

    Args:
        name: The column's name: up to 63 letters, digits and underscores, beginning with a letter.
        function: Takes a list of Pillow images in RGB, at most ``batch_size``, and returns one
            number per image; None or NaN where there is no value.
        version: Change it when the function changes, and images are measured again.
        batch_size: Images in memory at once, about 4 MB each at 1024×1024 pixels.
        description: The column's description in Dagster.

    Raises:
        ConfigError: The name is invalid or reserved, the version is empty, or ``batch_size`` is
            less than 1.
    """

    name: str
    function: Callable[[list[Image.Image]], Any]
    version: str = "1"
    batch_size: int = 32
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"measure name {self.name!r} cannot be a column's name; use up to 63 letters, "
                "digits and underscores, beginning with a letter"
            )
        if self.name.lower() in MEASURES_SCHEMA.names:
            raise ConfigError(f"measure name {self.name!r} is reserved for a built-in measure")
        if not self.version:
            raise ConfigError(f"the measure {self.name!r} has an empty version")
        if self.batch_size < 1:
            raise ConfigError(
                f"the measure {self.name!r} has a batch_size of {self.batch_size}; it must be 1 "
                "or more"
            )

    def values(self, images: Sequence[Image.Image]) -> list[float | None]:
        """Return the value of each image, None where the function gives none.

        Raises ValueError for a result that is not one number per image, and the function's errors.
        """
        values = list(self.function(list(images)))
        if len(values) != len(images):
            raise ValueError(f"it returned {len(values)} values for {len(images)} images")
        return [_number(value) for value in values]


def checked(measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """Return the measures. Raises ConfigError for two with one name, regardless of case."""
    by_name: dict[str, Measure] = {}
    for one in measures:
        if one.name.lower() in by_name:
            raise ConfigError(f"two measures are named {one.name!r}")
        by_name[one.name.lower()] = one
    return tuple(by_name.values())


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except TypeError:
        raise ValueError(f"it returned {value!r}, which is not a number") from None
    return None if math.isnan(number) else number

"""A user's own measures: a function of pictures, called on batches, its answers checked."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final

from PIL import Image

from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA
from krea_dagster.errors import ConfigError

#: What stands for "no value" in an answer: None, or not a number.
Values = Sequence[float | None]

_NAME: Final = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,62}")


@dataclass(frozen=True)
class Measure:
    """A measure of one's own, such as an aesthetic or CLIP score.

    ``function`` takes a list of Pillow pictures in RGB, at most ``batch_size`` of them, and
    returns as many numbers; None or NaN where there is no value. It is called in one thread,
    and loads its model when it is first called, for example in a ``functools.cache``::

        def aesthetic(pictures: list[Image.Image]) -> list[float]:
            return model()(pictures).tolist()

        Measure("aesthetic", aesthetic, version="2", batch_size=64)

    The values are kept by the image's sha256, the ``name``, which is also the column's, and the
    ``version``: raise that when the function changes. ``batch_size`` pictures are in memory at
    once, 4 MB each at 1024×1024 pixels. Raises ConfigError for a name that is none or taken.
    """

    name: str
    function: Callable[[list[Image.Image]], Any]
    version: str = "1"
    batch_size: int = 32
    description: str = ""

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"a measure is named {self.name!r}; it names a column, so use up to 63 letters, "
                "digits and underscores, the first a letter"
            )
        if self.name.lower() in MEASURES_SCHEMA.names:
            raise ConfigError(f"a measure is named {self.name!r}, as one of those of every picture")
        if not self.version:
            raise ConfigError(f"the measure {self.name!r} has an empty version")
        if self.batch_size < 1:
            raise ConfigError(
                f"the measure {self.name!r} has a batch_size of {self.batch_size}; it must be 1 "
                "or more"
            )

    def values(self, pictures: Sequence[Image.Image]) -> list[float | None]:
        """The values of some pictures, in their order; None where the function gives none.

        Raises ValueError for an answer that is not as many numbers, and whatever the function
        raises.
        """
        answer = list(self.function(list(pictures)))
        if len(answer) != len(pictures):
            raise ValueError(f"it gave {len(answer)} values for {len(pictures)} pictures")
        return [_number(value) for value in answer]


def checked(measures: Iterable[Measure]) -> tuple[Measure, ...]:
    """The measures, no two of one name. Raises ConfigError."""
    seen: dict[str, Measure] = {}
    for one in measures:
        if one.name.lower() in seen:
            raise ConfigError(f"two measures are named {one.name!r}")
        seen[one.name.lower()] = one
    return tuple(seen.values())


def _number(value: Any) -> float | None:
    if value is None:
        return None
    try:
        number = float(value)
    except TypeError:
        raise ValueError(f"it gave {value!r}, which is no number") from None
    return None if math.isnan(number) else number

"""What a person wants of an export: form, splits, size of shards, columns, filters. Pure."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, get_args

from krea_dagster.curation.export.splits import Split, parse_splits
from krea_dagster.errors import ConfigError

Form = Literal["webdataset", "parquet", "imagefolder", "jsonl", "csv"]

#: The forms of an export.
FORMS: Final[tuple[Form, ...]] = get_args(Form)

#: Those of which a shard is one file; of the others it is a folder of images.
ONE_FILE: Final = frozenset({"webdataset", "parquet"})

#: A licence as the Hub and SPDX write it: ``mit``, ``cc-by-4.0``, ``LicenseRef-own``.
_LICENSE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class Filter:
    """A column and the values that a row may have there, as text; an empty one means none."""

    column: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class ExportSpec:
    """What is wanted. Raises ConfigError for what cannot be.

    ``everything`` takes all stored images of the manifests, else the accepted ones. A shard has
    at most ``shard_images`` images, and ``shard_bytes`` bytes of image files where more than one
    image is in it. ``columns`` names those that are handed on beside the image, in their order;
    None takes all but those that mean nothing elsewhere (``LEFT_OUT``). ``leaks`` may stay
    where images alike are in two splits. ``license``, ``title`` and ``source`` (what the prompts
    are of) are for the dataset card.
    """

    form: Form = "parquet"
    splits: tuple[Split, ...] = (Split.whole("train"),)
    everything: bool = False
    partitions: tuple[str, ...] | None = None
    filters: tuple[Filter, ...] = ()
    columns: tuple[str, ...] | None = None
    shard_images: int = 10_000
    shard_bytes: int = 500_000_000
    leaks: bool = False
    embed_parameters: bool = False
    sidecars: bool = False
    license: str | None = None
    title: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"there is no form {self.form!r}; it is one of {', '.join(FORMS)}")
        if self.shard_images < 1 or self.shard_bytes < 1:
            raise ConfigError("a shard holds at least one image, and one byte")
        if self.sidecars and self.form in ONE_FILE:
            raise ConfigError(
                f"sidecars lie beside image files, and {self.form} has none: a row's columns are "
                "in the shard already"
            )
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"the licence {self.license[:80]!r} is not an identifier such as cc-by-4.0; "
                "describe one of your own in words beside the dataset, and call it other"
            )

    @classmethod
    def parse(
        cls, *, splits: Sequence[str] = (), where: Sequence[str] = (), **fields: Any
    ) -> ExportSpec:
        """Make a spec of texts: ``splits`` as NAME=SHARE, ``where`` as COLUMN=VALUE.

        ``fields`` are the others. Raises ConfigError.
        """
        return cls(splits=parse_splits(splits), filters=parse_filters(where), **fields)


def parse_filters(texts: Sequence[str]) -> tuple[Filter, ...]:
    """Read filters: of one column any of the values, of several columns all. Raises ConfigError."""
    found: dict[str, list[str]] = {}
    for text in texts:
        column, equals, value = text.partition("=")
        if not equals or not column:
            raise ConfigError(f"the filter {text!r} is not COLUMN=VALUE")
        found.setdefault(column, []).append(value)
    return tuple(Filter(column, tuple(values)) for column, values in found.items())

"""The specification of an export: form, splits, shard sizes, columns, filters. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from krea_dagster.curation.column_filter import ColumnFilter, parse_filters
from krea_dagster.curation.export.splits import Split, parse_splits
from krea_dagster.errors import ConfigError

Form = Literal["webdataset", "parquet", "imagefolder", "jsonl", "csv"]

#: The formats of an export.
FORMS: Final[tuple[Form, ...]] = get_args(Form)

#: Formats whose shard is one file; in the others it is a folder of images.
ONE_FILE: Final = frozenset({"webdataset", "parquet"})

#: The formats that images can be converted to.
IMAGE_FORMATS: Final[tuple[str, ...]] = ("png", "jpeg", "webp")

#: A licence identifier of the Hub or SPDX: ``mit``, ``cc-by-4.0``, ``LicenseRef-own``.
_LICENSE: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+-]{0,60}")


@dataclass(frozen=True)
class ExportSpec:
    """The specification of an export.

    Args:
        form: ``parquet`` (images inside), ``imagefolder``, ``webdataset`` (tar shards), ``jsonl``
            or ``csv`` (image files and a table).
        splits: The splits and their shares of the prompts, which sum to 1.
        everything: Export all stored images instead of the accepted ones.
        partitions: Only these partitions; None for all.
        filters: Only rows that match all of these.
        kept: Only images that a person has kept.
        earlier: Also images of rows that were changed or removed, and of earlier attempts.
        prompt_ids: Only the rows with these; None for all.
        verdicts: Export the present verdicts with reason, tags, note, reviewer and time.
        columns: The exported columns, in order; None for all but those that are only meaningful in
            the storage root, such as ``image_path``. The measures of images are columns, too.
        names: Other names of exported columns, by the column's own.
        shard_images: The most images per shard.
        shard_bytes: The most bytes of image files per shard; a single image may exceed it.
        leaks: Keep similar images in several splits. By default only the last split keeps them.
        image_format: Convert images to ``png``, ``jpeg`` or ``webp``; None keeps the format.
        quality: Of JPEG and WebP files that are encoded, 1 to 100; 95 by default.
        longest_side: Make larger images smaller, so that their longer side has these pixels.
        mark: Mark the files as generated, in their metadata (IPTC); the pixels do not change.
        certificate: PEM file of a certificate and those it was issued under, to sign the files with
            content credentials (C2PA); needs the extra ``c2pa``.
        private_key: PEM file of the certificate's key.
        embed_parameters: Write prompt, seed and other parameters into PNG files.
        sidecars: Write a JSON file next to each image file.
        captions: Write the prompt as a text file next to each image file.
        push: A dataset repository of the Hugging Face Hub to push each version to, as OWNER/NAME;
            needs the extra ``hub``.
        public: Create that repository as a public one.
        license: The licence identifier for the dataset card.
        title: The title of the dataset card.
        source: The origin of the prompts, for the dataset card.

    Raises:
        ConfigError: A value is invalid.
    """

    form: Form = "parquet"
    splits: tuple[Split, ...] = (Split.whole("train"),)
    everything: bool = False
    partitions: tuple[str, ...] | None = None
    filters: tuple[ColumnFilter, ...] = ()
    kept: bool = False
    earlier: bool = False
    prompt_ids: frozenset[str] | None = None
    verdicts: bool = False
    columns: tuple[str, ...] | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    shard_images: int = 10_000
    shard_bytes: int = 500_000_000
    leaks: bool = False
    image_format: str | None = None
    quality: int | None = None
    longest_side: int | None = None
    mark: bool = True
    certificate: str | None = None
    private_key: str | None = field(default=None, repr=False)
    embed_parameters: bool = False
    sidecars: bool = False
    captions: bool = False
    push: str | None = None
    public: bool = False
    license: str | None = None
    title: str | None = None
    source: str | None = None

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ConfigError(f"unknown form {self.form!r}; use one of {', '.join(FORMS)}")
        if self.shard_images < 1 or self.shard_bytes < 1:
            raise ConfigError("shard_images and shard_bytes must be 1 or more")
        if (self.sidecars or self.captions) and self.form in ONE_FILE:
            what = "sidecars" if self.sidecars else "captions"
            raise ConfigError(
                f"{what} need image files, which {self.form} does not have; its shards contain "
                "the columns already"
            )
        self._check_images()
        if self.license is not None and not _LICENSE.fullmatch(self.license):
            raise ConfigError(
                f"the licence {self.license[:80]!r} is not an identifier such as cc-by-4.0; for "
                "another licence use 'other', and describe it in a file of the dataset"
            )

    def _check_images(self) -> None:
        if (self.certificate is None) != (self.private_key is None):
            raise ConfigError("content credentials need both a certificate and its private key")
        if self.image_format not in (None, *IMAGE_FORMATS):
            raise ConfigError(
                f"images cannot be converted to {self.image_format!r}; use one of "
                f"{', '.join(IMAGE_FORMATS)}"
            )
        if self.longest_side is not None and self.longest_side < 1:
            raise ConfigError("longest_side must be 1 pixel or more")
        if self.quality is None:
            return
        if not 1 <= self.quality <= 100:
            raise ConfigError("quality must be from 1 to 100")
        if self.image_format == "png" or (self.image_format is None and self.longest_side is None):
            raise ConfigError(
                "quality is for images that are converted to jpeg or webp, or made smaller"
            )

    @classmethod
    def parse(
        cls,
        *,
        splits: Sequence[str] = (),
        where: Sequence[str] = (),
        columns: Sequence[str] = (),
        **fields: Any,
    ) -> ExportSpec:
        """Return a specification with splits, filters and columns from texts.

        Args:
            splits: ``NAME=SHARE`` each.
            where: ``COLUMN=VALUE``, ``COLUMN>=VALUE`` and the like each.
            columns: ``NAME`` or ``NAME=EXPORTED_NAME`` each.
            **fields: The other fields.

        Raises:
            ConfigError: A text or value is invalid.
        """
        pairs = [(name, new) for name, _, new in (text.partition("=") for text in columns)]
        return cls(
            splits=parse_splits(splits),
            filters=parse_filters(where),
            columns=tuple(name for name, _ in pairs) or None,
            names={name: new for name, new in pairs if new},
            **fields,
        )

"""The sections of the component's YAML."""

from collections.abc import Sequence
from functools import partial
from typing import Any, Final, Literal

from pydantic import Field

from krea_dagster.application.curation import Curation
from krea_dagster.application.settings import Settings, SharedSettings, variable_of
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.models import MOST_CREDITS
from krea_dagster.plugin.checks import (
    CheckFactory,
    build_failure_share_check,
    build_files_check,
    build_images_check,
    build_manifest_schema_check,
    build_spend_check,
)
from krea_dagster.plugin.yaml_section import YamlSection

_Size = Literal["1:1", "4:3", "3:4", "5:4", "4:5", "2:3", "3:2", "9:16", "16:9", "1:2", "2:1"]


class KreaSettings(SharedSettings, YamlSection):
    """The settings of ``KreaResource``: how to reach EvoLink, and where to keep the images.

    Secrets are given by the names of their variables, so that no YAML and no page shows them.
    """

    api_key_env: str = Field(
        default=variable_of(Settings.model_fields["api_key"]),
        description="Name of the environment variable that holds the EvoLink API key.",
    )
    journal_url_env: str | None = Field(
        default=None,
        description=(
            "Name of the environment variable that holds the journal's SQLAlchemy URL. Without it "
            "the journal is SQLite in the storage root."
        ),
    )
    callback_secret_env: str | None = Field(
        default=None,
        description="Name of the environment variable that holds the secret of the callbacks.",
    )
    emulator: bool | None = Field(
        default=None,
        description=(
            "Use the emulator: the images are synthetic, and nothing is charged. By default if the "
            "variable of the key is not set."
        ),
    )


#: Fields that ``KreaResource`` does not have under this name and type.
BY_NAME: Final = {"api_key_env", "journal_url_env", "callback_secret_env", "emulator"}


class RowDefaults(YamlSection):
    """Values for what a row of the prompt table leaves open."""

    size: _Size = Field(default="1:1", description="Aspect ratio of an image.")
    quality: Literal["1K", "2K"] = Field(default="1K", description="1K or 2K.")
    num_images: int = Field(default=1, ge=1, le=100, description="Images of a prompt.")
    nsfw_check: bool = Field(default=False, description="Request the stricter content check.")


class FailureShareCheck(YamlSection):
    """Shares of failed rows above which the check warns or is an error."""

    warn_above: float = Field(default=0.01, description="Share above which it is a warning.")
    error_above: float = Field(default=0.05, description="Share above which it is an error.")


class SampledCheck(YamlSection):
    """The size and seed of a random sample; ``sample: null`` takes all files."""

    sample: int | None = Field(default=100, description="Number of files; null for all.")
    seed: int | None = Field(default=None, description="Seed of the sample, for a repeatable one.")


class SpendCheck(YamlSection):
    """The prices, their tolerance, and the maximum credits of a partition."""

    most_credits: float | None = Field(
        default=None, description="Maximum credits of a partition, for all runs."
    )
    tolerance: float = Field(
        default=0.0, description="Share above a price that is accepted; 0.1 is a tenth."
    )
    prices: dict[str, float] | None = Field(
        default=None, description="Credits per image by quality; by default the published ones."
    )


class NoSettings(YamlSection):
    """A check without settings: ``{}``."""


class Checks(YamlSection):
    """The asset checks of ``image_manifest``; only those that are named are built."""

    manifest_schema: NoSettings | None = Field(
        default=None, description="The manifest's columns, types and rows; {}."
    )
    failure_share: FailureShareCheck | None = Field(
        default=None, description="How many rows failed."
    )
    files: SampledCheck | None = Field(
        default=None, description="Every file exists and is whole; of a sample the hash."
    )
    pictures: SampledCheck | None = Field(
        default=None, description="Images of a sample are decoded and looked at."
    )
    spend: SpendCheck | None = Field(default=None, description="What rows cost.")

    def factories(self) -> list[CheckFactory]:
        """Return the factories of the named checks, with their settings."""
        known: dict[str, Any] = {
            "manifest_schema": build_manifest_schema_check,
            "failure_share": build_failure_share_check,
            "files": build_files_check,
            "pictures": build_images_check,
            "spend": build_spend_check,
        }
        named = ((name, getattr(self, name)) for name in known)
        return [
            partial(known[name], **settings.model_dump())
            for name, settings in named
            if settings is not None
        ]


class ExportSettings(YamlSection):
    """A dataset of the accepted images, as a separate asset."""

    form: Literal["parquet", "imagefolder", "webdataset", "jsonl", "csv"] = Field(
        default="parquet",
        description=(
            "parquet (images inside) and imagefolder are for the library datasets, webdataset has "
            "tar shards, jsonl and csv have image files and a table."
        ),
    )
    splits: list[str] = Field(
        default=[], description="Splits and their shares of the prompts, such as train=0.9."
    )
    where: list[str] = Field(
        default=[],
        description="Only rows with these values: COLUMN=VALUE, or >=, <=, >, <, != for =.",
    )
    everything: bool = Field(
        default=False, description="Take all stored images, not only the accepted ones."
    )
    columns: list[str] | None = Field(
        default=None,
        description=(
            "Exported columns, each as NAME or NAME=NEW_NAME; by default all that are meaningful "
            "elsewhere, and the measures."
        ),
    )
    kept: bool = Field(default=False, description="Only images that a person has kept.")
    earlier: bool = Field(
        default=False,
        description="Also images of rows that were changed or removed, and of earlier attempts.",
    )
    verdicts: bool = Field(
        default=False,
        description="Export the verdicts as columns: with reason, tags, note, reviewer and time.",
    )
    shard_images: int = Field(default=10_000, ge=1, description="Maximum images per shard.")
    shard_bytes: int = Field(default=500_000_000, ge=1, description="Maximum bytes per shard.")
    leaks: bool = Field(default=False, description="Keep similar images in several splits.")
    image_format: Literal["png", "jpeg", "webp"] | None = Field(
        default=None, description="Convert the images; by default they stay as they are."
    )
    quality: int | None = Field(
        default=None,
        ge=1,
        le=100,
        description="Quality of JPEG and WebP files that are encoded; 95 by default.",
    )
    longest_side: int | None = Field(
        default=None,
        ge=1,
        description="Make larger images smaller, so that their longer side has these pixels.",
    )
    mark: bool = Field(
        default=True,
        description="Mark PNG, JPEG and WebP files as generated, in their metadata (IPTC).",
    )
    certificate: str | None = Field(
        default=None,
        description=(
            "PEM file of a certificate, and those it was issued under: signs the files with "
            "content credentials (C2PA). Needs the extra c2pa."
        ),
    )
    private_key: str | None = Field(default=None, description="PEM file of the certificate's key.")
    embed_parameters: bool = Field(
        default=False, description="Write prompt, seed and so on into PNG files, as text."
    )
    sidecars: bool = Field(default=False, description="Write KEY.json next to each image file.")
    captions: bool = Field(
        default=False, description="Write KEY.txt, with the prompt, next to each image file."
    )
    push: str | None = Field(
        default=None,
        description=(
            "Dataset repository of the Hugging Face Hub to push each version to, OWNER/NAME, with "
            "the token in HF_TOKEN. Needs the extra hub."
        ),
    )
    public: bool = Field(default=False, description="Create that repository as a public one.")
    license: str | None = Field(
        default=None, description="Licence identifier for the card, such as cc-by-4.0."
    )
    title: str | None = Field(default=None, description="Title of the card.")
    source: str | None = Field(default=None, description="Origin of the prompts, for the card.")

    def spec(self) -> ExportSpec:
        """Return the specification. Raises ConfigError."""
        values = self.model_dump()
        values["columns"] = values["columns"] or ()
        return ExportSpec.parse(**values)


class CurationSettings(YamlSection):
    """Which images are accepted, and how many are wanted: the fields of ``Curation``."""

    accept: list[str] = Field(default=[], description="Bounds of measures, such as sharpness>=40.")
    require_keep: bool = Field(
        default=False,
        description=(
            "Accept only images that a person kept, not all except rejected and flagged ones."
        ),
    )
    one_of_duplicates: bool = Field(
        default=False, description="Accept only the best of near-duplicate images."
    )
    wanted: list[str] = Field(
        default=[],
        description=(
            "How many accepted images are wanted: prompt=3, column:NAME=500 or "
            "column:NAME:VALUE=20. Runs regenerate what was not accepted."
        ),
    )
    most_images: int | None = Field(
        default=None, ge=1, description="Maximum images bought for each prompt or value."
    )
    most_credits: float | None = Field(
        default=None,
        ge=0,
        le=MOST_CREDITS,
        description="Maximum credits spent on each prompt or value.",
    )
    exports: dict[str, ExportSettings] = Field(
        default={}, description="Datasets of the accepted images, by name."
    )

    def curation(self, measures: Sequence[Measure]) -> Curation:
        """Return the curation with custom measures. Raises ConfigError."""
        exports = {name: one.spec() for name, one in self.exports.items()}
        values = self.model_dump(exclude={"exports"})
        return Curation(measures=measures, exports=exports, **values)


class AssetPrompts(YamlSection):
    """Prompts that are the value of an asset of the project."""

    asset: str = Field(description="Key of the asset, such as raw/prompts.")


class ScheduleSettings(YamlSection):
    """When a schedule launches the job: by default when a day, week or month ends, or daily."""

    cron: str | None = Field(default=None, description="Another time, such as 0 6 * * *.")
    timezone: str | None = Field(default=None, description="The time zone of cron.")
    running: bool = Field(
        default=False, description="Turn it on. It buys, so it is off by default."
    )

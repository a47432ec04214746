"""From images to a dataset, as assets: measures, likeness, verdicts, and what is accepted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import dagster as dg

from krea_dagster.curation.accepted.quota import WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.plugin.assets.accepted import build_accepted_assets
from krea_dagster.plugin.assets.export import build_export
from krea_dagster.plugin.assets.images import KreaAssets
from krea_dagster.plugin.assets.measures import build_image_measures
from krea_dagster.plugin.assets.near_duplicates import (
    build_near_duplicates,
    build_no_near_duplicates_check,
)

DATASET_JOB_NAME = "krea_dataset"


@dataclass(frozen=True)
class Curation:
    """Which images are accepted, how many are wanted, and what is measured of them.

    ``measures`` are measures of one's own, beside those that are always taken. ``accept`` are
    bounds such as ``sharpness>=40``; with ``require_keep`` only what a person kept is accepted,
    else all that nobody rejected or flagged; with ``one_of_duplicates`` only the best of images
    that are alike. ``wanted`` is how many accepted images are wanted: ``prompt=3`` of each prompt,
    ``column:NAME=500`` of each value of a column, ``column:NAME:VALUE=20`` of one. For that a run
    asks again in place of what was not accepted, at most ``most_images`` images and
    ``most_credits`` credits for each prompt or value in all. ``exports`` are datasets to be made of
    the accepted images, each an asset of that name. Raises ConfigError.
    """

    measures: Sequence[Measure] = ()
    accept: Sequence[str] = ()
    require_keep: bool = False
    one_of_duplicates: bool = False
    wanted: Sequence[str] = ()
    most_images: int | None = None
    most_credits: float | None = None
    exports: Mapping[str, ExportSpec] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _ = self.rules, self.wanted_images  # so that a wrong one is refused where it is written

    @cached_property
    def rules(self) -> Rules:
        """What must hold of an accepted image."""
        return Rules.parse(
            self.accept,
            require_keep=self.require_keep,
            one_of_duplicates=self.one_of_duplicates,
        )

    @cached_property
    def wanted_images(self) -> WantedImages | None:
        """How many accepted images are wanted, and of what."""
        return WantedImages.parse(
            self.wanted, most_images=self.most_images, most_credits=self.most_credits
        )


def build_curation(
    curation: Curation,
    assets: KreaAssets,
    *,
    prefix: Sequence[str],
    group_name: str,
    resource_key: str,
) -> dg.Definitions:
    """Build ``image_measures``, ``near_duplicates``, ``verdicts`` and ``accepted_images``.

    With their checks, the sensor that reports what people have judged, and the jobs that make
    them anew. All are views of the journal and the image store: nothing here buys.
    """
    manifest_key = assets.image_manifest.key
    before = "".join(f"{part}_" for part in prefix)
    measures = build_image_measures(
        manifest_key,
        partitions_def=assets.partitions_def,
        prefix=prefix,
        group_name=group_name,
        resource_key=resource_key,
        further=curation.measures,
    )
    duplicates = build_near_duplicates(
        manifest_key, prefix=prefix, group_name=group_name, resource_key=resource_key
    )
    alike = build_no_near_duplicates_check(duplicates.key, manifest_key, resource_key=resource_key)
    accepted = build_accepted_assets(
        manifest_key,
        partitions_def=assets.partitions_def,
        prefix=prefix,
        group_name=group_name,
        resource_key=resource_key,
        rules=curation.rules,
        wanted=curation.wanted_images,
    )
    exports = [
        build_export(
            manifest_key,
            name=name,
            spec=spec,
            likeness_key=duplicates.key,
            prefix=prefix,
            group_name=group_name,
            resource_key=resource_key,
        )
        for name, spec in curation.exports.items()
    ]
    job = dg.define_asset_job(
        f"{before}{DATASET_JOB_NAME}",
        selection=dg.AssetSelection.assets(measures, duplicates, accepted.accepted),
        description="Measures the images, finds those that are alike, and takes what is accepted.",
    )
    return dg.Definitions(
        assets=[measures, duplicates, *accepted.all, *exports],
        asset_checks=[alike],
        jobs=[job, accepted.job],
        sensors=[accepted.sensor],
    )

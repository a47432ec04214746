"""From images to a dataset, as assets: measures, likeness, verdicts, and what is accepted."""

from collections.abc import Sequence

import dagster as dg

from krea_dagster.application.curation import Curation
from krea_dagster.plugin.assets.accepted import build_accepted_assets
from krea_dagster.plugin.assets.export import build_export
from krea_dagster.plugin.assets.images import KreaAssets
from krea_dagster.plugin.assets.measures import build_image_measures
from krea_dagster.plugin.assets.near_duplicates import (
    build_near_duplicates,
    build_no_near_duplicates_check,
)

DATASET_JOB_NAME = "krea_dataset"


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
        custom=curation.measures,
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

"""The assets from images to a dataset: measures, near-duplicates, verdicts, accepted images."""

import dagster as dg

from krea_dagster.application.curation import Curation
from krea_dagster.plugin.assets.accepted import build_accepted_assets
from krea_dagster.plugin.assets.export import build_export
from krea_dagster.plugin.assets.measures import build_image_measures
from krea_dagster.plugin.assets.near_duplicates import (
    build_near_duplicates,
    build_no_near_duplicates_check,
)
from krea_dagster.plugin.names import Names


def build_curation(
    names: Names, curation: Curation, partitions_def: dg.PartitionsDefinition[str]
) -> dg.Definitions:
    """Build ``image_measures``, ``near_duplicates``, ``verdicts``, ``accepted_images``, exports.

    With their checks, jobs, and the sensor that reports new verdicts. All are made from the
    journal and the stored images; nothing is bought.
    """
    measures = build_image_measures(names, partitions_def, custom=curation.measures)
    duplicates = build_near_duplicates(names)
    accepted = build_accepted_assets(
        names, partitions_def, rules=curation.rules, wanted=curation.wanted_images
    )
    exports = [build_export(names, name, spec) for name, spec in curation.exports.items()]
    job = dg.define_asset_job(
        names.prefixed("krea_dataset"),
        selection=dg.AssetSelection.assets(measures, duplicates, names.key("accepted_images")),
        description=("Measures the images, finds near-duplicates, and writes the accepted images."),
    )
    own = dg.Definitions(
        assets=[measures, duplicates, *exports],
        asset_checks=[build_no_near_duplicates_check(names)],
        jobs=[job],
    )
    return dg.Definitions.merge(own, accepted)

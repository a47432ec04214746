"""The asset ``near_duplicates`` and its check: which images exist more than once."""

from collections.abc import Mapping
from typing import Any, Final

import dagster as dg
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application.curation import current_verdicts
from krea_dagster.curation.similarity.near_duplicates import (
    NEAR_DUPLICATES_DESCRIPTIONS,
    NEAR_DUPLICATES_SCHEMA,
    DuplicateCounts,
    NearDuplicateSummary,
    count_duplicates,
    largest_clusters,
    near_duplicates_name,
    read_near_duplicates,
    update_near_duplicates,
)
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import krea_metadata, location_value, small_table, table_schema
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of

#: Maximum number of clusters in the metadata, and in a sentence.
_SHOWN: Final = 50
_NAMED: Final = 3

_NO_DUPLICATES: Final = "No image was bought twice, and no two are nearly equal."


def build_near_duplicates(names: Names) -> dg.AssetsDefinition:
    """Build ``near_duplicates``: clusters of similar images over all partitions.

    Made from the stored manifests and measures and the verdicts, without network. Two files are
    near-duplicates if their perceptual hashes differ in few of 256 bits; images whose hash has a
    low quality are compared by their sha256 only.
    """

    @dg.asset(
        key=names.key("near_duplicates"),
        deps=[names.manifest_key, names.key("image_measures")],
        group_name=names.group_name,
        kinds={"parquet"},
        required_resource_keys={names.resource_key},
        description=(
            "Images that were bought more than once, or are nearly equal, within and across "
            "prompts and partitions, and which one of each to keep."
        ),
        metadata={
            "dagster/column_schema": table_schema(
                NEAR_DUPLICATES_SCHEMA, NEAR_DUPLICATES_DESCRIPTIONS
            )
        },
    )
    def near_duplicates(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        krea = krea_of(context, names.resource_key)
        with step_log(context.log, "comparing the images with each other"), as_failure():
            storage = krea.open_storage()
            summary = update_near_duplicates(storage, names.prefix, verdicts=current_verdicts(krea))
            table = read_near_duplicates(storage, names.prefix)
            if table is None:
                table = NEAR_DUPLICATES_SCHEMA.empty_table()
            shown = largest_clusters(table, _SHOWN)
        return dg.MaterializeResult(
            metadata=krea_metadata(
                {
                    **duplicates_metadata(summary),
                    "dagster/row_count": len(table),
                    **({"largest_clusters": small_table(shown)} if shown else {}),
                    "path": location_value(storage.locate(near_duplicates_name(names.prefix))),
                }
            )
        )

    return near_duplicates


def build_no_near_duplicates_check(names: Names) -> dg.AssetChecksDefinition:
    """Build the check ``no_near_duplicates`` of ``near_duplicates``, which warns if there are any.

    It reads the stored table, names the largest clusters, and adds up the credits of the copies.
    """
    key = names.key("near_duplicates")

    @dg.asset_check(
        asset=key,
        name="no_near_duplicates",
        required_resource_keys={names.resource_key},
        description=_NO_DUPLICATES,
    )
    def no_near_duplicates(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with as_failure():
            storage = krea_of(context, names.resource_key).open_storage()
            table = read_near_duplicates(storage, names.prefix)
        if table is None:
            return dg.AssetCheckResult(
                passed=False,
                severity=dg.AssetCheckSeverity.WARN,
                description=f"Nothing was checked: {key.to_user_string()} does not exist yet.",
            )
        return _checked(table)

    return no_near_duplicates


def duplicates_metadata(summary: NearDuplicateSummary) -> Mapping[str, Any]:
    """Return figures that Dagster plots, and the copies by distance as a table."""
    copies = summary.copies
    values: dict[str, Any] = {
        "images": summary.images,
        "purchases": summary.purchases,
        **_counted(copies),
        "images_not_measured": summary.not_measured,
        "images_of_low_quality": summary.low_quality,
        "most_bits": summary.most_bits,
    }
    if copies.by_distance:
        values["copies_by_distance"] = small_table(
            {"bits": bits, "copies": count} for bits, count in copies.by_distance.items()
        )
    return values


def _counted(copies: DuplicateCounts) -> Mapping[str, Any]:
    return {
        "clusters": copies.clusters,
        "largest_cluster": copies.largest,
        "copies_exact": copies.exact,
        "copies_near": copies.near,
        "credits_in_copies": copies.credits,
        "copies_unpriced": copies.unpriced,
    }


def _checked(table: pa.Table) -> dg.AssetCheckResult:
    copies = count_duplicates(table)
    if not copies.clusters:
        return dg.AssetCheckResult(
            passed=True,
            severity=dg.AssetCheckSeverity.WARN,
            description=_NO_DUPLICATES,
            metadata=_counted(copies),
        )
    shown = largest_clusters(table, _SHOWN)
    named = "; ".join(
        f"{one['purchases']} similar to {str(one['prompt_id'])[:60]} sample {one['sample']} "
        f"(partition {one['partition_key']}, cluster {one['cluster'][:12]})"
        for one in shown[:_NAMED]
    )
    left = copies.clusters - _NAMED
    more = f"; and {left} more clusters" if left > 0 else ""
    return dg.AssetCheckResult(
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=redact.text(
            f"{copies.exact} images are exact copies and {copies.near} nearly equal ones, in "
            f"{copies.clusters} clusters; these copies cost {copies.credits:g} credits. "
            f"{named}{more}."
        ),
        metadata={**_counted(copies), "largest_clusters": small_table(shown)},
    )

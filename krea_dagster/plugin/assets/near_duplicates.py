"""The asset near_duplicates and its check: which pictures are there more than once."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import dagster as dg
import pyarrow as pa

from krea_dagster import redact
from krea_dagster.application.curation import current_verdicts
from krea_dagster.curation.measures.pdq import LEAST_QUALITY, NEAR_BITS
from krea_dagster.curation.similarity.multi_index_hash import MOST_BITS
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
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.metadata import location_value, small_table
from krea_dagster.plugin.resource import krea_of

#: Clusters that metadata shows, and that a sentence names.
_SHOWN: Final = 50
_NAMED: Final = 3


def build_near_duplicates(
    manifest_key: dg.AssetKey,
    *,
    measures_key: dg.AssetKey | None = None,
    prefix: Sequence[str] = (),
    group_name: str = "krea",
    resource_key: str = "krea",
    most_bits: int = NEAR_BITS,
    least_quality: int = LEAST_QUALITY,
) -> dg.AssetsDefinition:
    """Build ``near_duplicates``: clusters of pictures that are the same, over all partitions.

    Made of the manifests and the measures on file and of the verdicts, without network. Two files
    are near where their perceptual hashes differ in at most ``most_bits`` of 256 bits; pictures of
    a quality below ``least_quality`` are compared by their sha256 only. Raises ConfigError for a
    limit that cannot be.
    """
    if not 0 <= most_bits <= MOST_BITS or least_quality < 0:
        raise ConfigError(
            f"most_bits {most_bits} must be 0 to {MOST_BITS}, and least_quality {least_quality} "
            "not negative"
        )
    folders = manifest_folders(manifest_key)

    @dg.asset(
        key=dg.AssetKey([*prefix, "near_duplicates"]),
        deps=[manifest_key, measures_key or dg.AssetKey([*prefix, "image_measures"])],
        group_name=group_name,
        kinds={"parquet"},
        required_resource_keys={resource_key},
        description=(
            "Pictures that were bought more than once, or are nearly alike, within and across "
            "prompts and partitions, and which one of each to keep."
        ),
        metadata={"dagster/column_schema": _schema()},
    )
    def near_duplicates(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        krea = krea_of(context, resource_key)
        with as_failure():
            storage = krea.open_storage()
            figures = update_near_duplicates(
                storage,
                folders,
                verdicts=current_verdicts(krea),
                most_bits=most_bits,
                least_quality=least_quality,
            )
            table = _read(storage, folders)
            shown = largest_clusters(table, _SHOWN)
        return dg.MaterializeResult(
            metadata={
                **likeness_metadata(figures),
                "dagster/row_count": len(table),
                **({"largest_clusters": small_table(shown)} if shown else {}),
                "path": location_value(storage.locate(near_duplicates_name(folders))),
            }
        )

    return near_duplicates


def build_no_near_duplicates_check(
    likeness_key: dg.AssetKey, manifest_key: dg.AssetKey, *, resource_key: str = "krea"
) -> dg.AssetChecksDefinition:
    """Build the check ``no_near_duplicates`` of ``near_duplicates``: a warning where there are any.

    It names the largest clusters and says what went into copies. Reads the table on file.
    """
    folders = manifest_folders(manifest_key)

    @dg.asset_check(
        asset=likeness_key,
        name="no_near_duplicates",
        required_resource_keys={resource_key},
        description="No picture was bought twice, and no two are nearly alike.",
    )
    def no_near_duplicates(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with as_failure():
            table = read_near_duplicates(krea_of(context, resource_key).open_storage(), folders)
        if table is None:
            return dg.AssetCheckResult(
                passed=False,
                severity=dg.AssetCheckSeverity.WARN,
                description=(
                    f"{likeness_key.to_user_string()} was never made, so that nothing was checked."
                ),
            )
        return _checked(table)

    return no_near_duplicates


def likeness_metadata(figures: NearDuplicateSummary) -> Mapping[str, Any]:
    """The figures as Dagster plots them, and the copies by distance as a table."""
    copies = figures.copies
    values: dict[str, Any] = {
        "images": figures.images,
        "purchases": figures.purchases,
        **_counted(copies),
        "images_not_measured": figures.not_measured,
        "images_of_low_quality": figures.low_quality,
        "most_bits": figures.most_bits,
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
            description="No picture was bought twice, and no two are nearly alike.",
            metadata=_counted(copies),
        )
    shown = largest_clusters(table, _SHOWN)
    named = "; ".join(
        f"{one['purchases']} like {str(one['prompt_id'])[:60]} sample {one['sample']} "
        f"(partition {one['partition_key']}, cluster {one['cluster'][:12]})"
        for one in shown[:_NAMED]
    )
    left = copies.clusters - _NAMED
    more = f"; and {left} more clusters" if left > 0 else ""
    return dg.AssetCheckResult(
        passed=False,
        severity=dg.AssetCheckSeverity.WARN,
        description=redact.text(
            f"{copies.exact} pictures are there twice and {copies.near} are nearly alike, in "
            f"{copies.clusters} clusters; {copies.credits:g} credits went into these copies. "
            f"{named}{more}."
        ),
        metadata={**_counted(copies), "largest_clusters": small_table(shown)},
    )


def _read(storage: Storage, folders: Sequence[str]) -> pa.Table:
    table = read_near_duplicates(storage, folders)
    return NEAR_DUPLICATES_SCHEMA.empty_table() if table is None else table


def _schema() -> dg.TableSchema:
    return dg.TableSchema(
        columns=[
            dg.TableColumn(
                one.name, str(one.type), description=NEAR_DUPLICATES_DESCRIPTIONS[one.name]
            )
            for one in NEAR_DUPLICATES_SCHEMA
        ]
    )

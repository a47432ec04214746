"""The assets ``verdicts`` (external) and ``accepted_images``, with their job and check."""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import dagster as dg
import pyarrow as pa

from krea_dagster.curation.accepted.accepted_table import (
    ACCEPTED_COLUMNS,
    AcceptedPartition,
    AcceptedTableBuilder,
    accepted_schema,
)
from krea_dagster.curation.accepted.quota import GroupResult, WantedImages, quota_totals
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import DESCRIPTIONS, MANIFEST_SCHEMA
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.data_versions import report_in_step
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import (
    Metadata,
    krea_metadata,
    location_value,
    outcomes_metadata,
    small_table,
    table_schema,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import without_beta_warnings
from krea_dagster.plugin.progress import step_log
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.verdicts import build_verdicts_sensor

#: The check of a quota.
WANTED_CHECK_NAME: Final = "all_wanted_accepted"


def build_accepted_assets(
    names: Names,
    partitions_def: dg.PartitionsDefinition[str],
    *,
    rules: Rules,
    wanted: WantedImages | None,
) -> dg.Definitions:
    """Build ``verdicts``, ``accepted_images``, the sensor ``krea_verdicts`` and a job.

    ``wanted`` is how many images of each prompt or value are accepted. If the rules read measures
    or near-duplicates, ``accepted_images`` depends on ``image_measures`` and ``near_duplicates``
    too. A partition becomes stale when its verdicts change: a sensor reports their data versions,
    and so does each run. Everything is made from files and the journal, without network.
    """
    verdicts = dg.AssetSpec(
        names.key("verdicts"),
        deps=[names.manifest_key],
        partitions_def=partitions_def,
        group_name=names.group_name,
        kinds={"sql"},
        description="People's verdicts on the images, from the journal: keep, reject, flag.",
    )
    with without_beta_warnings():
        accepted = _build_accepted_images(names, partitions_def, rules, wanted)
    job = dg.define_asset_job(
        names.prefixed("krea_accepted"),
        selection=dg.AssetSelection.assets(accepted),
        description="Rebuilds the accepted images from the present verdicts; buys nothing.",
    )
    sensor = build_verdicts_sensor(names, partitions_def, rules)
    return dg.Definitions(assets=[verdicts, accepted], jobs=[job], sensors=[sensor])


def _build_accepted_images(
    names: Names,
    partitions_def: dg.PartitionsDefinition[str],
    rules: Rules,
    wanted: WantedImages | None,
) -> dg.AssetsDefinition:
    key, verdicts_key = names.key("accepted_images"), names.key("verdicts")
    deps = [names.manifest_key, verdicts_key]
    if rules.ranges:
        deps.append(names.key("image_measures"))
    if rules.one_of_duplicates:
        deps.append(names.key("near_duplicates"))

    @dg.asset(
        key=key,
        deps=deps,
        partitions_def=partitions_def,
        backfill_policy=dg.BackfillPolicy.single_run(),
        group_name=names.group_name,
        kinds={"parquet", "arrow"},
        required_resource_keys={names.resource_key},
        metadata={"dagster/column_schema": _shown_schema(accepted_schema(MANIFEST_SCHEMA))},
        check_specs=_check_specs(key, wanted),
        description="The rows of the manifest whose image passed the rules and the review.",
    )
    def accepted_images(context: dg.AssetExecutionContext) -> Iterator[dg.MaterializeResult[None]]:
        krea = krea_of(context, names.resource_key)
        keys = sorted(map(str, context.partition_keys))
        with step_log(context.log, "reading the manifests and the verdicts"), as_failure():
            if not krea.has_journal():
                root = krea.open_storage().locate("")
                raise ConfigError(f"there is no journal for {root} yet, and so no image")
            with krea.open_journal() as journal:
                builder = AcceptedTableBuilder.read(
                    krea.open_storage(), journal, rules, wanted, names.prefix
                )
                # Before the tables are made: they are made from exactly these verdicts.
                report_in_step(context, verdicts_key, builder.versions(keys))
                made, outcomes = builder.make(keys)
        for one in made:
            context.add_asset_metadata(
                krea_metadata(accepted_metadata(one)), partition_key=one.partition_key
            )
        if wanted is None:
            yield dg.MaterializeResult()
            return
        check = check_wanted(outcomes, wanted)
        context.log.info(check.description or "")
        yield dg.MaterializeResult(check_results=[check])

    return accepted_images


# -- metadata and the check -------------------------------------------------------------------


def accepted_metadata(made: AcceptedPartition) -> Metadata:
    """Return the metadata of one partition: rows, credits, and why rows are not accepted.

    ``credits`` are those of all images bought for the partition's rows, also of refused ones.
    """
    credits = credits_from_units(made.units)
    values: dict[str, Any] = {
        "dagster/partition_row_count": made.accepted,
        "accepted": made.accepted,
        "rejected": made.rejected,
        "waiting": made.waiting,
        "rows": sum(made.reasons.values()),
        "images_bought": made.images,
        "credits": credits,
        "path": location_value(made.path),
        "dagster/column_schema": _shown_schema(made.schema),
        "reasons": small_table(
            [{"reason": reason, "rows": count} for reason, count in made.reasons.most_common()]
        ),
    }
    if made.accepted:
        values["credits_per_accepted_image"] = round(credits / made.accepted, 4)
    return values


def _shown_schema(schema: pa.Schema) -> dg.TableSchema:
    return table_schema(schema, {**DESCRIPTIONS, **ACCEPTED_COLUMNS})


def check_wanted(outcomes: Sequence[GroupResult], wanted: WantedImages) -> dg.AssetCheckResult:
    """Check that each group has exactly the wanted number of accepted images; name the others."""
    totals = quota_totals(outcomes)
    lacking = totals["groups"] - totals["groups_reached"]
    short = [one for one in outcomes if one.short]
    said = f"{totals['accepted']} of {totals['wanted']} wanted images are accepted"
    if lacking:
        said += f"; of {totals['groups']} groups (each {wanted.of}) {lacking} lack some"
    if short:
        names = ", ".join(one.name for one in short[:5]) + (", …" if len(short) > 5 else "")
        said += f", and {len(short)} stay short: {names} ({short[0].why})"
    if lacking and not short:
        said += "; these are under way, wait for a review, or are requested by the next run"
    return dg.AssetCheckResult(
        passed=not lacking,
        check_name=WANTED_CHECK_NAME,
        # A review or a run may still bring the others.
        severity=dg.AssetCheckSeverity.ERROR if short else dg.AssetCheckSeverity.WARN,
        description=f"{said}.",
        metadata=outcomes_metadata(outcomes),
    )


def _check_specs(key: dg.AssetKey, wanted: WantedImages | None) -> list[dg.AssetCheckSpec]:
    if wanted is None:
        return []
    return [
        dg.AssetCheckSpec(
            WANTED_CHECK_NAME,
            asset=key,
            description=f"Each {wanted.of} has the wanted number of accepted images.",
        )
    ]

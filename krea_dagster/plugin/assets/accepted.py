"""The assets verdicts (external) and accepted_images, and the sensor that reports new verdicts."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final

import dagster as dg
import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.curation.accepted.accepted_table import (
    ACCEPTED_COLUMNS,
    AcceptedPartition,
    AcceptedTableBuilder,
    accepted_schema,
)
from krea_dagster.curation.accepted.quota import GroupResult, WantedImages, quota_totals
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.manifest import MANIFEST_SCHEMA
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.data_versions import (
    changed_versions,
    knows_partition,
    last_versions,
    report_in_step,
    version_events,
)
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.metadata import (
    Metadata,
    location_value,
    outcomes_metadata,
    small_table,
    table_schema,
)
from krea_dagster.plugin.quiet_beta import quiet_beta
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.change_marks import mark_of_reports

ACCEPTED_ASSET: Final = "accepted_images"
VERDICTS_ASSET: Final = "verdicts"
ACCEPTED_JOB_NAME: Final = "krea_accepted"
VERDICTS_SENSOR_NAME: Final = "krea_verdicts"
WANTED_CHECK_NAME: Final = "all_wanted_accepted"

#: Partitions that one tick reports, each by two events in Dagster's database.
_MOST_REPORTS: Final = 250
_SAME: Final = "Nobody has judged an image since."


@dataclass(frozen=True)
class KreaAccepted:
    """What people think of the images, the images that are accepted, their sensor and their job."""

    verdicts: dg.AssetSpec
    accepted: dg.AssetsDefinition
    sensor: dg.SensorDefinition
    job: Any

    @property
    def all(self) -> list[dg.AssetSpec | dg.AssetsDefinition]:
        """The assets, for ``dagster.Definitions``."""
        return [self.verdicts, self.accepted]


@quiet_beta
def build_accepted_assets(
    manifest_key: dg.AssetKey,
    *,
    partitions_def: dg.PartitionsDefinition[str],
    prefix: Sequence[str] = (),
    group_name: str = "krea",
    resource_key: str = "krea",
    rules: Rules | None = None,
    wanted: WantedImages | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    minimum_interval_s: int = 60,
) -> KreaAccepted:
    """Build ``verdicts``, ``accepted_images``, the sensor ``krea_verdicts`` and a job.

    ``rules`` say which images are accepted (``curation.accepted``; by default all that are stored
    and not rejected or flagged), and ``wanted`` how many of each prompt or value are taken. Where
    they read measures or likeness, ``accepted_images`` hangs on ``image_measures`` and
    ``near_duplicates`` too. A partition becomes stale where its verdicts change: a sensor reports
    their data versions, and so does each run. All is made from files and the journal, without
    network.
    """
    rules = rules or Rules()
    folders = manifest_folders(manifest_key)
    verdicts_key, accepted_key = (
        dg.AssetKey([*prefix, name]) for name in (VERDICTS_ASSET, ACCEPTED_ASSET)
    )
    deps = [manifest_key, verdicts_key]
    if rules.ranges:
        deps.append(dg.AssetKey([*prefix, "image_measures"]))
    if rules.one_of_duplicates:
        deps.append(dg.AssetKey([*prefix, "near_duplicates"]))
    verdicts = dg.AssetSpec(
        verdicts_key,
        deps=[manifest_key],
        partitions_def=partitions_def,
        group_name=group_name,
        kinds={"sql"},
        description="What people think of the images: kept, rejected, flagged, in the journal.",
    )

    @dg.asset(
        key=accepted_key,
        deps=deps,
        partitions_def=partitions_def,
        backfill_policy=backfill_policy or dg.BackfillPolicy.single_run(),
        group_name=group_name,
        kinds={"parquet", "pyarrow"},
        automation_condition=automation_condition,
        required_resource_keys={resource_key},
        metadata={"dagster/column_schema": shown_schema(accepted_schema(MANIFEST_SCHEMA))},
        check_specs=_check_specs(accepted_key, wanted),
        description="The rows of the manifest whose image passed the rules and the review.",
    )
    def accepted_images(
        context: dg.AssetExecutionContext,
    ) -> Iterator[dg.MaterializeResult[None]]:
        krea = krea_of(context, resource_key)
        keys = sorted(map(str, context.partition_keys))
        with as_failure(), _journal(krea) as journal:
            accepting = AcceptedTableBuilder.read(
                krea.open_storage(), journal, rules, wanted, folders
            )
            # Before they are made: these verdicts, and no later ones, are what they are made of.
            report_in_step(context, verdicts_key, accepting.versions(keys))
            made, outcomes = accepting.make(keys)
        for one in made:
            context.add_asset_metadata(accepted_metadata(one), partition_key=one.partition_key)
        if wanted is None:
            yield dg.MaterializeResult()
            return
        context.log.info(check_wanted(outcomes, wanted).description or "")
        yield dg.MaterializeResult(check_results=[check_wanted(outcomes, wanted)])

    job = dg.define_asset_job(
        "_".join([*prefix, ACCEPTED_JOB_NAME]),
        selection=dg.AssetSelection.assets(accepted_images),
        description="Takes the accepted images as people have judged by now; buys nothing.",
    )
    sensor = build_verdicts_sensor(
        manifest_key,
        verdicts_key,
        partitions_def,
        rules,
        name="_".join([*prefix, VERDICTS_SENSOR_NAME]),
        resource_key=resource_key,
        minimum_interval_s=minimum_interval_s,
    )
    return KreaAccepted(verdicts, accepted_images, sensor, job)


# -- what has been judged since --------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What the sensor keeps between ticks: the last verdict, and the last report of a manifest."""

    number: int
    manifests: str

    @classmethod
    def from_cursor(cls, cursor: str | None) -> "_Seen | None":
        """Read a cursor; None for none, and for one of another version of this package."""
        try:
            return cls(**json.loads(cursor or "null"))
        except (TypeError, ValueError):
            return None


def build_verdicts_sensor(
    manifest_key: dg.AssetKey,
    verdicts_key: dg.AssetKey,
    partitions_def: dg.PartitionsDefinition[str],
    rules: Rules,
    *,
    name: str,
    resource_key: str = "krea",
    minimum_interval_s: int = 60,
    most_reports: int = _MOST_REPORTS,
) -> dg.SensorDefinition:
    """Build the sensor that reports the partitions of ``verdicts`` whose images were judged anew.

    Where nobody has judged, and no manifest was made, a tick asks the journal for one number and
    Dagster for one place. Else it reads the hashes of the images in the manifests, and reports
    the partitions whose data version is not the one last reported, ``most_reports`` at most in
    one tick. It is on by default, and starts no run.
    """
    folders = manifest_folders(manifest_key)

    @dg.sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description=f"Reports the partitions of {verdicts_key.to_user_string()} that have changed.",
    )
    def verdicts_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        krea = krea_of(context, resource_key)
        instance = context.instance
        try:
            if not krea.has_journal():
                return dg.SkipReason("There is no journal yet, so that nobody has judged an image.")
            with krea.open_journal() as journal:
                # Noted before the verdicts are read: what comes in between is seen again.
                seen = _Seen(
                    journal.verdicts.last_number(), mark_of_reports(instance, [manifest_key])
                )
                if seen == _Seen.from_cursor(context.cursor):
                    return dg.SkipReason(_SAME)
                accepting = AcceptedTableBuilder.read(
                    krea.open_storage(), journal, rules, None, folders
                )
                versions = accepting.versions(accepting.partitions())
        except KreaError as error:
            return dg.SkipReason(str(error))
        has_key = knows_partition(instance, partitions_def)
        last = last_versions(instance, verdicts_key)
        changed = [
            (partition, version)
            for partition, version in sorted(changed_versions(versions, last).items())
            if partition in versions and has_key(partition)
        ]
        if now := changed[:most_reports]:
            rest = len(changed) > len(now)
            return dg.SensorResult(
                asset_events=[event for one in now for event in version_events(verdicts_key, *one)],
                cursor=context.cursor if rest else json.dumps(asdict(seen)),
            )
        return dg.SensorResult(skip_reason=_SAME, cursor=json.dumps(asdict(seen)))

    return verdicts_sensor


# -- what is shown ---------------------------------------------------------------------------


def accepted_metadata(made: AcceptedPartition) -> Metadata:
    """The metadata of one partition: counts of rows, credits, and why rows are not accepted.

    ``credits`` are those of all that was bought for the partition's rows, the refused among them.
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
        "dagster/column_schema": shown_schema(made.schema),
        "reasons": small_table(
            [{"reason": reason, "rows": count} for reason, count in made.reasons.most_common()]
        ),
    }
    if made.accepted:
        values["credits_per_accepted_image"] = round(credits / made.accepted, 4)
    return values


def shown_schema(schema: pa.Schema) -> dg.TableSchema:
    """The columns of accepted images as Dagster shows them."""
    shown = table_schema(schema)
    columns = [
        dg.TableColumn(one.name, one.type, description=ACCEPTED_COLUMNS[one.name])
        if one.name in ACCEPTED_COLUMNS
        else one
        for one in shown.columns
    ]
    return dg.TableSchema(columns, shown.constraints)


def check_wanted(outcomes: Sequence[GroupResult], wanted: WantedImages) -> dg.AssetCheckResult:
    """Whether each group has exactly as many accepted images as are wanted; names the short."""
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
        said += "; all of these are under way, wait for a review, or are asked for by the next run"
    return dg.AssetCheckResult(
        passed=not lacking,
        check_name=WANTED_CHECK_NAME,
        # What a review or a run still brings is no error.
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
            description=f"Each {wanted.of} has as many accepted images as are wanted of it.",
        )
    ]


def _journal(krea: Backend) -> Any:
    if not krea.has_journal():
        raise ConfigError(
            f"there is no journal for {krea.open_storage().locate('')} yet, and so no image"
        )
    return krea.open_journal()

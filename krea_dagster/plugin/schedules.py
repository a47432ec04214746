"""A schedule for the assets of a prompt table, for all kinds of partitions."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import groupby
from typing import Final

import dagster as dg

from krea_dagster.errors import ConfigError
from krea_dagster.plugin.assets.images import KreaAssets
from krea_dagster.plugin.names import JOB_NAME, MANIFEST_ASSET, Names, prefix_of
from krea_dagster.plugin.partitions import COLUMN_DIMENSION, range_tags, time_dimension
from krea_dagster.prompts import MultiPartitions

#: Every day at midnight.
_DAILY: Final = "0 0 * * *"


def build_krea_schedule(
    assets: KreaAssets | dg.Definitions,
    *,
    name: str | None = None,
    cron_schedule: str | None = None,
    execution_timezone: str | None = None,
    key_prefix: str | Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    default_status: dg.DefaultScheduleStatus = dg.DefaultScheduleStatus.STOPPED,
) -> dg.ScheduleDefinition:
    """Build a schedule of the job ``krea_images``, for the partitions of its assets.

    With partitions by day, week or month it launches the last complete partition as soon as it has
    ended, in the partitions' time zone; with a column as well, one run for each of its values. With
    hash buckets or a column's values it launches all partitions, every day at midnight UTC: images
    are never bought twice, so this buys new prompts and what was left for later.

    A run takes as many partitions as the backfill policy allows, and a repeated tick launches no
    run twice.

    Args:
        assets: Those of ``build_krea_assets``, together with a job ``krea_images``, or the result
            of ``build_krea_definitions``.
        name: Name of the schedule; ``krea_schedule`` with the prefix by default.
        cron_schedule: Another time.
        execution_timezone: The time zone of ``cron_schedule``.
        key_prefix: The prefix that ``build_krea_definitions`` was given.
        tags: Tags of the runs.
        default_status: Off by default, as every schedule that spends money.

    Returns:
        The schedule.

    Raises:
        ConfigError: if there are no such assets.

    Example::

        defs = build_krea_definitions(prompts="data/prompts", partition_by="day:day", krea=krea)
        schedule = build_krea_schedule(defs)
        defs = dg.Definitions.merge(defs, dg.Definitions(schedules=[schedule]))
    """
    images, manifest = _assets_of(assets, prefix_of(key_prefix))
    partitions_def = images.partitions_def
    if partitions_def is None:
        raise ConfigError(f"{images.key.to_user_string()} has no partitions")
    names = Names(tuple(images.key.path[:-1]))
    time = time_dimension(partitions_def)
    policy = images.backfill_policy
    most = policy.max_partitions_per_run if policy else 1

    @dg.schedule(
        name=name or names.prefixed("krea_schedule"),
        job_name=names.prefixed(JOB_NAME),
        cron_schedule=cron_schedule or (_DAILY if time is None else time.cron_schedule),
        execution_timezone=execution_timezone or ("UTC" if time is None else time.timezone),
        default_status=default_status,
        description=(
            "Buys the images of the partition that has just ended."
            if time is not None
            else "Buys new images, and those that were left for later, in all partitions."
        ),
    )
    def krea_schedule(
        context: dg.ScheduleEvaluationContext,
    ) -> list[dg.RunRequest] | dg.SkipReason:
        at = context.scheduled_execution_time
        runs = list(_runs(context.instance, partitions_def, at, most))
        if not runs:
            return dg.SkipReason("There is no partition to launch.")
        return [
            dg.RunRequest(
                run_key=f"{at.astimezone(timezone.utc).isoformat()}/{first}",
                tags={**(tags or {}), **range_tags(first, last)},
                asset_selection=[images.key, manifest],
            )
            for first, last in runs
        ]

    return krea_schedule


def _assets_of(
    assets: KreaAssets | dg.Definitions, prefix: Sequence[str]
) -> tuple[dg.AssetsDefinition, dg.AssetKey]:
    if isinstance(assets, KreaAssets):
        return assets.images, assets.image_manifest.key
    key = dg.AssetKey([*prefix, "images"])
    for one in assets.assets or ():
        if isinstance(one, dg.AssetsDefinition) and key in one.keys:
            return one, dg.AssetKey([*prefix, MANIFEST_ASSET])
    raise ConfigError(
        f"there is no asset {key.to_user_string()} in these definitions; give the key_prefix "
        "that build_krea_definitions was given"
    )


def _runs(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    at: datetime,
    most: int | None,
) -> Iterator[tuple[str, str]]:
    """Yield the runs of a tick: the first and the last partition of each."""
    time = time_dimension(partitions_def)
    if time is None:
        keys = partitions_def.get_partition_keys(dynamic_partitions_store=instance)
        for chunk in _chunks(keys, most):
            yield chunk[0], chunk[-1]
        return
    ended = _ended(time, at)
    if ended is None:
        return
    if not isinstance(partitions_def, dg.MultiPartitionsDefinition):
        yield ended, ended
        return
    within = partitions_def.get_partitions_def_for_dimension(COLUMN_DIMENSION)
    for value in within.get_partition_keys(dynamic_partitions_store=instance):
        # A range is a product, so that each value of the column is a run of its own.
        key = f"{value}{MultiPartitions.BAR}{ended}"
        yield key, key


def _ended(time: dg.TimeWindowPartitionsDefinition, at: datetime) -> str | None:
    """Return the last partition that has ended; None before the first one has."""
    window = time.get_prev_partition_window(at)
    return (
        None if window is None else time.get_partition_key_for_timestamp(window.start.timestamp())
    )


def _chunks(keys: Sequence[str], most: int | None) -> Iterator[list[str]]:
    most = most or max(1, len(keys))
    for _, chunk in groupby(enumerate(keys), lambda numbered: numbered[0] // most):
        yield [key for _, key in chunk]

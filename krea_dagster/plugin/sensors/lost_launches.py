"""Finds launches of the automation that came to nothing, and makes them again, each once.

The automation launches several partitions as a backfill, and counts them as requested. If Dagster's
daemon cannot work on the backfill (the code location does not load, as during a deployment), the
backfill fails before it has made a run. The automation does not request these partitions again
before their prompts change, and no failed run says so. (dagster 1.13.27, ``asset_daemon.py`` and
``asset_backfill.py``.)
"""

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, Final

import dagster as dg

from krea_dagster.plugin.delivered import delivered_partitions
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import keys_of_run, range_tags, ranges

#: Dagster's tags of what an automation condition has launched, and of a backfill's runs.
_BY_AUTOMATION: Final = "dagster/from_automation_condition"
_BACKFILL: Final = "dagster/backfill"
#: The tag of a run that makes a launch again: the backfill that came to nothing.
RELAUNCH_TAG: Final = "krea/relaunch_of"

#: A launch that is older than this is left alone: a person has seen it.
_LAST_AGE: Final = timedelta(days=1)
#: Backfills that a tick considers, the newest first.
_MOST_BACKFILLS: Final = 25


def lost_launches(
    context: dg.SensorEvaluationContext, names: Names, images: dg.AssetsDefinition, now: datetime
) -> list[dg.RunRequest]:
    """Return a run for each range of partitions that a failed backfill has made no run for.

    A run that was made and failed is not made again. Dagster launches no run key twice, so that a
    launch that comes to nothing once more is left to people.
    """
    return [
        request
        for backfill in context.instance.get_backfills(limit=_MOST_BACKFILLS)
        if backfill.status.value == "FAILED"
        and _BY_AUTOMATION in (backfill.tags or {})
        and backfill.backfill_timestamp > (now - _LAST_AGE).timestamp()
        and images.key in (backfill.asset_selection or ())
        for request in _again(context, names, images, backfill)
    ]


def _again(
    context: dg.SensorEvaluationContext, names: Names, images: dg.AssetsDefinition, backfill: Any
) -> Iterator[dg.RunRequest]:
    partitions_def, data = images.partitions_def, backfill.asset_backfill_data
    if partitions_def is None or data is None:
        return
    instance = context.instance
    known = list(partitions_def.get_partition_keys(dynamic_partitions_store=instance))
    done = delivered_partitions(instance, names).union(
        *(
            keys_of_run(run.tags, known)
            for tag in (_BACKFILL, RELAUNCH_TAG)
            for run in instance.get_runs(dg.RunsFilter(tags={tag: backfill.backfill_id}))
        )
    )
    target = set(data.get_target_partitions_subset(images.key).get_partition_keys())
    lost = [key for key in known if key in target and key not in done]
    policy = images.backfill_policy
    most = (policy.max_partitions_per_run if policy else 1) or len(known)
    for first, last in ranges(partitions_def, lost, known):
        keys = known[known.index(first) : known.index(last) + 1]
        for start in range(0, len(keys), most):
            some = keys[start : start + most]
            yield dg.RunRequest(
                run_key=f"{backfill.backfill_id}/{some[0]}",
                tags={
                    "krea/launched_by": "automation",
                    RELAUNCH_TAG: backfill.backfill_id,
                    **range_tags(some[0], some[-1]),
                },
                asset_selection=[images.key, names.manifest_key],
            )

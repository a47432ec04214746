"""Finds dynamic partitions that have left the prompt table and can be removed from Dagster.

Only Dagster's list of partitions changes: their events, manifests, images and purchases stay. A
value that comes back is registered again, and nothing of it is bought twice.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Final

import dagster as dg

from krea_dagster.plugin.partitions import dynamic_keys, keys_of_run
from krea_dagster.prompts import MultiPartitions

#: States of a run that has not ended.
UNFINISHED: Final = (
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
)

#: States of a backfill that may still make runs, and how many backfills are considered.
_OPEN_BACKFILLS: Final = ("REQUESTED", "CANCELING", "FAILING")
_MOST_BACKFILLS: Final = 25


@dataclass(frozen=True)
class Departed:
    """Dynamic partitions that have left the table: removable, and those with a run under way."""

    name: str
    removable: Sequence[str] = ()
    waiting: Sequence[str] = ()


def departed_partitions(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    images: dg.AssetKey,
    in_table: Collection[str],
) -> Departed | None:
    """Return the dynamic partitions that have left the table; None for other partitions.

    An empty table removes none: it is more often a mistake than meant.
    """
    found = dynamic_keys(partitions_def, in_table)
    if found is None:
        return None
    name, values = found[0], frozenset(found[1])
    known = instance.get_dynamic_partitions(name)
    gone = [value for value in known if value not in values]
    if not gone or not values:
        return Departed(name)
    busy = _under_way(instance, partitions_def, images)
    return Departed(
        name,
        removable=[value for value in gone if value not in busy],
        waiting=[value for value in gone if value in busy],
    )


def _under_way(
    instance: dg.DagsterInstance, partitions_def: dg.PartitionsDefinition[str], images: dg.AssetKey
) -> frozenset[str]:
    """Return the values with a run or a backfill under way, of any asset."""
    known = list(partitions_def.get_partition_keys(dynamic_partitions_store=instance))
    keys: set[str] = set()
    for run in instance.get_runs(dg.RunsFilter(statuses=list(UNFINISHED))):
        keys |= keys_of_run(run.tags, known)
    for backfill in instance.get_backfills(limit=_MOST_BACKFILLS):
        if backfill.status.value in _OPEN_BACKFILLS and images in (backfill.asset_selection or ()):
            data = backfill.asset_backfill_data
            if data is None:
                keys |= set(known)
            else:
                keys |= set(data.get_target_partitions_subset(images).get_partition_keys())
    if isinstance(partitions_def, dg.MultiPartitionsDefinition):
        return frozenset(part[0] for key in keys if (part := MultiPartitions.split(key)))
    return frozenset(keys)

"""Reports, compares and reads the data versions of external assets by partition."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import dagster as dg

from krea_dagster.plugin.metadata import Metadata
from krea_dagster.plugin.partitions import time_dimension
from krea_dagster.prompts import EMPTY_PARTITION_VERSION, MultiPartitions

_DATA_VERSION: Final = "dagster/data_version"

#: Maximum number of partitions in a query by name.
_MOST_NAMES: Final = 500

#: Maximum number of partitions that one tick of a sensor reports, each by one or two events of
#: some 12 ms. The daemon writes them after the tick's evaluation, which alone has a time limit, but
#: other sensors wait meanwhile. If the daemon is killed, the next tick reports the rest.
MOST_REPORTS: Final = 2_500

#: The version of a partition without a row.
NO_ROWS: Final = EMPTY_PARTITION_VERSION

_Event = dg.AssetObservation | dg.AssetMaterialization
_Versions = Mapping[str, str]
_MetadataOf = Callable[[Sequence[str]], Mapping[str, Metadata]]


def report_prompts(
    instance: dg.DagsterInstance,
    key: dg.AssetKey,
    versions: _Versions,
    metadata_of: _MetadataOf = lambda _: {},
) -> None:
    """Report the partitions of ``prompts`` whose data version is not the last reported one.

    ``metadata_of`` returns the metadata of those that are reported.
    """
    last = last_versions(instance, key, list(versions))
    changed = [one for one, version in versions.items() if last.get(one) != version]
    metadata = metadata_of(changed)
    for partition in changed:
        for event in version_events(
            key,
            partition,
            versions[partition],
            last.get(partition),
            metadata=metadata.get(partition),
        ):
            instance.report_runless_asset_event(event)


def report_in_step(
    context: dg.AssetExecutionContext,
    key: dg.AssetKey,
    versions: _Versions,
    metadata_of: _MetadataOf = lambda _: {},
) -> None:
    """Report from a step of a downstream asset, so that it is recorded as made from these versions.

    Dagster records the input versions when a step begins. It must read them again, or the result
    would be out of date at once.
    """
    report_prompts(context.instance, key, versions, metadata_of)
    context.get_step_execution_context().wipe_input_asset_version_info(key)


def last_versions(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: Sequence[str] | None = None
) -> _Versions:
    """Return the last reported data versions of these partitions, or of all, by one query."""
    few = partitions is not None and len(partitions) <= _MOST_NAMES
    found = instance.event_log_storage.get_latest_tags_by_partition(
        key,
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        tag_keys=[_DATA_VERSION],
        # Above the limit, all: databases limit the number of names in a query.
        asset_partitions=partitions if few else None,
    )
    return {partition: tags[_DATA_VERSION] for partition, tags in found.items() if tags}


def changed_versions(versions: _Versions, last: _Versions) -> _Versions:
    """Return the versions to report: those that differ, and partitions that have lost all rows."""
    gone = dict.fromkeys(sorted(last.keys() - versions.keys()), NO_ROWS)
    return {
        partition: version
        for partition, version in {**versions, **gone}.items()
        if last.get(partition) != version
    }


def knows_partition(
    instance: dg.DagsterInstance, partitions_def: dg.PartitionsDefinition[str]
) -> Callable[[str], bool]:
    """Return a function that tells whether a partition exists now: no future or too early date."""
    if isinstance(partitions_def, dg.DynamicPartitionsDefinition):
        return lambda _: True
    time = time_dimension(partitions_def)
    if time is not None and isinstance(partitions_def, dg.MultiPartitionsDefinition):
        times = frozenset(time.get_partition_keys())
        return lambda key: (MultiPartitions.split(key) or ("", ""))[1] in times
    known = frozenset(partitions_def.get_partition_keys(dynamic_partitions_store=instance))
    return known.__contains__


def version_events(
    key: dg.AssetKey,
    partition: str,
    version: str,
    last: str | None,
    metadata: Metadata | None = None,
) -> Sequence[_Event]:
    """Return the events that report a new version of an external asset's partition.

    Automation conditions use materializations, and the UI's "unsynced" compares observations, of
    which a first version (``last`` is None) needs none: nothing was made from an earlier one. The
    order matters: downstream assets refer to the materialization, and would count as out of date
    if an observation came after it.
    """
    tags = {_DATA_VERSION: version}
    made = dg.AssetMaterialization(key, partition=partition, tags=tags, metadata=metadata)
    if last is None:
        return [made]
    return [dg.AssetObservation(key, partition=partition, tags=tags), made]

"""Tells Dagster when the prompt table has changed, and in which partitions."""

import json
from collections.abc import Mapping, Sequence

import dagster as dg

from krea_dagster.errors import KreaError
from krea_dagster.plugin.partitions import missing_dynamic_keys
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PromptTable

_DATA_VERSION = "dagster/data_version"

#: Partitions that are asked for by name.
_MOST_NAMES = 500


def report_prompts(
    instance: dg.DagsterInstance, key: dg.AssetKey, versions: Mapping[str, str]
) -> None:
    """Report the partitions of ``prompts`` whose data version is not the one last reported."""
    last = last_versions(instance, key, list(versions))
    for partition, version in versions.items():
        if last.get(partition) != version:
            for event in _events(key, partition, version):
                instance.report_runless_asset_event(event)


def last_versions(
    instance: dg.DagsterInstance, key: dg.AssetKey, partitions: Sequence[str]
) -> Mapping[str, str]:
    """The data versions that were last reported for these partitions, in one question."""
    found = instance.event_log_storage.get_latest_tags_by_partition(
        key,
        dg.DagsterEventType.ASSET_MATERIALIZATION,
        tag_keys=[_DATA_VERSION],
        # Of very many, all: databases take only so many names in one question.
        asset_partitions=partitions if len(partitions) <= _MOST_NAMES else None,
    )
    return {partition: tags[_DATA_VERSION] for partition, tags in found.items() if tags}


def build_prompts_sensor(
    table: PromptTable,
    partitions_def: dg.PartitionsDefinition[str],
    key: dg.AssetKey,
    *,
    name: str,
    resource_key: str = "krea",
    minimum_interval_s: int = 60,
) -> dg.SensorDefinition:
    """Build the sensor that watches the prompt table.

    It reports the changed partitions of ``prompts`` and registers new dynamic ones. The data
    versions hang on the rows' request keys alone: a table that was rewritten, reordered, or
    given a further column reports nothing. Raising a row's attempt reports its partition.
    """

    @dg.sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description=f"Reports the partitions of {key.to_user_string()} that have changed.",
    )
    def prompts_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        try:
            krea: KreaResource = getattr(context.resources, resource_key)
            versions = table.versions(attempts=krea.attempts())
        except KreaError as error:
            return dg.SkipReason(str(error))
        seen: Mapping[str, str] = json.loads(context.cursor or "{}")
        changed = [
            partition for partition in versions if versions[partition] != seen.get(partition)
        ]
        requests = _new_partitions(context.instance, partitions_def, list(versions))
        if not changed and not requests:
            return dg.SkipReason("The prompt table asks for the same images as before.")
        return dg.SensorResult(
            asset_events=[
                event
                for partition in changed
                for event in _events(key, partition, versions[partition])
            ],
            dynamic_partitions_requests=requests,
            cursor=json.dumps(versions),
        )

    return prompts_sensor


def _new_partitions(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    keys: Sequence[str],
) -> list[dg.AddDynamicPartitionsRequest]:
    found = missing_dynamic_keys(instance, partitions_def, keys)
    return [] if found is None else [dg.AddDynamicPartitionsRequest(*found)]


def _events(
    key: dg.AssetKey, partition: str, version: str
) -> tuple[dg.AssetObservation, dg.AssetMaterialization]:
    """The two events by which Dagster learns of a new version of an external asset's partition.

    Automation conditions look at materializations, and the UI's "unsynced" at observations. In
    this order: what is downstream remembers the materialization, and is taken for out of date
    where an observation came after it.
    """
    tags = {_DATA_VERSION: version}
    return (
        dg.AssetObservation(key, partition=partition, tags=tags),
        dg.AssetMaterialization(key, partition=partition, tags=tags),
    )

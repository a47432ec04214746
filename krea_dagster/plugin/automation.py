"""Tells Dagster when the prompt table has changed, and in which partitions."""

import json
from collections.abc import Mapping, Sequence

import dagster as dg

from krea_dagster.errors import KreaError
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.prompts import PromptTable

_DATA_VERSION = "dagster/data_version"


def report_prompts(
    instance: dg.DagsterInstance, key: dg.AssetKey, versions: Mapping[str, str]
) -> None:
    """Report the partitions of ``prompts`` whose data version is not the one last reported."""
    for partition, version in versions.items():
        if last_version(instance, key, partition) != version:
            for event in _events(key, partition, version):
                instance.report_runless_asset_event(event)


def last_version(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> str | None:
    """The data version that was last reported for a partition."""
    found = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=key, asset_partitions=[partition]), limit=1
    )
    for record in found.records:
        materialization = record.asset_materialization
        if materialization is not None and materialization.tags:
            return materialization.tags.get(_DATA_VERSION)
    return None


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
    if not isinstance(partitions_def, dg.DynamicPartitionsDefinition) or not partitions_def.name:
        return []
    known = set(instance.get_dynamic_partitions(partitions_def.name))
    new = [key for key in keys if key not in known]
    return [dg.AddDynamicPartitionsRequest(partitions_def.name, new)] if new else []


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

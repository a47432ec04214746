"""The sensor that reports which partitions of ``verdicts`` have changed."""

import json
from dataclasses import asdict, dataclass
from typing import Final

import dagster as dg

from krea_dagster.curation.accepted.accepted_table import AcceptedTableBuilder
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.errors import KreaError
from krea_dagster.plugin.data_versions import (
    MOST_REPORTS,
    changed_versions,
    knows_partition,
    last_versions,
    version_events,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.change_marks import mark_of_reports, read_cursor

_SAME: Final = "There are no new verdicts."


@dataclass(frozen=True)
class _VerdictsCursor:
    """The sensor's cursor: the last verdict, and the last report of a manifest."""

    number: int
    manifests: str


def build_verdicts_sensor(
    names: Names, partitions_def: dg.PartitionsDefinition[str], rules: Rules
) -> dg.SensorDefinition:
    """Build the sensor that reports the partitions of ``verdicts`` with new verdicts.

    Without a new verdict or manifest, a tick reads one number of the journal and one position of
    Dagster's event log. Otherwise it reads the hashes of the images in the manifests, and reports
    the partitions whose data version differs from the last reported one, some in each tick. It is
    on by default, and starts no run.
    """
    key = names.key("verdicts")

    @dg.sensor(
        name=names.prefixed("krea_verdicts"),
        minimum_interval_seconds=60,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.resource_key},
        description=f"Reports the partitions of {key.to_user_string()} that have changed.",
    )
    def verdicts_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        krea = krea_of(context, names.resource_key)
        instance = context.instance
        try:
            if not krea.has_journal():
                return dg.SkipReason("There is no journal yet, and so there are no verdicts.")
            with krea.open_journal() as journal:
                # Taken before the verdicts are read: those that come meanwhile are seen next time.
                present = _VerdictsCursor(
                    journal.verdicts.last_number(),
                    mark_of_reports(instance, [names.manifest_key]),
                )
                if present == read_cursor(_VerdictsCursor, context.cursor):
                    return dg.SkipReason(_SAME)
                builder = AcceptedTableBuilder.read(
                    krea.open_storage(), journal, rules, None, names.prefix
                )
                versions = builder.versions(builder.partitions())
        except KreaError as error:
            return dg.SkipReason(str(error))
        has_key = knows_partition(instance, partitions_def)
        last = last_versions(instance, key)
        changed = [
            (partition, version)
            for partition, version in sorted(changed_versions(versions, last).items())
            if partition in versions and has_key(partition)
        ]
        cursor = json.dumps(asdict(present))
        if not changed:
            return dg.SensorResult(skip_reason=_SAME, cursor=cursor)
        now = changed[:MOST_REPORTS]
        return dg.SensorResult(
            asset_events=[
                event
                for partition, version in now
                for event in version_events(key, partition, version, last.get(partition))
            ],
            cursor=context.cursor if len(changed) > len(now) else cursor,
            skip_reason=f"Reported {len(now)} of {len(changed)} partitions with new verdicts.",
        )

    return verdicts_sensor

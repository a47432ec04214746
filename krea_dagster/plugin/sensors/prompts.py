"""Automation: reports to Dagster which prompts have changed, and launches runs for them.

No run is launched unless a user gives a condition: runs spend money.
"""

import json
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any, Final

import dagster as dg

from krea_dagster.application.backend import Backend
from krea_dagster.application.column_versions import Carried, carried_columns
from krea_dagster.application.partition_look import PartitionLook
from krea_dagster.errors import KreaError
from krea_dagster.plugin.data_versions import (
    MOST_REPORTS,
    NO_ROWS,
    changed_versions,
    knows_partition,
    last_versions,
    version_events,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import dynamic_keys, missing_dynamic_keys
from krea_dagster.plugin.prompts_metadata import prompts_metadata
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.change_marks import (
    Marks,
    hash_of_versions,
    mark_of_reports,
    read_cursor,
)
from krea_dagster.plugin.sensors.newest_value import NewestValue
from krea_dagster.plugin.sensors.pruning import Departed, departed_partitions
from krea_dagster.plugin.upstream import NO_UPSTREAM, Upstream
from krea_dagster.prompts import PromptTable

#: The external assets of a prompt table, with any prefix.
_TABLE: Final = dg.AssetSelection.from_string('key:"*prompts" or key:"*prompt_columns"')

#: The label of ``on_prompts_changed``, in the UI and to find it within a user's condition.
_LABEL: Final = "on_prompts_changed"

_Versions = Mapping[str, str]
#: A report: the asset, the partition, its version, and the last reported one.
_Change = tuple[dg.AssetKey, str, str, str | None]
_Request = dg.AddDynamicPartitionsRequest | dg.DeleteDynamicPartitionsRequest


def on_prompts_changed() -> dg.AutomationCondition[Any]:
    """Build the condition that launches missing partitions once, and then only changed ones.

    A partition is launched when it is first seen without a materialization, and whenever a
    partition that it depends on has changed, also if that happened during its run. A run that
    fails, or ends with rows missing, is not launched again before its prompts change: after a
    top-up a person launches it (its tags say so, see ``failure_of``), and only missing images are
    bought. A run that a person launches before the sensor has seen the new prompts is followed by
    one more, which has nothing left to buy. The assets that make the table (``deps`` of
    ``build_krea_definitions``) launch nothing themselves: only what they change in the table does.

    Returns:
        A condition for ``images`` and ``image_manifest``.

    Example::

        build_krea_definitions(..., automation_condition=on_prompts_changed())
    """
    return _prompts_changed(dg.AssetSelection.assets())


def _prompts_changed(ignored: dg.AssetSelection) -> dg.AutomationCondition[Any]:
    condition = dg.AutomationCondition
    requested, made = condition.newly_requested(), condition.newly_updated()
    updated = condition.any_deps_updated().ignore(ignored)
    never_made = condition.missing().newly_true().since(requested | made)
    # Not reset by the target's own materialization, nor by a launch that came with newer changes:
    # a run that is under way may have read the table before it changed.
    prompts = updated.allow(_TABLE)
    changed = prompts.since(requested & ~prompts)
    images = updated.ignore(_TABLE).since(requested | made)
    ready = ~condition.in_progress() & ~condition.any_deps_missing().ignore(ignored)
    return ((never_made | changed | images) & ready).with_label(_LABEL)


def ignoring(
    condition: dg.AutomationCondition[Any] | None, upstream: Collection[dg.AssetKey]
) -> dg.AutomationCondition[Any] | None:
    """Return a condition whose ``on_prompts_changed`` ignores the assets that make the table.

    What their rows request counts, and not that they were materialized. Other conditions that are
    combined with it stay as they are.
    """
    if condition is None or not upstream:
        return condition
    return condition.replace(_LABEL, _prompts_changed(dg.AssetSelection.assets(*upstream)))


def build_automation_sensor(
    assets: Sequence[dg.AssetsDefinition], *, name: str, minimum_interval_s: int = 30
) -> dg.AutomationConditionSensorDefinition:
    """Build the sensor that evaluates the conditions of these assets. It is on by default.

    Several partitions at once become one backfill: it can be cancelled in one place, and if the
    account stops one of its runs, the others buy nothing more.
    """
    return dg.AutomationConditionSensorDefinition(
        name=name,
        target=dg.AssetSelection.assets(*assets),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=minimum_interval_s,
        run_tags={"krea/launched_by": "automation"},
        description="Launches the partitions whose prompts have changed. This spends credits.",
    )


class _VersionsReader:
    """Keeps the versions of a table, and reads the table only if they may have changed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str], tuple[_Versions, Carried]] | None = None

    def versions(
        self, krea: Backend, table: PromptTable, marks: Marks
    ) -> tuple[_Versions, Carried]:
        """Return the versions of the requests by partition, and the passthrough columns."""
        state = (marks.files, marks.attempts)
        with self._lock:
            if self._known is not None and marks.files and self._known[0] == state:
                return self._known[1]
        requested = krea.versions(table)
        # A partition without a row has a version too: its manifest must not wait for one forever.
        columns = carried_columns(table)
        versions = {**dict.fromkeys(requested, NO_ROWS), **columns.versions}
        columns = replace(columns, versions=versions)
        with self._lock:
            # The marks are older than the read: if the table changed meanwhile, the next differ.
            self._known = (state, (requested, columns))
        return requested, columns


def build_prompts_sensor(
    names: Names,
    table: PromptTable,
    partitions_def: dg.PartitionsDefinition[str],
    *,
    upstream: Upstream = NO_UPSTREAM,
    prune: bool = False,
    minimum_interval_s: int = 60,
    most_reports: int = MOST_REPORTS,
) -> dg.SensorDefinition:
    """Build the sensor that watches the prompt table.

    It reports the changed partitions of ``prompts`` and ``prompt_columns``, and registers new
    dynamic ones. The data versions of ``prompts`` depend only on the rows' request keys: a table
    that was rewritten, reordered, or given another column reports nothing. Raising a row's attempt
    reports its partition. A partition that has left the table is reported with the version of no
    rows; with ``prune``, a dynamic one is removed instead, once no run of it is under way.
    ``prompt_columns`` has the versions of the columns that only the manifest contains.

    One tick reports ``most_reports`` partitions at most, the next ticks the rest. A tick reads the
    table only if its files (size, time, etag), the attempts or reports by others have changed. If
    the table is the value of an asset of ``upstream``, a tick first loads one that is newer.
    """
    reader = _VersionsReader()
    key = names.key("prompts")
    keys = [key, names.key("prompt_columns")]

    @dg.sensor(
        name=names.prefixed("krea_prompts"),
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.resource_key, *upstream.resource_keys},
        description=f"Reports the partitions of {key.to_user_string()} that have changed.",
    )
    def prompts_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        krea = krea_of(context, names.resource_key)
        instance = context.instance
        same = "The prompt table requests the same images as before."
        made = upstream.made
        newest = None if made is None else NewestValue.at(instance, context.repository_def, made)
        try:
            pinned = table.pinned()
            marks = _marks(krea, instance, pinned, keys, newest, prunes=prune)
            if marks.unchanged_since(read_cursor(Marks, context.cursor)):
                return dg.SkipReason(same)
            if newest is not None:
                newest.keep_newer(table, context.resources)
                pinned = table.pinned()
                marks = _marks(krea, instance, pinned, keys, newest, prunes=prune)
            requested, columns = reader.versions(krea, pinned, marks)
            lineage = upstream.lineage(pinned)
        except KreaError as error:
            return dg.SkipReason(str(error))
        versions = (requested, columns.versions)
        departed = None
        if prune:
            departed = departed_partitions(instance, partitions_def, names.key("images"), requested)
        requests, done = _registrations(instance, partitions_def, requested, departed)
        changed = _changed(instance, partitions_def, keys, versions, departed)
        now = changed[:most_reports]
        if now or requests or (departed and departed.waiting):
            reported = [partition for asset, partition, *_ in now if asset == key]
            looks = {one: columns.looks.get(one, PartitionLook()) for one in reported}
            metadata = prompts_metadata(looks, columns.schema, lineage)
            return dg.SensorResult(
                asset_events=[
                    event
                    for one in now
                    for event in version_events(
                        *one, metadata=metadata.get(one[1]) if one[0] == key else None
                    )
                ],
                dynamic_partitions_requests=requests,
                skip_reason=" ".join([*_reported(now, changed), *done]),
            )
        settled = replace(marks, versions=hash_of_versions(*versions))
        return dg.SensorResult(skip_reason=same, cursor=json.dumps(asdict(settled)))

    return prompts_sensor


def _registrations(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    in_table: Collection[str],
    departed: Departed | None,
) -> tuple[list[_Request], list[str]]:
    """Return the requests to add and remove dynamic partitions, and what they do in words."""
    requests: list[_Request] = []
    said = []
    if (missing := missing_dynamic_keys(instance, partitions_def, in_table)) is not None:
        requests.append(dg.AddDynamicPartitionsRequest(*missing))
        said.append(f"Registered {len(missing[1])} new partitions.")
    if departed is not None and departed.removable:
        removed = list(departed.removable)
        requests.append(dg.DeleteDynamicPartitionsRequest(departed.name, removed))
        said.append(f"Removed {len(removed)} partitions that have left the table: {_few(removed)}.")
    if departed is not None and departed.waiting:
        said.append(
            f"{len(departed.waiting)} partitions that have left the table have a run under way: "
            f"{_few(departed.waiting)}."
        )
    return requests, said


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def _changed(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    keys: Sequence[dg.AssetKey],
    versions: Sequence[_Versions],
    departed: Departed | None,
) -> list[_Change]:
    """Return the reports to make: a partition's columns before its prompts.

    One run then makes images and manifest. Partitions to remove are not reported: a run of them
    would only make their manifest empty.
    """
    has_key = knows_partition(instance, partitions_def)
    if departed is not None:
        values = dynamic_keys(partitions_def, versions[0])
        kept = frozenset(values[1] if values else ())
    # Compared with the last reported versions: a run may have reported some meanwhile.
    changed = [
        (asset, partition, version, last.get(partition))
        for asset, found in zip(keys, versions, strict=True)
        for last in [last_versions(instance, asset)]
        for partition, version in changed_versions(found, last).items()
        if has_key(partition) and (departed is None or _value_of(partitions_def, partition) in kept)
    ]
    return sorted(changed, key=lambda one: (one[1], one[0] == keys[0]))


def _value_of(partitions_def: dg.PartitionsDefinition[str], key: str) -> str:
    """Return the dynamic part of a partition key."""
    found = dynamic_keys(partitions_def, [key])
    return found[1][0] if found and found[1] else key


def _reported(now: Sequence[_Change], changed: Sequence[_Change]) -> list[str]:
    """Return what a tick has reported in words."""
    if not now:
        return []
    partitions = {one[1] for one in now}
    left = len({one[1] for one in changed} - partitions)
    more = f" {left} are left to the next ticks." if left else ""
    return [f"Reported {len(partitions)} changed partitions.{more}"]


def _marks(
    krea: Backend,
    instance: dg.DagsterInstance,
    table: PromptTable,
    keys: Sequence[dg.AssetKey],
    newest: NewestValue | None,
    *,
    prunes: bool,
) -> Marks:
    return Marks(
        table.mark(),
        krea.mark_of_attempts(table),
        mark_of_reports(instance, keys),
        "" if newest is None else newest.mark(),
        prunes,
    )

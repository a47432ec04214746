"""Automation: tells Dagster which prompts have changed, and launches what is asked for by them.

Nothing here launches a run unless a user gives a condition: runs spend money.
"""

import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

import dagster as dg

from krea_dagster.application.backend import Backend
from krea_dagster.application.column_versions import carried_versions
from krea_dagster.errors import KreaError
from krea_dagster.plugin.data_versions import (
    NO_ROWS,
    changed_versions,
    knows_partition,
    last_versions,
    version_events,
)
from krea_dagster.plugin.partitions import missing_dynamic_keys
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.change_marks import (
    Marks,
    hash_of_versions,
    mark_of_attempts,
    mark_of_files,
    mark_of_reports,
)
from krea_dagster.prompts import PromptTable

#: Partitions that one tick reports, each by two events of some 12 ms in Dagster's database.
_MOST_REPORTS = 250

#: The assets that stand for the prompt table, with any prefix.
_TABLE: Final = dg.AssetSelection.from_string('key:"*prompts" or key:"*prompt_columns"')

_Versions = Mapping[str, str]


def on_prompts_changed() -> dg.AutomationCondition[Any]:
    """Build the condition that launches what is missing once, and then only what changed.

    For ``images`` and ``image_manifest``. A partition is launched when it is first seen without a
    materialization, and whenever a partition that it depends on has changed, also where this
    happened while it was being run. A run that fails, or ends with rows missing, is not launched
    again before its prompts change: after a top-up a person launches it (the runs' tags say
    which, see ``krea_dagster.plugin.failures``), and only what is missing is bought. A run that a
    person launches before the sensor has seen the new prompts is followed by one more, which has
    nothing left to buy.
    """
    condition = dg.AutomationCondition
    requested, made = condition.newly_requested(), condition.newly_updated()
    never_made = condition.missing().newly_true().since(requested | made)
    # Not ended by the target's own materialization, nor by a launch where there is news since: a
    # run that is under way may have read the table before it changed.
    prompts = condition.any_deps_updated().allow(_TABLE)
    asked = prompts.since(requested & ~prompts)
    images = condition.any_deps_updated().ignore(_TABLE).since(requested | made)
    return (
        (never_made | asked | images) & ~condition.in_progress() & ~condition.any_deps_missing()
    ).with_label("on_prompts_changed")


def build_automation_sensor(
    assets: Sequence[dg.AssetsDefinition], *, name: str, minimum_interval_s: int = 30
) -> dg.AutomationConditionSensorDefinition:
    """Build the sensor that evaluates the conditions of these assets. It is on by default.

    Several partitions at once become one backfill: it can be cancelled in one place, and where
    the account stops one of its runs, the others buy nothing more.
    """
    return dg.AutomationConditionSensorDefinition(
        name=name,
        target=dg.AssetSelection.assets(*assets),
        default_status=dg.DefaultSensorStatus.RUNNING,
        minimum_interval_seconds=minimum_interval_s,
        run_tags={"krea/launched_by": "automation"},
        description="Launches the partitions whose prompts have changed. This spends credits.",
    )


class _Watcher:
    """Knows the versions of a table, and reads it again only where it may have others."""

    def __init__(self, table: PromptTable, *, carried: bool) -> None:
        self._table = table
        self._carried = carried
        self._lock = threading.Lock()
        self._known: tuple[tuple[str, str], tuple[_Versions, _Versions]] | None = None

    def versions(self, krea: Backend, marks: Marks) -> tuple[_Versions, _Versions]:
        """By partition: of what is asked for, and of the columns that are carried along."""
        state = (marks.files, marks.attempts)
        with self._lock:
            if self._known is not None and marks.files and self._known[0] == state:
                return self._known[1]
        asked = krea.versions(self._table)
        carried: _Versions = {}
        if self._carried:
            # Partitions without a row have a version too: what waits for it must not wait forever.
            carried = {**dict.fromkeys(asked, NO_ROWS), **carried_versions(self._table)}
        found = (asked, carried)
        with self._lock:
            # Marked before it was read: where it changed meanwhile, the next mark is another.
            self._known = (state, found)
        return found


def build_prompts_sensor(
    table: PromptTable,
    partitions_def: dg.PartitionsDefinition[str],
    key: dg.AssetKey,
    *,
    name: str,
    resource_key: str = "krea",
    minimum_interval_s: int = 60,
    columns_key: dg.AssetKey | None = None,
    most_reports: int = _MOST_REPORTS,
) -> dg.SensorDefinition:
    """Build the sensor that watches the prompt table.

    It reports the changed partitions of ``prompts`` and registers new dynamic ones. The data
    versions hang on the rows' request keys alone: a table that was rewritten, reordered, or
    given a further column reports nothing. Raising a row's attempt reports its partition. A
    partition that has left the table is reported with the version of no rows.

    ``columns_key`` is an asset whose data versions hang on the further columns, which only the
    manifest carries. One tick reports ``most_reports`` partitions at most, and the next ones the
    rest. A tick reads the table only where its files (by size, time and etag), the attempts or
    the reports of others have moved.
    """
    watcher = _Watcher(table, carried=columns_key is not None)
    keys = [key] if columns_key is None else [key, columns_key]

    @dg.sensor(
        name=name,
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description=f"Reports the partitions of {key.to_user_string()} that have changed.",
    )
    def prompts_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        krea = krea_of(context, resource_key)
        instance = context.instance
        same = "The prompt table asks for the same images as before."
        try:
            marks = Marks(
                mark_of_files(table.source),
                mark_of_attempts(krea, table),
                mark_of_reports(instance, keys),
            )
            if marks.stand_still(Marks.from_cursor(context.cursor)):
                return dg.SkipReason(same)
            asked, carried = watcher.versions(krea, marks)
        except KreaError as error:
            return dg.SkipReason(str(error))
        missing = missing_dynamic_keys(instance, partitions_def, asked)
        requests = [] if missing is None else [dg.AddDynamicPartitionsRequest(*missing)]
        has_key = knows_partition(instance, partitions_def)
        # Compared with what Dagster was told last, by whomever: a run may have reported meanwhile.
        changed = [
            (asset, partition, version)
            for asset, versions in zip(keys, (asked, carried), strict=False)
            for partition, version in changed_versions(
                versions, last_versions(instance, asset)
            ).items()
            if has_key(partition)
        ]
        # A partition's columns before its prompts, so that one run makes images and manifest.
        changed.sort(key=lambda one: (one[1], one[0] == key))
        now = changed[:most_reports]
        if now or requests:
            return dg.SensorResult(
                asset_events=[event for one in now for event in version_events(*one)],
                dynamic_partitions_requests=requests,
            )
        settled = replace(marks, versions=hash_of_versions(asked, carried))
        return dg.SensorResult(skip_reason=same, cursor=settled.cursor())

    return prompts_sensor

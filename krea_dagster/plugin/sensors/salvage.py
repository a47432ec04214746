"""The sensor that starts the salvage of images that are paid for and were not collected."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Any, Final

import dagster as dg

from krea_dagster.application.salvage_schedule import EVER, LAST_AGE, due, paid_at, past_last_age
from krea_dagster.engine.record import Record
from krea_dagster.errors import KreaError
from krea_dagster.models import credits_text
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.resource import krea_of
from krea_dagster.prompts import PromptTable

#: Seconds between two ticks of the sensor.
_TICK_S: Final = 300

#: The tag of a salvage that the sensor has started: when the salvage before it began.
SINCE_TAG: Final = "krea/salvage_since"


@dataclass(frozen=True)
class _Cursor:
    """The sensor's cursor: when its last salvage began, and until when it reported given-up images.

    Without a cursor everything is due, and reported, once more.
    """

    looked_at: datetime = EVER
    told_at: datetime = EVER

    @classmethod
    def read(cls, text: str | None) -> "_Cursor":
        return cls(*map(datetime.fromisoformat, json.loads(text))) if text else cls()

    def text(self) -> str:
        return json.dumps([self.looked_at.isoformat(), self.told_at.isoformat()])


def build_salvage_sensor(
    names: Names, tables: Sequence[PromptTable], *, job: Any, first: timedelta
) -> dg.SensorDefinition:
    """Build the sensor that starts ``job`` for paid images that no living run has claimed.

    It does so for two days. Images younger than ``first`` are not salvaged yet.
    """

    @dg.sensor(
        name=names.prefixed("krea_salvage"),
        job=job,
        minimum_interval_seconds=_TICK_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.resource_key},
        description=(
            "Starts the salvage of images that are paid for and were not collected, at growing "
            "intervals."
        ),
    )
    def salvage_sensor(
        context: dg.SensorEvaluationContext,
    ) -> dg.SensorResult | dg.SkipReason:
        try:
            left = krea_of(context, names.resource_key).left_behind(tables)
        except KreaError as error:
            return dg.SkipReason(str(error))
        now = datetime.now(timezone.utc)
        cursor = _Cursor.read(context.cursor)
        waiting = due(left, cursor.looked_at, now, first=first)
        if not waiting:
            reason = _nothing_due(left, cursor.told_at, now)
            return dg.SensorResult(
                skip_reason=reason, cursor=_Cursor(cursor.looked_at, told_at=now).text()
            )
        last = context.instance.get_runs(dg.RunsFilter(job_name=job.name), limit=1)
        if any(not run.is_finished for run in last):
            return dg.SkipReason("A salvage is running.")
        tags = {"krea/left_behind": str(len(waiting)), SINCE_TAG: cursor.looked_at.isoformat()}
        return dg.SensorResult(
            run_requests=[dg.RunRequest(tags=tags)],
            cursor=_Cursor(looked_at=now, told_at=cursor.told_at).text(),
        )

    return salvage_sensor


def _nothing_due(left: Sequence[Record], told_at: datetime, now: datetime) -> str:
    if ended := past_last_age(left, told_at, now):
        at_stake = credits_text(sum(record.committed_units for record in ended))
        hours = LAST_AGE // timedelta(hours=1)
        return (
            f"{len(ended)} images that were paid for ({at_stake} credits) could not be fetched in "
            f"{hours} hours: their links have expired, or their tasks do not end. The sensor does "
            "not poll them any more; `krea-dagster salvage` polls them once more."
        )
    waiting = sum(now - paid_at(record) < LAST_AGE for record in left)
    if waiting:
        return f"{waiting} images that are paid for are not collected yet; none is due now."
    return "All images that were paid for are collected."

"""Collects what is paid for and at hand nowhere: an asset, its job, and the sensor that starts it.

Only asks and fetches; nothing here can buy.

When a request is looked for follows from its age alone, so that nothing is kept of each: a salvage
takes up those that have passed one of these ages since the salvage before it. What a person
starts takes up everything.
"""

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

import dagster as dg

from krea_dagster.application.batch import Batch
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.errors import KreaError
from krea_dagster.models import credits_from_units, credits_text
from krea_dagster.plugin.assets.images import KreaAssets, Narrator, rewrite_manifests
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.progress import tell_report
from krea_dagster.plugin.resource import KreaResource, krea_of

#: Seconds between two ticks of the sensor.
_TICK_S: Final = 300

#: Where runs collect later, nobody has forgotten an image that is younger than this.
_LATE: Final = timedelta(hours=1)

#: The tag of a salvage that the sensor has started: when the one before it began.
_SINCE_TAG: Final = "krea/salvage_since"

_EVER: Final = datetime(1970, 1, 1, tzinfo=timezone.utc)

#: A link lives for 24 hours from its task's end. What had not ended at one look is looked for again
#: at one and a half times its age, so before a link that has come meanwhile expires. That holds
#: for two days; what has not been had by then is left to people. No pause is longer than four
#: hours, so that a link that could not be fetched is tried several times while it lives.
_GROWTH: Final = 1.5
_LEAST_PAUSE: Final = timedelta(minutes=5)
_MOST_PAUSE: Final = timedelta(hours=4)
_LAST_LOOK: Final = timedelta(hours=48)


def _ages() -> tuple[timedelta, ...]:
    ages = [timedelta(0)]
    while ages[-1] < _LAST_LOOK:
        pause = min(max(ages[-1] * (_GROWTH - 1), _LEAST_PAUSE), _MOST_PAUSE)
        ages.append(min(ages[-1] + pause, _LAST_LOOK))
    return tuple(ages)


#: The ages at which a request that is paid for and left behind is looked for.
LOOKS: Final = _ages()


def due(
    left: Iterable[Record], since: datetime, now: datetime, *, first: timedelta = timedelta(0)
) -> list[Record]:
    """Return the requests that have come to an age of ``LOOKS`` after ``since``. Pure.

    Those that are younger than ``first`` are not looked for yet.
    """

    def looks(record: Record, at: datetime) -> int:
        age = at - _paid_at(record)
        return bisect_right(LOOKS, age) if age >= first else 0

    return [record for record in left if looks(record, since) < looks(record, now)]


def past_last_look(left: Iterable[Record], since: datetime, now: datetime) -> list[Record]:
    """Return the requests that have come to the age of their last look after ``since``. Pure."""
    return [one for one in left if since < _paid_at(one) + _LAST_LOOK <= now]


def _paid_at(record: Record) -> datetime:
    return record.submitted_at or record.sent_at or _EVER


@dataclass(frozen=True)
class _Cursor:
    """What the sensor remembers: when its last salvage began, and until when it has told the end.

    Without it everything is looked for once more, and told once more.
    """

    looked_at: datetime = _EVER
    told_at: datetime = _EVER

    @classmethod
    def read(cls, text: str | None) -> "_Cursor":
        return cls(*map(datetime.fromisoformat, json.loads(text))) if text else cls()

    def text(self) -> str:
        return json.dumps([self.looked_at.isoformat(), self.told_at.isoformat()])


def build_salvage(
    assets: KreaAssets,
    *,
    resource_key: str,
    prefix: str,
    group_name: str,
    collect_later: bool = False,
) -> dg.Definitions:
    """Build the salvage of one prompt table's journal: an asset, a job, and a sensor.

    The asset collects, most urgent link first, and rewrites the manifests of the partitions
    that it completed. The sensor starts the job for what no living run holds, at growing pauses
    and for two days; with ``collect_later``, for what the runs that collect have not taken for an
    hour.
    """
    manifest_key = assets.image_manifest.key
    first = _LATE if collect_later else timedelta(0)

    @dg.asset(
        key=dg.AssetKey([*manifest_key.path[:-1], "salvaged_images"]),
        group_name=group_name,
        kinds={"evolink"},
        required_resource_keys={resource_key},
        description=(
            "What earlier runs paid for and left behind: asked for and fetched, never bought."
        ),
    )
    def salvaged_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        krea = krea_of(context, resource_key)
        with as_failure():
            report, found = krea.salvage(
                run_id=context.run.run_id,
                table=assets.table,
                only=_due_for(context.run, first),
                on_progress=Narrator(context),
            )
        tell_report(report)
        with as_failure():
            with krea.open_journal() as journal:
                table_id = krea.table_id(journal, assets.table)
            collected = {
                record.partition_key
                for record in found.values()
                if record.state is State.STORED and record.table_id in ("", table_id)
            }
            keys = [key for key in assets.table.partition_keys() if key in collected]
            with Batch.read(assets.table, keys, krea) as batch:
                rewrite_manifests(context, batch, krea, manifest_key)
        return dg.MaterializeResult(metadata=salvage_figures(list(found.values())))

    job = dg.define_asset_job(
        f"{prefix}krea_salvage",
        selection=dg.AssetSelection.assets(salvaged_images),
        description="Collects what is paid for and was left behind; buys nothing.",
    )

    @dg.sensor(
        name=f"{prefix}krea_salvage",
        job=job,
        minimum_interval_seconds=_TICK_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description="Starts the salvage of what is paid for and left behind, at growing pauses.",
    )
    def salvage_sensor(
        context: dg.SensorEvaluationContext,
    ) -> dg.SensorResult | dg.SkipReason:
        krea: KreaResource = getattr(context.resources, resource_key)
        try:
            left = krea.left_behind(assets.table)
        except KreaError as error:
            return dg.SkipReason(str(error))
        now = datetime.now(timezone.utc)
        cursor = _Cursor.read(context.cursor)
        waiting = due(left, cursor.looked_at, now, first=first)
        if not waiting:
            said = _nothing_due(left, cursor.told_at, now)
            return dg.SensorResult(
                skip_reason=said, cursor=_Cursor(cursor.looked_at, told_at=now).text()
            )
        last = context.instance.get_runs(dg.RunsFilter(job_name=job.name), limit=1)
        if any(not run.is_finished for run in last):
            return dg.SkipReason("A salvage is under way.")
        tags = {
            "krea/left_behind": str(len(waiting)),
            _SINCE_TAG: cursor.looked_at.isoformat(),
        }
        return dg.SensorResult(
            run_requests=[dg.RunRequest(tags=tags)],
            cursor=_Cursor(looked_at=now, told_at=cursor.told_at).text(),
        )

    return dg.Definitions(assets=[salvaged_images], jobs=[job], sensors=[salvage_sensor])


def _due_for(run: dg.DagsterRun, first: timedelta) -> Callable[[Record], bool]:
    """What a salvage takes up: what was due when the sensor started it, or everything."""
    if (since := run.tags.get(_SINCE_TAG)) is None:
        return lambda _: True
    after, now = datetime.fromisoformat(since), datetime.now(timezone.utc)
    return lambda record: bool(due([record], after, now, first=first))


def _nothing_due(left: Sequence[Record], told_at: datetime, now: datetime) -> str:
    if ended := past_last_look(left, told_at, now):
        at_stake = credits_text(sum(record.committed_units for record in ended))
        hours = _LAST_LOOK // timedelta(hours=1)
        return (
            f"{len(ended)} images that were paid for ({at_stake} credits) could not be had in "
            f"{hours} hours: their links have expired, or their tasks do not end. They are not "
            "looked for any more; `krea-dagster salvage` asks about them once more."
        )
    waiting = sum(now - _paid_at(record) < _LAST_LOOK for record in left)
    if waiting:
        return f"{waiting} images that are paid for are left behind, none to look for yet."
    return "Nothing that was paid for is left behind."


def salvage_figures(records: Sequence[Record]) -> dict[str, int | float]:
    """What became of the requests that a salvage took up: counts, and credits."""
    states = Counter(record.state for record in records)
    lost = sum(record.committed_units for record in records if record.state is State.EXPIRED)
    return {
        "taken_up": len(records),
        "collected": states[State.STORED],
        "still_waiting": states[State.SUBMITTED] + states[State.COMPLETED],
        "failed": states[State.FAILED],
        "lost": states[State.EXPIRED],
        "credits_lost": credits_from_units(lost),
    }

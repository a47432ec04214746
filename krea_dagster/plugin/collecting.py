"""Submit now, collect later: the sensor that launches the runs which collect.

A run that does not wait ends once its images are at the server. When callbacks say that some are
finished, or the clock says so where none came, the same partitions are launched again: that run
fetches what has ended, submits what had no place before, and ends as well.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

import dagster as dg

from krea_dagster.engine.calls import Called
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.errors import KreaError
from krea_dagster.plugin.resource import KreaResource

#: The tag of a run that collects: how many images wait for it.
COLLECTS_TAG: Final = "krea/collects"

#: The tags that say which partitions a run is for.
_PARTITION_TAGS: Final = (
    "dagster/partition",
    "dagster/asset_partition_range_start",
    "dagster/asset_partition_range_end",
)

#: Runs that one look launches; the next look launches the rest.
_MOST_RUNS: Final = 10

#: Without a call, an image is collected at this age; where one is to be expected, later.
_CLOCK: Final = timedelta(minutes=1)
_CALL_MISSED: Final = timedelta(minutes=10)
#: A collection that found an image unfinished is followed by one at so many times its age.
_GROWTH: Final = 1.5
#: From this age on an image is collected at every look: its link lives for 24 hours.
_URGENT: Final = timedelta(hours=20)

_UNFINISHED: Final = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

#: The partitions of a run, by its tags.
_Partitions = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Due:
    """A collection that is worth a run: the partitions of a run before it, and for how many."""

    partitions: _Partitions
    images: int
    oldest_at: datetime


def due_collections(
    waiting: Iterable[Record],
    partitions: Mapping[str, _Partitions],
    called: Mapping[str, Called],
    launched: Mapping[_Partitions, datetime],
    now: datetime,
) -> list[Due]:
    """Which partitions to collect now; those whose links expire soonest first.

    ``waiting`` are paid for, and held by no run; ``partitions`` are those of the runs that
    submitted them, by run id: what is not among them is not collected here. ``called`` are the
    calls by request key, and ``launched`` when partitions were last launched.
    """
    found: dict[_Partitions, Due] = {}
    for record in waiting:
        where = partitions.get(record.run_id or "")
        at = record.completed_at or record.submitted_at
        if where is None or at is None:
            continue
        if not _is_due(record, called.get(record.request_key), launched.get(where), now):
            continue
        due = found.get(where)
        images, oldest_at = (0, at) if due is None else (due.images, due.oldest_at)
        found[where] = Due(where, images + 1, min(at, oldest_at))
    return sorted(found.values(), key=lambda due: due.oldest_at)


def _is_due(
    record: Record, called: Called | None, launched_at: datetime | None, now: datetime
) -> bool:
    at = record.submitted_at
    if record.state is not State.SUBMITTED or at is None or now - at >= _URGENT:
        return True
    if called is not None and (launched_at is None or called.last_at > launched_at):
        return True
    first = _CLOCK if record.callback_url is None else _CALL_MISSED
    before = timedelta(0) if launched_at is None else launched_at - at
    return now - at >= max(first, _GROWTH * before)


def build_collect_sensor(
    *, name: str, job_name: str, resource_key: str, minimum_interval_s: int = 30
) -> dg.SensorDefinition:
    """Build the sensor that launches the runs which collect.

    It looks at what successful runs of the job have left at the server. What a failed or
    cancelled run has left is the salvage's, which buys nothing.
    """

    @dg.sensor(
        name=name,
        job_name=job_name,
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description="Collects what is at the server, once callbacks or the clock say so.",
    )
    def collect_sensor(
        context: dg.SensorEvaluationContext,
    ) -> dg.SensorResult | dg.SkipReason:
        krea: KreaResource = getattr(context.resources, resource_key)
        now = datetime.now(timezone.utc)
        try:
            waiting, called = _waiting(krea)
        except KreaError as error:
            return dg.SkipReason(str(error))
        launched = _read_cursor(context.cursor)
        run_ids = {record.run_id for record in waiting if record.run_id}
        partitions = _partitions_of(context.instance, job_name, run_ids)
        due = due_collections(waiting, partitions, called, launched, now)
        under_way = _under_way(context.instance, job_name)
        runs = [one for one in due if one.partitions not in under_way][:_MOST_RUNS]
        if not runs:
            return dg.SkipReason(f"{len(waiting)} images are at the server, none to collect yet.")
        launched.update((one.partitions, now) for one in runs)
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(tags={**dict(one.partitions), COLLECTS_TAG: str(one.images)})
                for one in runs
            ],
            cursor=_cursor(
                {where: launched[where] for where in partitions.values() if where in launched}
            ),
        )

    return collect_sensor


def _waiting(krea: KreaResource) -> tuple[list[Record], Mapping[str, Called]]:
    """What is paid for and held by no living run, and what was called about of it."""
    if not krea.has_journal():
        return [], {}
    waiting = krea.left_behind()
    with krea.open_journal() as journal:
        return waiting, journal.calls.called([record.request_key for record in waiting])


def _partitions_of(
    instance: dg.DagsterInstance, job_name: str, run_ids: Iterable[str]
) -> dict[str, _Partitions]:
    """The partitions of the successful runs among these, by run id."""
    found: dict[str, _Partitions] = {}
    for run_id in sorted(run_ids):
        run = instance.get_run_by_id(run_id)
        if run is None or run.job_name != job_name:
            continue
        if run.status is dg.DagsterRunStatus.SUCCESS and (tags := _partition_tags(run)):
            found[run_id] = tags
    return found


def _under_way(instance: dg.DagsterInstance, job_name: str) -> set[_Partitions]:
    runs = instance.get_runs(dg.RunsFilter(job_name=job_name, statuses=_UNFINISHED))
    return {_partition_tags(run) for run in runs}


def _partition_tags(run: dg.DagsterRun) -> _Partitions:
    return tuple((name, run.tags[name]) for name in _PARTITION_TAGS if name in run.tags)


def _cursor(launched: Mapping[_Partitions, datetime]) -> str:
    return json.dumps([[list(where), at.isoformat()] for where, at in launched.items()])


def _read_cursor(text: str | None) -> dict[_Partitions, datetime]:
    entries = json.loads(text) if text else []
    return {
        tuple((name, value) for name, value in where): datetime.fromisoformat(at)
        for where, at in entries
    }

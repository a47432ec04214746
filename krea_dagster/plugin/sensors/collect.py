"""Submit now, collect later: the sensor that launches the runs which collect.

A run that does not wait ends once its images are at the server. When callbacks say that some are
finished, or the clock says so where none came, the same partitions are launched again: that run
fetches what has ended, submits what had no place before, and ends as well.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

import dagster as dg

from krea_dagster.application.backend import Backend
from krea_dagster.engine.journal.callback_log import ReceivedCallback
from krea_dagster.engine.journal.rows import chunks
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.errors import KreaError
from krea_dagster.plugin.resource import krea_of

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

#: The tag of a run that left rows because the server took no more, and its value.
GOES_ON_TAG: Final = "krea/goes_on"
GOES_ON: Final = "yes"
#: The tag's value once a later run was for the same partitions.
_FOLLOWED: Final = "followed"

#: Runs that left rows so, the oldest, that a look takes into account.
_MOST_LOOKED_AT: Final = 1000

#: Without a call, an image is collected at this age; where one is to be expected, later.
_CLOCK: Final = timedelta(minutes=1)
_CALL_MISSED: Final = timedelta(minutes=10)
#: A collection that found an image unfinished is followed by one at so many times its age.
_GROWTH: Final = 1.5
#: From this age on an image is collected every half hour: its link lives for 24 hours. After two
#: days it is left to the salvage and to people: what could be had was had.
_URGENT: Final = timedelta(hours=20)
_URGENT_PAUSE: Final = timedelta(minutes=30)
_GIVEN_UP: Final = timedelta(hours=48)
#: The least time between two collections without a new call.
_PAUSE: Final = timedelta(minutes=5)

_UNFINISHED: Final = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

#: The partitions of a run, by its tags.
_Partitions = tuple[tuple[str, str], ...]
#: Those of several runs, by run id.
_Runs = dict[str, _Partitions]
#: Whether a run buys, and so collects.
_Buys = Callable[[dg.DagsterRun], bool]


@dataclass(frozen=True)
class Due:
    """A collection that is worth a run: the partitions of a run before it, and for how many."""

    partitions: _Partitions
    images: int
    oldest_at: datetime


def due_collections(
    waiting: Iterable[Record],
    partitions: Mapping[str, _Partitions],
    called: Mapping[str, ReceivedCallback],
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
        at = record.completed_at or record.submitted_at or record.sent_at
        if where is None or at is None:
            continue
        if not _is_due(record, called.get(record.request_key), launched.get(where), now):
            continue
        due = found.get(where)
        images, oldest_at = (0, at) if due is None else (due.images, due.oldest_at)
        found[where] = Due(where, images + 1, min(at, oldest_at))
    return sorted(found.values(), key=lambda due: due.oldest_at)


def _is_due(
    record: Record, called: ReceivedCallback | None, launched_at: datetime | None, now: datetime
) -> bool:
    if called is not None and (launched_at is None or called.last_at > launched_at):
        return True
    at = record.submitted_at
    if at is None or record.state is State.UNKNOWN:
        return False  # only a call says more about it than the run did that left it
    age = now - at
    looked_at = None if launched_at is None else launched_at - at  # its age at the last collection
    if age >= _GIVEN_UP:
        return False
    if record.state is State.COMPLETED:  # its link is at hand
        return looked_at is None or age >= max(_GROWTH * looked_at, looked_at + _PAUSE)
    if age >= _URGENT:
        return looked_at is None or age >= looked_at + _URGENT_PAUSE
    first = _CLOCK if record.callback_url is None else _CALL_MISSED
    return age >= max(first, _GROWTH * (looked_at or timedelta(0)))


def due_to_go_on(
    left: Iterable[tuple[_Partitions, datetime]],
    launched: Mapping[_Partitions, datetime],
    now: datetime,
) -> list[_Partitions]:
    """Return the partitions whose last run left rows for want of room, and when it ended.

    They are launched again after a pause, for as long as rows are left.
    """
    return [
        where
        for where, ended_at in left
        if now - max(ended_at, launched.get(where, ended_at)) >= _PAUSE
    ]


def build_collect_sensor(
    *,
    name: str,
    job_name: str,
    images_key: dg.AssetKey,
    resource_key: str,
    minimum_interval_s: int = 30,
) -> dg.SensorDefinition:
    """Build the sensor that launches the runs which collect.

    It looks at what successful runs of ``images`` have left at the server, and at those that left
    rows because the server took no more. What a failed or cancelled run has left is the salvage's,
    which buys nothing.
    """

    def buys(run: dg.DagsterRun) -> bool:
        # Also by the UI's button, a backfill or the automation, whose runs are of no named job.
        return run.job_name == job_name or images_key in (run.asset_selection or ())

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
        krea = krea_of(context, resource_key)
        now = datetime.now(timezone.utc)
        try:
            waiting, called = _waiting(krea)
        except KreaError as error:
            return dg.SkipReason(str(error))
        launched = _read_cursor(context.cursor)
        run_ids = {record.run_id for record in waiting if record.run_id}
        partitions = _partitions_of(context.instance, buys, run_ids)
        due = due_collections(waiting, partitions, called, launched, now)
        left = _left_for_room(context.instance, buys)
        under_way = _under_way(context.instance, buys)
        runs = [one for one in due if one.partitions not in under_way][:_MOST_RUNS]
        known = {*under_way, *(one.partitions for one in due)}
        ended = ((where, _ended_at(record)) for where, record in left.items() if where not in known)
        for where in due_to_go_on(ended, launched, now)[: _MOST_RUNS - len(runs)]:
            if not _is_followed(context.instance, buys, where, left[where]):
                runs.append(Due(where, 0, now))
        if not runs:
            return dg.SkipReason(f"{len(waiting)} images are at the server, none to collect yet.")
        launched.update((one.partitions, now) for one in runs)
        return dg.SensorResult(
            run_requests=[
                dg.RunRequest(tags={**dict(one.partitions), COLLECTS_TAG: str(one.images)})
                for one in runs
            ],
            cursor=_cursor(
                {
                    where: launched[where]
                    for where in {*partitions.values(), *left}
                    if where in launched
                }
            ),
        )

    return collect_sensor


def _waiting(krea: Backend) -> tuple[list[Record], Mapping[str, ReceivedCallback]]:
    """What is paid for and held by no living run, and what was called about of it."""
    if not krea.has_journal():
        return [], {}
    # Those of unknown outcome too: a call about one may name its task.
    with krea.open_journal() as journal:
        waiting = journal.unattended()
        return waiting, journal.callbacks.received([record.request_key for record in waiting])


def _partitions_of(instance: dg.DagsterInstance, buys: _Buys, run_ids: Iterable[str]) -> _Runs:
    """The partitions of the successful runs among these, by run id."""
    found: dict[str, _Partitions] = {}
    for chunk in chunks(sorted(run_ids)):
        ended = dg.RunsFilter(run_ids=chunk, statuses=[dg.DagsterRunStatus.SUCCESS])
        for run in instance.get_runs(ended):
            if buys(run) and (tags := _partition_tags(run)):
                found[run.run_id] = tags
    return found


def _left_for_room(instance: dg.DagsterInstance, buys: _Buys) -> dict[_Partitions, dg.RunRecord]:
    """The newest runs that left rows for want of room, by their partitions.

    Their tag says so, and is changed where a run has followed: nothing is kept elsewhere.
    """
    found: dict[_Partitions, dg.RunRecord] = {}
    left = dg.RunsFilter(tags={GOES_ON_TAG: GOES_ON}, statuses=[dg.DagsterRunStatus.SUCCESS])
    for record in instance.get_run_records(left, limit=_MOST_LOOKED_AT, ascending=True):
        where = _partition_tags(record.dagster_run)
        if not where or not buys(record.dagster_run):
            continue
        if (earlier := found.get(where)) is not None:
            _note_followed(instance, earlier)
        found[where] = record
    return found


def _is_followed(
    instance: dg.DagsterInstance, buys: _Buys, where: _Partitions, record: dg.RunRecord
) -> bool:
    """Whether a later run that buys was for the same partitions, whatever became of it."""
    later = dg.RunsFilter(tags=dict(where), created_after=record.create_timestamp)
    followed = any(
        buys(run) and run.run_id != record.dagster_run.run_id for run in instance.get_runs(later)
    )
    if followed:
        _note_followed(instance, record)
    return followed


def _note_followed(instance: dg.DagsterInstance, record: dg.RunRecord) -> None:
    instance.add_run_tags(record.dagster_run.run_id, {GOES_ON_TAG: _FOLLOWED})


def _ended_at(record: dg.RunRecord) -> datetime:
    ended_s = record.end_time or record.create_timestamp.timestamp()
    return datetime.fromtimestamp(ended_s, timezone.utc)


def _under_way(instance: dg.DagsterInstance, buys: _Buys) -> set[_Partitions]:
    runs = instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED))
    return {_partition_tags(run) for run in runs if buys(run)}


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

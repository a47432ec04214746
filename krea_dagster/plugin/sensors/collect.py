"""Submit now, collect later: the sensor that launches the runs which collect.

A run that does not wait ends once its images are submitted. When callbacks report finished images,
or enough time has passed without one, the same partitions are launched again: that run fetches
finished images, submits those that the server did not accept before, and ends as well.
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
from krea_dagster.plugin.config import TRIAL_TAG
from krea_dagster.plugin.names import JOB_NAME, Names
from krea_dagster.plugin.partitions import RANGE_END_TAG, RANGE_START_TAG
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.pruning import UNFINISHED

#: The tag of a run that collects: the number of images that are due.
COLLECTS_TAG: Final = "krea/collects"

#: The tags with the partitions of a run, and with the rows of them that it takes.
_PARTITION_TAGS: Final = ("dagster/partition", RANGE_START_TAG, RANGE_END_TAG, TRIAL_TAG)

#: Runs that one tick launches; the next tick launches the rest.
_MOST_RUNS: Final = 10

#: The tag of a run that left rows because the server accepted no more, and its value.
GOES_ON_TAG: Final = "krea/goes_on"
GOES_ON: Final = "yes"
#: The tag's value once a later run was for the same partitions.
_FOLLOWED: Final = "followed"

#: Maximum number of such runs, the oldest first, that a tick considers.
_MOST_CONSIDERED: Final = 1000

#: The age at which an image is collected without a callback, and with a missing callback.
_FIRST_AGE: Final = timedelta(minutes=1)
_CALLBACK_MISSED: Final = timedelta(minutes=10)
#: If an image was unfinished at some age, it is collected again at this multiple of that age.
_GROWTH: Final = 1.5
#: From this age on an image is collected every half hour: its link is valid for 24 hours. After
#: two days it is left to the salvage and to people.
_URGENT: Final = timedelta(hours=20)
_URGENT_PAUSE: Final = timedelta(minutes=30)
_GIVEN_UP: Final = timedelta(hours=48)
#: Minimum time between two collections without a new callback.
_PAUSE: Final = timedelta(minutes=5)

#: The partitions of a run, by its tags.
_Partitions = tuple[tuple[str, str], ...]
#: The partitions of several runs, by run id.
_Runs = dict[str, _Partitions]
#: Returns whether a run buys, and so collects.
_Buys = Callable[[dg.DagsterRun], bool]


@dataclass(frozen=True)
class Due:
    """A collection to launch: the partitions of an earlier run, and how many images are due."""

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
    """Return the partitions to collect now; those whose links expire soonest first.

    ``waiting`` are paid for and not claimed by a run; ``partitions`` are those of the runs that
    submitted them, by run id: images of other runs are not collected here. ``called`` are the
    callbacks by request key, and ``launched`` is when partitions were last launched.
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
        return False  # only a callback brings news about it
    age = now - at
    tried = None if launched_at is None else launched_at - at  # its age at the last collection
    if age >= _GIVEN_UP:
        return False
    if record.state is State.COMPLETED:  # its link is known
        return tried is None or age >= max(_GROWTH * tried, tried + _PAUSE)
    if age >= _URGENT:
        return tried is None or age >= tried + _URGENT_PAUSE
    first = _FIRST_AGE if record.callback_url is None else _CALLBACK_MISSED
    return age >= max(first, _GROWTH * (tried or timedelta(0)))


def due_to_go_on(
    left: Iterable[tuple[_Partitions, datetime]],
    launched: Mapping[_Partitions, datetime],
    now: datetime,
) -> list[_Partitions]:
    """Return the partitions to launch again, because the server accepted no more of their rows.

    ``left`` has the partitions and when their last run ended. A pause lies between two runs.
    """
    return [
        where
        for where, ended_at in left
        if now - max(ended_at, launched.get(where, ended_at)) >= _PAUSE
    ]


def build_collect_sensor(names: Names, *, minimum_interval_s: int = 30) -> dg.SensorDefinition:
    """Build the sensor that launches the runs which collect.

    It considers images that successful runs of ``images`` have left at the server, and runs that
    left rows because the server accepted no more. Images of failed or cancelled runs are left to
    the salvage, which buys nothing.
    """
    job_name, images_key = names.prefixed(JOB_NAME), names.key("images")

    def buys(run: dg.DagsterRun) -> bool:
        # Also runs from the UI's button, a backfill or the automation, which have no named job.
        return run.job_name == job_name or images_key in (run.asset_selection or ())

    @dg.sensor(
        name=names.prefixed("krea_collect"),
        job_name=job_name,
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.resource_key},
        description="Launches runs that collect images, after callbacks or when they are due.",
    )
    def collect_sensor(
        context: dg.SensorEvaluationContext,
    ) -> dg.SensorResult | dg.SkipReason:
        krea = krea_of(context, names.resource_key)
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
            return dg.SkipReason(f"{len(waiting)} images are at the server; none is due yet.")
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
    """Return the records that are paid for and not claimed by a living run, and their callbacks."""
    if not krea.has_journal():
        return [], {}
    # Also those with an unknown outcome: a callback may name the task.
    with krea.open_journal() as journal:
        waiting = journal.unattended()
        return waiting, journal.callbacks.received([record.request_key for record in waiting])


def _partitions_of(instance: dg.DagsterInstance, buys: _Buys, run_ids: Iterable[str]) -> _Runs:
    """Return the partitions of the successful runs among these, by run id."""
    found: dict[str, _Partitions] = {}
    for chunk in chunks(sorted(run_ids)):
        ended = dg.RunsFilter(run_ids=chunk, statuses=[dg.DagsterRunStatus.SUCCESS])
        for run in instance.get_runs(ended):
            if buys(run) and (tags := _partition_tags(run)):
                found[run.run_id] = tags
    return found


def _left_for_room(instance: dg.DagsterInstance, buys: _Buys) -> dict[_Partitions, dg.RunRecord]:
    """Return the newest runs that left rows because the server accepted no more, by partitions.

    Their tag says so. It is changed once a run has followed, and is the only state that is kept.
    """
    found: dict[_Partitions, dg.RunRecord] = {}
    left = dg.RunsFilter(tags={GOES_ON_TAG: GOES_ON}, statuses=[dg.DagsterRunStatus.SUCCESS])
    for record in instance.get_run_records(left, limit=_MOST_CONSIDERED, ascending=True):
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
    """Return whether a later run bought for the same partitions, successfully or not."""
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
    runs = instance.get_runs(dg.RunsFilter(statuses=list(UNFINISHED)))
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

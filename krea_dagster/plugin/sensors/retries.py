"""The sensor that makes Dagster's run retries happen where they were missed.

Dagster stores the event of a failed run before the run's status. Its daemon reads the event once;
if it reads the run in between, the run is not failed yet, and is never retried: it has the tag
``dagster/will_retry``, and its backfill waits for the retry forever. (dagster 1.13.27,
``event_log_consumer.py`` and ``auto_run_reexecution.py``; seen in one of two backfills that lost a
worker.) When it is reported once more, the failure is retried.
"""

from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from typing import Final

import dagster as dg

from krea_dagster.plugin.names import JOB_NAME, Names
from krea_dagster.plugin.sensors.lost_launches import lost_launches

#: Seconds between two ticks of the sensor.
_TICK_S: Final = 60

#: Dagster's daemon looks every 5 seconds. A failure that is older than this, and was not retried,
#: was missed.
_MISSED_AFTER: Final = timedelta(seconds=30)
#: A failure that is older than this is left alone: a person has seen it.
_LAST_AGE: Final = timedelta(days=1)

#: Dagster's tags of a failed run: it is to be retried, and the run that retries it.
_WILL_RETRY: Final = "dagster/will_retry"
_RETRIED_BY: Final = "dagster/auto_retry_run_id"
#: The tag of a run whose failure the sensor has reported again, which it does once.
REPORTED_TAG: Final = "krea/failure_reported_again"


def _utc_now() -> datetime:
    return datetime.now(timezone.utc)


def build_retries_sensor(
    names: Names,
    images: dg.AssetsDefinition,
    *,
    utc_now: Callable[[], datetime] = _utc_now,
    minimum_interval_s: int = _TICK_S,
) -> dg.SensorDefinition:
    """Build the sensor that makes good what Dagster has missed about runs that buy images.

    It reports missed failures of runs again, and makes launches of the automation again for which
    there is no run (``lost_launches``).
    """
    keys = frozenset({images.key, names.manifest_key})

    @dg.sensor(
        name=names.prefixed("krea_retries"),
        job_name=names.prefixed(JOB_NAME),
        minimum_interval_seconds=minimum_interval_s,
        default_status=dg.DefaultSensorStatus.RUNNING,
        description=(
            "Finds failed runs that Dagster meant to retry and has not, and reports their failure "
            "once more. Launches what the automation has launched without a run coming of it."
        ),
    )
    def retries_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult | dg.SkipReason:
        now = utc_now()
        said = _report_missed(context, keys, now)
        if lost := lost_launches(context, names, images, now):
            context.log.info("%s Launched again what came to nothing: %d runs.", said, len(lost))
            return dg.SensorResult(run_requests=lost)
        return dg.SkipReason(said)

    return retries_sensor


def _report_missed(
    context: dg.SensorEvaluationContext, keys: frozenset[dg.AssetKey], now: datetime
) -> str:
    """Report missed failures of runs for these assets again, and return what was done."""
    instance = context.instance
    if not instance.run_retries_enabled:
        return "Run retries are off."
    failed = instance.get_run_records(
        dg.RunsFilter(
            statuses=[dg.DagsterRunStatus.FAILURE],
            tags={_WILL_RETRY: "true"},
            updated_after=now - _LAST_AGE,
        )
    )
    missed = [
        record.dagster_run
        for record in failed
        if not {_RETRIED_BY, REPORTED_TAG} & record.dagster_run.tags.keys()
        and record.end_time is not None
        and record.end_time < (now - _MISSED_AFTER).timestamp()
        and keys & _assets_of(record.dagster_run, context)
    ]
    for run in missed:
        instance.add_run_tags(run.run_id, {REPORTED_TAG: "true"})
        instance.report_run_failed(
            run, "Dagster has not retried this run, so its failure is reported once more."
        )
    if not missed:
        return "Dagster has retried every run that it meant to."
    runs = ", ".join(run.run_id for run in missed)
    return f"Reported again, so that Dagster retries them: {runs}."


def _assets_of(run: dg.DagsterRun, context: dg.SensorEvaluationContext) -> frozenset[dg.AssetKey]:
    """Return the assets that a run was launched for; none if its job is not of this location."""
    if run.asset_selection is not None:
        return frozenset(run.asset_selection)
    repository = context.repository_def
    if repository is None or not repository.has_job(run.job_name):
        return frozenset()
    return frozenset(repository.get_job(run.job_name).asset_layer.executable_asset_keys)

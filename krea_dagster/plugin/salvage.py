"""Collects what is paid for and at hand nowhere: an asset, its job, and the sensor that starts it.

Only asks and fetches; nothing here can buy.
"""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta, timezone

import dagster as dg

from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.errors import KreaError
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.assets import KreaAssets, Narrator, rewrite_manifests
from krea_dagster.plugin.batch import Batch
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.observer import tell_report
from krea_dagster.plugin.resource import KreaResource, krea_of

#: Seconds between two looks of the sensor. A link lives for 24 hours.
_LOOK_EVERY_S = 300

#: Where runs collect later, nobody has forgotten an image that is younger than this.
_LATE = timedelta(hours=1)


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
    that it completed. The sensor starts the job while there is something to save that no living
    run holds; with ``collect_later``, what the runs that collect have not taken for an hour.
    """
    manifest_key = assets.image_manifest.key

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
                run_id=context.run.run_id, table=assets.table, on_progress=Narrator(context)
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
        minimum_interval_seconds=_LOOK_EVERY_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={resource_key},
        description="Starts the salvage while something is paid for and left behind.",
    )
    def salvage_sensor(
        context: dg.SensorEvaluationContext,
    ) -> dg.RunRequest | dg.SkipReason:
        krea: KreaResource = getattr(context.resources, resource_key)
        try:
            waiting = krea.left_behind(assets.table)
            if collect_later:
                since = datetime.now(timezone.utc) - _LATE
                waiting = [one for one in waiting if (one.submitted_at or since) <= since]
        except KreaError as error:
            return dg.SkipReason(str(error))
        if not waiting:
            return dg.SkipReason("Nothing that was paid for is left behind.")
        running = context.instance.get_runs(
            dg.RunsFilter(
                job_name=job.name,
                statuses=[
                    dg.DagsterRunStatus.QUEUED,
                    dg.DagsterRunStatus.STARTING,
                    dg.DagsterRunStatus.STARTED,
                ],
            ),
            limit=1,
        )
        if running:
            return dg.SkipReason("A salvage is under way.")
        return dg.RunRequest(tags={"krea/left_behind": str(len(waiting))})

    return dg.Definitions(assets=[salvaged_images], jobs=[job], sensors=[salvage_sensor])


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

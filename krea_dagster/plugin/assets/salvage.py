"""The asset ``salvaged_images`` and its job: collect what is paid for; buy nothing."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone
from typing import Final

import dagster as dg

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.application.purchase import collect
from krea_dagster.application.salvage_schedule import due
from krea_dagster.engine.record import Record
from krea_dagster.engine.states import State
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.assets.images import rewrite_manifests
from krea_dagster.plugin.failures import as_failure
from krea_dagster.plugin.metadata import krea_metadata
from krea_dagster.plugin.names import SALVAGE_JOB_NAME, Names
from krea_dagster.plugin.progress import step_log, tell_report
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.salvage import SINCE_TAG, build_salvage_sensor
from krea_dagster.prompts import PromptTable

#: With ``collect_later``, the salvage takes images only from this age on.
_LATE: Final = timedelta(hours=1)


@dataclass(frozen=True)
class SalvagedTable:
    """A prompt table whose images a salvage collects, and the asset of its manifests."""

    table: PromptTable
    manifest_key: dg.AssetKey


def build_salvage(
    names: Names, tables: Sequence[SalvagedTable], *, collect_later: bool = False
) -> dg.Definitions:
    """Build the salvage of prompt tables: an asset, a job, and the sensor that starts it.

    The asset collects, the most urgent link first, and rewrites the manifests of the partitions
    that it completed. With ``collect_later`` the sensor leaves images to the runs that collect for
    an hour.
    """
    first = _LATE if collect_later else timedelta(0)

    @dg.asset(
        key=names.key("salvaged_images"),
        group_name=names.group_name,
        kinds={"file"},
        required_resource_keys={names.resource_key},
        description=(
            "Images that earlier runs paid for and did not collect: polled and fetched, never "
            "bought."
        ),
    )
    def salvaged_images(context: dg.AssetExecutionContext) -> dg.MaterializeResult[None]:
        krea = krea_of(context, names.resource_key)
        with step_log(context.log, "looking for paid images") as log, as_failure():
            report, found = collect(
                krea,
                run_id=context.run.run_id,
                tables=[one.table for one in tables],
                only=_due_for(context.run, first),
                on_progress=log.progress,
            )
            tell_report(report)
            log.doing("writing the manifests")
            for one in tables:
                # Of a table without a collected image nothing is read: its file may be missing.
                if keys := _completed(krea, one.table, found.values()):
                    with Batch.read(one.table, keys, krea) as batch:
                        rewrite_manifests(context, batch, krea, one.manifest_key)
        return dg.MaterializeResult(metadata=krea_metadata(salvage_figures(list(found.values()))))

    job = dg.define_asset_job(
        names.prefixed(SALVAGE_JOB_NAME),
        selection=dg.AssetSelection.assets(salvaged_images),
        description="Collects images that are paid for and were not collected; buys nothing.",
    )
    sensor = build_salvage_sensor(names, [one.table for one in tables], job=job, first=first)
    return dg.Definitions(assets=[salvaged_images], jobs=[job], sensors=[sensor])


def _completed(krea: Backend, table: PromptTable, found: Iterable[Record]) -> list[str]:
    """Return the partitions of a table with a collected image."""
    with krea.open_journal() as journal:
        table_id = krea.table_id(journal, table)
    collected = {
        record.partition_key
        for record in found
        if record.state is State.STORED and record.table_id in ("", table_id)
    }
    return [key for key in table.partition_keys() if key in collected] if collected else []


def _due_for(run: dg.DagsterRun, first: timedelta) -> Callable[[Record], bool]:
    """Return what a salvage takes: what was due when the sensor started it, or everything."""
    if (since := run.tags.get(SINCE_TAG)) is None:
        return lambda _: True
    after, now = datetime.fromisoformat(since), datetime.now(timezone.utc)
    return lambda record: bool(due([record], after, now, first=first))


def salvage_figures(records: Sequence[Record]) -> dict[str, int | float]:
    """Return the outcome of a salvage's requests: counts, and credits."""
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

"""The assets: images (buys), image_manifest (a view of the journal), and what they hang on.

That are two external ones, of the same table: ``prompts``, what its rows ask for, and
``prompt_columns``, what they carry along.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import dagster as dg

from krea_dagster import redact
from krea_dagster.application.batch import Batch
from krea_dagster.application.manifest_summary import Figures, watched
from krea_dagster.application.quota import Asked, ask_for_wanted
from krea_dagster.application.quotes import quote_images
from krea_dagster.curation.accepted.quota import WantedImages
from krea_dagster.curation.accepted.rules import Rules
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.manifest import (
    MANIFEST_SCHEMA,
    Manifests,
    manifest_name,
    write_manifest_parts,
)
from krea_dagster.models import credits_from_units
from krea_dagster.plugin.checks import CHECK_NAME, check_rows
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.failures import as_failure, failure_tags, stop_failure
from krea_dagster.plugin.io_manager import MANIFEST_ASSET, manifest_folders
from krea_dagster.plugin.known_journal import JOURNAL_ENTRY, journal_entry, refuse_second_journal
from krea_dagster.plugin.metadata import (
    images_metadata,
    manifest_metadata,
    prompts_lineage,
    quote_metadata,
    table_schema,
)
from krea_dagster.plugin.partitions import partitions_for
from krea_dagster.plugin.progress import tell_progress, tell_report
from krea_dagster.plugin.quiet_beta import quiet_beta
from krea_dagster.plugin.resource import KreaResource, krea_of
from krea_dagster.plugin.sensors.collect import GOES_ON, GOES_ON_TAG
from krea_dagster.plugin.sensors.prompts import report_in_step
from krea_dagster.prompts import Plan, PromptTable

#: Seconds between two lines of progress in Dagster's log: each is an event in its database.
_LOG_EVERY_S = 30.0

#: Said where images were found that should have announced themselves.
_MISSED = (
    "%d finished images were not called about, and found by looking. Is `krea-dagster callbacks "
    "serve` running, and is it reached from outside at callback_base_url?"
)

#: The pool of the steps that buy.
POOL = "krea"

#: Dagster's tag of the runs of one backfill.
_BACKFILL_TAG = "dagster/backfill"


@dataclass(frozen=True)
class KreaAssets:
    """The assets of one prompt table, and what is needed to wire them."""

    table: PromptTable
    partitions_def: dg.PartitionsDefinition[str]
    prompts: dg.AssetSpec
    prompt_columns: dg.AssetSpec
    images: dg.AssetsDefinition
    image_manifest: dg.AssetsDefinition

    @property
    def all(self) -> list[dg.AssetSpec | dg.AssetsDefinition]:
        """All of them, for ``dagster.Definitions``."""
        return [self.prompts, self.prompt_columns, self.images, self.image_manifest]


@quiet_beta
def build_krea_assets(
    table: PromptTable,
    *,
    start: str | None = None,
    key_prefix: str | Sequence[str] = (),
    group_name: str = "krea",
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    pool: str | None = POOL,
    collect_later: bool = False,
    wanted: WantedImages | None = None,
    rules: Rules | None = None,
    resource_key: str = "krea",
    io_manager_key: str = "krea_manifest",
    relative_storage: str = "",
) -> KreaAssets:
    """Build the assets of a prompt table.

    ``prompts`` is external; each run, and the sensor, report its data version per partition.
    ``prompt_columns`` is too, for the columns that only the manifest carries; the sensor reports
    it.
    ``images`` buys: a run takes one partition, or with the default backfill policy
    (single_run) any range of them, as one step with one sliding window. ``image_manifest`` is
    made from the journal without network, through the IO manager ``io_manager_key``; another
    one than ``KreaManifestIOManager`` gets a ``krea_dagster.manifest.Manifests``, whose
    ``to_table`` gives the rows.

    ``start`` is the first day of partitions by time. ``automation_condition`` and
    ``freshness_policy`` are those of ``images`` and ``image_manifest``. ``pool`` bounds how many
    steps of ``images`` work at once, across runs; their HTTP calls are the resource's to bound.
    With ``collect_later`` a run submits, collects what has ended, and ends; ``krea_collect``, the
    sensor of ``build_krea_definitions``, launches the next.
    With ``wanted`` a run asks again in place of images that ``rules`` or a person refused, until
    as many are accepted, and buys no more than that (``krea_dagster.application.quota``).
    ``relative_storage`` is the storage root as it was named, where that was a relative path: in
    another working folder a run does not begin a second journal.
    Raises ConfigError for a start that cannot be used.
    """
    key_prefix = [key_prefix] if isinstance(key_prefix, str) else key_prefix
    partitions_def = partitions_for(table, name="_".join([*key_prefix, "krea"]), start=start)
    policy = backfill_policy or dg.BackfillPolicy.single_run()
    prompts_key, columns_key, images_key, manifest_key = (
        dg.AssetKey([*key_prefix, name])
        for name in ("prompts", "prompt_columns", "images", MANIFEST_ASSET)
    )
    prompts, prompt_columns = _table_specs(
        table, prompts_key, columns_key, partitions_def, group_name
    )

    @dg.asset(
        key=images_key,
        deps=[prompts_key],
        partitions_def=partitions_def,
        backfill_policy=policy,
        group_name=group_name,
        kinds={"evolink", "png"},
        automation_condition=automation_condition,
        freshness_policy=freshness_policy,
        pool=pool,
        required_resource_keys={resource_key},
        check_specs=[
            dg.AssetCheckSpec(
                CHECK_NAME,
                asset=images_key,
                description="Every row of the prompt table has its verified image.",
            )
        ],
        description=(
            "Images of Krea 2 Turbo: each row bought once, fetched, verified and named by what "
            "decides the picture."
        ),
    )
    def images(
        context: dg.AssetExecutionContext, config: KreaImagesConfig
    ) -> Iterator[dg.MaterializeResult[None]]:
        krea = krea_of(context, resource_key)
        with ExitStack() as stack:
            with as_failure():
                root = context.run.root_run_id or context.run.run_id
                refuse_second_journal(context, images_key, krea, table, relative_storage)
                batch = stack.enter_context(_wished(context, table, config, krea, root))
                folders = manifest_folders(manifest_key)
                batch, asked = ask_for_wanted(
                    batch, config, krea, wanted, rules, folders=folders, raised_by=root
                )
                stack.enter_context(batch)
            report_in_step(context, prompts_key, batch.versions())
            _say_before(context, batch, krea, asked)
            with as_failure():
                standing = batch.standing(krea)
                quoted = quote_images(krea, standing, ask_again=config.retry_errors).by_partition()
                report = krea.carry(
                    standing.wanted(),
                    reused_rows=int(standing.whole.sum()),
                    run_id=context.run.run_id,
                    table=table,
                    # Not shared with a re-execution: it is how one goes on after a top-up.
                    launch=context.run.tags.get(_BACKFILL_TAG) or context.run.run_id,
                    ask_again=config.retry_errors,
                    resolutions=config.resolutions(batch.plan),
                    wait=config.waits(not collect_later),
                    on_progress=Narrator(context),
                )
                batch.end_wishes(krea)
            del standing
            _say_after(context, report)
            total = Figures()
            journal = journal_entry(krea, table, relative_storage)
            for key, figures in batch.figures(krea, context.run.run_id):
                total += figures
                values = images_metadata(figures, krea.open_storage(), seconds=report.seconds)
                values = {**values, **quote_metadata(quoted.get(key)), **asked.metadata(key)}
                context.add_asset_metadata({**values, JOURNAL_ENTRY: journal}, partition_key=key)
            _tag_run(context, report, total, batch.held_count)
            yield dg.MaterializeResult(check_results=[check_rows(total, report, batch.held_count)])
            if report.stopped is not None:
                # The step that writes the manifest will not run after this one has failed.
                rewrite_manifests(context, batch, krea, manifest_key)
                raise stop_failure(report)

    @dg.asset(
        key=manifest_key,
        deps=[images_key, columns_key],
        partitions_def=partitions_def,
        backfill_policy=policy,
        group_name=group_name,
        kinds={"parquet", "pyarrow"},
        automation_condition=automation_condition,
        freshness_policy=freshness_policy,
        required_resource_keys={resource_key},
        io_manager_key=io_manager_key,
        metadata={
            "dagster/column_schema": table_schema(MANIFEST_SCHEMA),
            "dagster/column_lineage": prompts_lineage(MANIFEST_SCHEMA, prompts_key),
        },
        description=(
            "One row per image asked for: seed, size, credits, file, and why one is missing."
        ),
    )
    def image_manifest(context: dg.AssetExecutionContext) -> Manifests:
        krea = krea_of(context, resource_key)
        storage, made = krea.open_storage(), Manifests()
        with as_failure(), Batch.read(table, partition_keys_of(context), krea) as batch:
            shown = {
                "dagster/column_schema": table_schema(batch.manifest_schema),
                "dagster/column_lineage": prompts_lineage(batch.manifest_schema, prompts_key),
            }
            with krea.open_journal() as journal:
                for key in batch.plan.keys:
                    figures = Figures()
                    parts = batch.manifest_parts(key, krea, journal, context.run.run_id)
                    watching = watched(parts, batch.plan.digests(key), figures)
                    made.add(key, batch.manifest_schema, watching)
                    path = storage.locate(manifest_name(key, manifest_folders(manifest_key)))
                    values = {**manifest_metadata(figures, path), **shown}
                    context.add_asset_metadata(values, partition_key=key)
        return made

    return KreaAssets(table, partitions_def, prompts, prompt_columns, images, image_manifest)


def _tag_run(
    context: dg.AssetExecutionContext, report: RunReport, total: Figures, held: int
) -> None:
    """Say in the run's tags how it ended."""
    missing = total.missing_count - (0 if report.waited else total.under_way) - held
    if tags := failure_tags(report, missing):
        context.instance.add_run_tags(context.run.run_id, tags)


def _wished(
    context: dg.AssetExecutionContext,
    table: PromptTable,
    config: KreaImagesConfig,
    krea: KreaResource,
    raised_by: str,
) -> Batch:
    """Read the partitions of a run, with the images that it is to ask for again."""
    batch = Batch.read(table, partition_keys_of(context), krea, to_buy=True, look=True)
    return batch.ask_again(config, krea, raised_by)


def _table_specs(
    table: PromptTable,
    prompts_key: dg.AssetKey,
    columns_key: dg.AssetKey,
    partitions_def: dg.PartitionsDefinition[str],
    group_name: str,
) -> tuple[dg.AssetSpec, dg.AssetSpec]:
    """The two external assets that stand for the table: what it asks for, and what it carries."""
    source = redact.location(table.source)
    prompts = dg.AssetSpec(
        prompts_key,
        partitions_def=partitions_def,
        group_name=group_name,
        kinds={"parquet"},
        description=f"The prompt table {source}, partitioned by {table.partition_by}.",
        metadata={"dagster/uri": source},
    )
    prompt_columns = dg.AssetSpec(
        columns_key,
        partitions_def=partitions_def,
        group_name=group_name,
        kinds={"parquet"},
        description=(
            "The further columns of the prompt table, which the manifest carries along: where only "
            "they change, nothing is bought."
        ),
    )
    return prompts, prompt_columns


def rewrite_manifests(
    context: dg.AssetExecutionContext, batch: Batch, krea: KreaResource, key: dg.AssetKey
) -> None:
    """Write the manifests of a batch from a step of another asset, and say so to Dagster."""
    storage, folders = krea.open_storage(), manifest_folders(key)
    with krea.open_journal() as journal:
        for partition in batch.plan.keys:
            figures = Figures()
            parts = batch.manifest_parts(partition, krea, journal, context.run.run_id)
            watching = watched(parts, batch.plan.digests(partition), figures)
            path = write_manifest_parts(
                storage, partition, batch.manifest_schema, watching, folders
            )
            values = manifest_metadata(figures, path)
            context.log_event(dg.AssetMaterialization(key, partition=partition, metadata=values))


def partition_keys_of(context: dg.AssetExecutionContext) -> list[str]:
    """The partitions of a step, as plain text: Dagster has a class of its own for some."""
    return [str(key) for key in context.partition_keys]


class Narrator:
    """Tells the observer of every change, and Dagster's log of one now and then."""

    def __init__(self, context: dg.AssetExecutionContext) -> None:
        self._log = context.log
        self._next_s = time.monotonic() + _LOG_EVERY_S

    def __call__(self, progress: Progress) -> None:
        """Take note of how far the run is."""
        tell_progress(progress)
        if time.monotonic() >= self._next_s:
            self._next_s = time.monotonic() + _LOG_EVERY_S
            self._log.info(progress_line(progress))


def progress_line(progress: Progress) -> str:
    """One line on how far a run is."""
    return (
        f"{progress.ended} of {progress.total} images: {progress.delivered} delivered, "
        f"{progress.reused} reused, {progress.failed} failed, {progress.left} left, "
        f"{progress.in_flight} in flight, "
        f"{credits_from_units(progress.charged_units):g} credits"
    )


def _say_before(
    context: dg.AssetExecutionContext, batch: Batch, krea: KreaResource, asked: Asked
) -> None:
    if batch.plan.warning_count:
        context.log.warning(_warnings(batch.plan))
    if asked.outcomes:
        context.log.info(asked.line())
    if krea.emulator:
        context.log.warning(
            "No EvoLink key is set: the emulator draws the pictures. They are synthetic, "
            "and nothing is charged."
        )


def _say_after(context: dg.AssetExecutionContext, report: RunReport) -> None:
    tell_report(report)
    if report.left_for_room:
        context.log.info(
            "%d images are left to a later run: the server took no more.", report.left_for_room
        )
        context.instance.add_run_tags(context.run.run_id, {GOES_ON_TAG: GOES_ON})
    for message in (*report.price_increases, *report.recovered, *report.same_files):
        context.log.warning("%s.", message)
    if report.missed_callbacks:
        context.log.warning(_MISSED, report.missed_callbacks)
    for message in report.caps_reached:
        context.log.warning("%s. The rows that did not fit are deferred.", message)


def _warnings(plan: Plan) -> str:
    lines = "\n".join(f"  {problem}" for problem in plan.warnings)
    return f"{plan.warning_count} prompts are very long:\n{lines}"

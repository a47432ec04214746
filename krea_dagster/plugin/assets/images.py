"""The assets ``images`` (buys) and ``image_manifest`` (a view of the journal).

They depend on two external assets for the same table: ``prompts`` (what rows request) and
``prompt_columns`` (columns that are only passed through to the manifest).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import dagster as dg
import pyarrow as pa

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.application.curation import Curation
from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.application.present_partitions import retire_departed
from krea_dagster.application.pruning import pruned_note, pruned_rows
from krea_dagster.application.purchase import local_user
from krea_dagster.application.quota import QuotaState
from krea_dagster.application.quotes import quote_images
from krea_dagster.application.run import buy_batch, prepared, write_manifests
from krea_dagster.application.run_log import RunLog
from krea_dagster.application.run_text import cancel_line, end_line, quote_line, trial_line
from krea_dagster.engine.journal.attribution_log import Buyer
from krea_dagster.engine.run.report import RunReport
from krea_dagster.manifest import MANIFEST_SCHEMA, Manifests, manifest_name
from krea_dagster.plugin.checks import CHECK_NAME, check_rows
from krea_dagster.plugin.config import KreaImagesConfig
from krea_dagster.plugin.data_versions import report_in_step
from krea_dagster.plugin.failures import as_failure, failure_tags, stop_failure
from krea_dagster.plugin.io_manager import manifest_folders
from krea_dagster.plugin.known_journal import JOURNAL_ENTRY, journal_entry, refuse_second_journal
from krea_dagster.plugin.metadata import (
    images_metadata,
    krea_metadata,
    manifest_metadata,
    prompts_lineage,
    quota_metadata,
    quote_metadata,
    table_schema,
)
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.partitions import partitions_for, without_beta_warnings
from krea_dagster.plugin.progress import step_log, tell_report
from krea_dagster.plugin.prompts_metadata import plan_metadata, prompts_schema
from krea_dagster.plugin.resource import krea_of
from krea_dagster.plugin.sensors.collect import GOES_ON, GOES_ON_TAG
from krea_dagster.plugin.sensors.prompts import ignoring
from krea_dagster.plugin.upstream import CoercibleToAssetDep, PromptsAsset, Upstream
from krea_dagster.prompts import PromptTable
from krea_dagster.spend.quote import QuoteLine

#: Logged if callbacks are configured but do not arrive.
_MISSED = (
    "%d finished tasks sent no callback and were found by polling. Is `krea-dagster callbacks "
    "serve` running, and reachable from outside at callback_base_url?"
)

#: The pool of the steps that buy.
POOL = "krea"

#: Dagster's tag of the runs of one backfill.
_BACKFILL_TAG = "dagster/backfill"

#: Dagster's tag of the person who launched a run, where it knows them.
_USER_TAG = "dagster/user"


@dataclass(frozen=True)
class KreaAssets:
    """The assets of one prompt table, with the table and its partitions."""

    table: PromptTable
    upstream: Upstream
    partitions_def: dg.PartitionsDefinition[str]
    prompts: dg.AssetSpec
    prompt_columns: dg.AssetSpec
    images: dg.AssetsDefinition
    image_manifest: dg.AssetsDefinition

    @property
    def all(self) -> list[dg.AssetSpec | dg.AssetsDefinition]:
        """All assets, for ``dagster.Definitions``."""
        return [self.prompts, self.prompt_columns, self.images, self.image_manifest]


def build_krea_assets(
    table: PromptTable,
    *,
    start: str | None = None,
    key_prefix: str | Sequence[str] = (),
    group_name: str | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    pool: str | None = POOL,
    deps: Sequence[CoercibleToAssetDep] = (),
    prompts: PromptsAsset | None = None,
    collect_later: bool = False,
    curation: Curation | None = None,
    resource_key: str = "krea",
    io_manager_key: str = "krea_manifest",
    relative_storage: str = "",
    spend_by: Sequence[str] = (),
) -> KreaAssets:
    """Build the assets of a prompt table.

    ``prompts`` and ``prompt_columns`` are external; sensors report their data versions. ``images``
    buys: a run takes one partition or, with the default backfill policy, any range of them, as one
    step with one sliding window. ``image_manifest`` is made from the journal, without network.

    Args:
        table: The prompt table, and how it is partitioned.
        start: First day of partitions by time, as ``YYYY-MM-DD``. By default the table's first, or
            all as an upstream asset of the same windows has them.
        key_prefix: Prefix of the asset keys.
        group_name: Group of the assets; the prefix by default, ``krea`` without one.
        backfill_policy: Of ``images`` and ``image_manifest``; single_run by default.
        automation_condition: Of both; such as ``on_prompts_changed()``.
        freshness_policy: Of both.
        pool: Limits how many steps of ``images`` run at the same time, across runs.
        deps: The assets that write the table. In a job with them ``images`` runs after them; the
            sensor reports what they have changed, and nothing is reported on them.
        prompts: The asset whose value is the table, or the path of one. It is an input of
            ``images``, and is kept in the folder ``table.source``, from which all read it.
        collect_later: Runs submit, collect what has ended, and end; the sensor ``krea_collect`` of
            ``build_krea_definitions`` launches the next.
        curation: A quota of accepted images: runs regenerate what was rejected.
        resource_key: Key of the ``KreaResource``.
        io_manager_key: Key of the manifest's IO manager. One other than ``KreaManifestIOManager``
            receives a ``krea_dagster.manifest.Manifests``, whose ``to_table`` returns the rows.
        relative_storage: The storage root as it was written, if that was a relative path: in
            another working folder a run then refuses to create a second journal.
        spend_by: Columns of the table whose values are written with each purchase, in addition to
            those of the resource.

    Returns:
        The assets, their table and their partitions.

    Raises:
        ConfigError: for a start that cannot be used.

    Example::

        table = PromptTable("data/prompts.parquet", parse_partition_by("hash:8"))
        assets = build_krea_assets(table)
        defs = dg.Definitions(
            assets=assets.all,
            resources={
                "krea": KreaResource(api_key=dg.EnvVar("EVOLINK_API_KEY"), storage="data/krea"),
                "krea_manifest": KreaManifestIOManager(storage="data/krea"),
            },
        )
    """
    names = Names.of(key_prefix, group_name, resource_key)
    partitions_def = partitions_for(table, name=names.prefixed("krea"), start=start)
    upstream = Upstream.of(deps, prompts)
    if start is None:
        partitions_def = upstream.partitions_like(partitions_def)
    upstream = upstream.mapped(partitions_def)
    common: dict[str, Any] = {
        "partitions_def": partitions_def,
        "backfill_policy": backfill_policy or dg.BackfillPolicy.single_run(),
        "group_name": names.group_name,
        "automation_condition": ignoring(automation_condition, upstream.keys),
        "freshness_policy": freshness_policy,
        "required_resource_keys": {resource_key},
    }
    step = _ImagesStep(
        names,
        table,
        upstream,
        curation,
        wait=not collect_later,
        relative=relative_storage,
        spend_by=tuple(spend_by),
    )
    with without_beta_warnings():
        images = _build_images(step, pool, common)
        manifest = _build_image_manifest(names, table, io_manager_key, common)
    external, prompt_columns = _table_specs(names, table, upstream, partitions_def)
    return KreaAssets(table, upstream, partitions_def, external, prompt_columns, images, manifest)


def _build_images(
    step: "_ImagesStep", pool: str | None, common: Mapping[str, Any]
) -> dg.AssetsDefinition:
    key = step.names.key("images")
    description = "Every row of the prompt table has its verified image."

    def images(
        context: dg.AssetExecutionContext, config: KreaImagesConfig
    ) -> Iterator[dg.MaterializeResult[None]]:
        yield from step.run(context, config)

    def images_of_value(
        context: dg.AssetExecutionContext, config: KreaImagesConfig, prompt_table: Any
    ) -> Iterator[dg.MaterializeResult[None]]:
        yield from step.run(context, config, prompt_table)

    built: dg.AssetsDefinition = dg.asset(
        key=key,
        # Of external assets such as prompts a run knows no order, so the upstream is named too.
        deps=[dg.AssetDep(step.names.key("prompts")), *step.upstream.deps],
        ins=step.upstream.ins,
        kinds={"file"},
        pool=pool,
        check_specs=[dg.AssetCheckSpec(CHECK_NAME, asset=key, description=description)],
        description=(
            "Images of Krea 2 Turbo: each row is bought once, fetched, verified, and named by its "
            "request key."
        ),
        **common,
    )(images_of_value if step.upstream.ins else images)
    return built


def _build_image_manifest(
    names: Names, table: PromptTable, io_manager_key: str, common: Mapping[str, Any]
) -> dg.AssetsDefinition:
    def shown(schema: pa.Schema) -> Mapping[str, Any]:
        return {
            "dagster/column_schema": table_schema(schema),
            "dagster/column_lineage": prompts_lineage(schema, names.key("prompts")),
        }

    def image_manifest(context: dg.AssetExecutionContext) -> Manifests:
        krea = krea_of(context, names.resource_key)
        storage = krea.open_storage()
        with (
            step_log(context.log, "making the manifests"),
            as_failure(),
            Batch.read(table, partition_keys_of(context), krea) as batch,
        ):
            schema = shown(batch.manifest_schema)
            made = batch.manifests(krea, context.run.run_id)
            retire_departed(krea, batch.table, names.prefix, written=batch.plan.keys)
        for key, summary in made.summaries.items():
            path = storage.locate(manifest_name(key, names.prefix))
            values = {**krea_metadata(manifest_metadata(summary, path)), **schema}
            context.add_asset_metadata(values, partition_key=key)
        return made.manifests

    built: dg.AssetsDefinition = dg.asset(
        key=names.manifest_key,
        deps=[names.key("images"), names.key("prompt_columns")],
        kinds={"parquet", "arrow"},
        io_manager_key=io_manager_key,
        metadata=shown(MANIFEST_SCHEMA),
        description=(
            "One row per requested image: seed, size, credits, file, and why it is missing."
        ),
        **common,
    )(image_manifest)
    return built


@dataclass(frozen=True)
class _ImagesStep:
    """The step of ``images``. ``relative`` is the storage root as written, if it was relative."""

    names: Names
    table: PromptTable
    upstream: Upstream
    curation: Curation | None
    wait: bool
    relative: str
    spend_by: tuple[str, ...] = ()

    def run(
        self, context: dg.AssetExecutionContext, config: KreaImagesConfig, value: Any = None
    ) -> Iterator[dg.MaterializeResult[None]]:
        """Buy the images of the step's partitions, and yield the result with its check.

        ``value`` is the prompt table, if an asset makes it. Raises Failure if buying stopped.
        """
        krea = krea_of(context, self.names.resource_key)
        with as_failure():
            refuse_second_journal(
                context, self.names.key("images"), krea, self.table, self.relative
            )
        config = config.of_run(context.run.tags)
        if tags := config.trial_tags():
            context.instance.add_run_tags(context.run.run_id, dict(tags))
        with ExitStack() as stack:
            log = stack.enter_context(step_log(context.log, "reading the prompt table"))
            with as_failure():
                self.upstream.keep_input(context, self.table, value)
                batch, quota = stack.enter_context(
                    prepared(
                        krea,
                        self.table,
                        partition_keys_of(context),
                        config,
                        curation=self.curation,
                        folders=self.names.prefix,
                        raised_by=context.run.root_run_id or context.run.run_id,
                    )
                )
            report_in_step(
                context,
                self.names.key("prompts"),
                batch.versions(),
                plan_metadata(batch.plan, self.upstream.lineage(batch.table)),
            )
            for note in batch.unknown_columns(self.spend_by):
                context.log.warning("%s.", note)
            _log_before(context, batch, krea, quota)
            if batch.trial_rows is not None:
                log.say(trial_line(batch.trial_rows))
            with self._kept_if_cancelled(context, log, batch, krea):
                report, quoted = self._buy(context, krea, batch, config, log)
                log.doing("reading what became of each partition")
                _log_after(context, report)
                total = self._add_metadata(
                    context, krea, batch, report=report, quota=quota, quoted=quoted
                )
            _tag_run(context, report, total, batch.held_count)
            log.say(end_line(report.progress, report.seconds, krea.open_storage().shown("")))
            log.doing("reporting the partitions to Dagster")
            yield dg.MaterializeResult(
                check_results=[
                    check_rows(
                        total,
                        report,
                        batch.held_count,
                        trial=batch.trial_rows,
                        notes=batch.notes,
                    )
                ]
            )
            if report.stopped is not None:
                log.doing("writing the manifests")
                # The step that writes the manifest will not run after this one has failed.
                rewrite_manifests(context, batch, krea, self.names.manifest_key)
                raise stop_failure(report)

    def _buy(
        self,
        context: dg.AssetExecutionContext,
        krea: Backend,
        batch: Batch,
        config: KreaImagesConfig,
        log: RunLog,
    ) -> tuple[RunReport, Mapping[str, QuoteLine]]:
        log.doing("comparing the prompts with the journal and the stored images")
        with as_failure():
            state = batch.state(krea, self.spend_by)
            quote = quote_images(krea, state, retry_errors=config.retry_errors)
            log.say(quote_line(quote, held=state.held_back))
            report = buy_batch(
                krea,
                batch,
                state,
                config,
                run_id=context.run.run_id,
                # Not shared with a re-execution, which is how to continue after a top-up.
                launch=context.run.tags.get(_BACKFILL_TAG) or context.run.run_id,
                wait=self.wait,
                buyer=buyer_of(context, self.names.key("images"), krea),
                on_progress=log.progress,
            )
        return report, quote.by_partition()

    @contextmanager
    def _kept_if_cancelled(
        self, context: dg.AssetExecutionContext, log: RunLog, batch: Batch, krea: Backend
    ) -> Iterator[None]:
        """If the run is cancelled in this block, say what is safe, and report what is finished.

        Dagster materializes the partitions of a step together, when it ends, so that otherwise
        none would be.
        """
        try:
            yield
        except (KeyboardInterrupt, dg.DagsterExecutionInterruptedError):
            state = batch.state(krea)
            next_run = quote_line(quote_images(krea, state), held=state.held_back)
            log.say(cancel_line(log.last, next_run))
            intact = state.by_partition(state.intact)
            if whole := [key for key in batch.plan.keys if intact[key].all()]:
                with batch.part(whole) as finished:
                    self._report_finished(context, log, finished, krea)
                log.say(
                    "Finished and reported to Dagster, with their manifests: "
                    f"{len(whole):,} of {len(batch.plan.keys):,} partitions."
                )
            raise

    def _report_finished(
        self, context: dg.AssetExecutionContext, log: RunLog, batch: Batch, krea: Backend
    ) -> None:
        log.doing("reporting the finished partitions to Dagster")
        key, storage = self.names.key("images"), krea.open_storage()
        for partition, summary in batch.summaries(krea, context.run.run_id).items():
            values = krea_metadata(images_metadata(summary, storage, seconds=0.0))
            context.log_event(dg.AssetMaterialization(key, partition=partition, metadata=values))
        rewrite_manifests(context, batch, krea, self.names.manifest_key)

    def _add_metadata(
        self,
        context: dg.AssetExecutionContext,
        krea: Backend,
        batch: Batch,
        *,
        report: RunReport,
        quota: QuotaState,
        quoted: Mapping[str, QuoteLine],
    ) -> ManifestSummary:
        """Add the metadata of each partition, and return the sum of their summaries."""
        total, journal = ManifestSummary(), journal_entry(krea, self.table, self.relative)
        for key, summary in batch.summaries(krea, context.run.run_id).items():
            total += summary
            values = krea_metadata(
                {
                    **images_metadata(summary, krea.open_storage(), seconds=report.seconds),
                    **quote_metadata(quoted.get(key)),
                    **quota_metadata(quota, key),
                    JOURNAL_ENTRY: journal,
                }
            )
            context.add_asset_metadata(values, partition_key=key)
        return total


def buyer_of(context: dg.AssetExecutionContext, key: dg.AssetKey, krea: Backend) -> Buyer:
    """Return who buys in a step, as Dagster knows the run."""
    tags = context.run.tags
    return Buyer(
        asset=key.to_user_string(),
        job=context.run.job_name,
        backfill=tags.get(_BACKFILL_TAG),
        user=tags.get(_USER_TAG) or tags.get("user") or local_user(),
        tags={name: tags[name] for name in krea.settings.spend_tags if name in tags},
    )


def _tag_run(
    context: dg.AssetExecutionContext, report: RunReport, total: ManifestSummary, held: int
) -> None:
    """Tag the run with its outcome."""
    missing = total.missing_count - (0 if report.waited else total.under_way) - held
    if tags := failure_tags(report, missing):
        context.instance.add_run_tags(context.run.run_id, tags)


def _table_specs(
    names: Names,
    table: PromptTable,
    upstream: Upstream,
    partitions_def: dg.PartitionsDefinition[str],
) -> tuple[dg.AssetSpec, dg.AssetSpec]:
    """Return the two external assets of the table: what rows request, and further columns."""
    source = table.shown
    common: dict[str, Any] = {
        "partitions_def": partitions_def,
        "deps": upstream.all_deps,
        "group_name": names.group_name,
        "kinds": {"json" if table.kind == "jsonl" else table.kind},
    }
    prompts = dg.AssetSpec(
        names.key("prompts"),
        description=f"The prompt table {source}, partitioned by {table.partition_by}.",
        metadata={
            **({"dagster/uri": source} if table.place else {}),
            "dagster/column_schema": prompts_schema(),
        },
        **common,
    )
    prompt_columns = dg.AssetSpec(
        names.key("prompt_columns"),
        description=(
            "Further columns of the prompt table, passed through to the manifest. If only they "
            "change, nothing is bought."
        ),
        **common,
    )
    return prompts, prompt_columns


def rewrite_manifests(
    context: dg.AssetExecutionContext, batch: Batch, krea: Backend, key: dg.AssetKey
) -> None:
    """Write the manifests of a batch in a step of another asset, and report them to Dagster."""
    manifests = write_manifests(krea, batch, context.run.run_id, manifest_folders(key))
    for partition, summary, path in manifests:
        values = krea_metadata(manifest_metadata(summary, path))
        context.log_event(dg.AssetMaterialization(key, partition=partition, metadata=values))


def partition_keys_of(context: dg.AssetExecutionContext) -> list[str]:
    """Return the partition keys of a step as plain strings: Dagster subclasses some."""
    return [str(key) for key in context.partition_keys]


def _log_before(
    context: dg.AssetExecutionContext, batch: Batch, krea: Backend, quota: QuotaState
) -> None:
    for note in batch.notes:
        context.log.warning("%s.", note)
    if pruned := pruned_rows(krea, batch.plan.all_digests):
        context.log.info(pruned_note(pruned))
    if quota.outcomes:
        context.log.info(quota.line())
    if krea.settings.emulator:
        context.log.warning(
            "No EvoLink key is set: the images come from an emulator. They are synthetic, and "
            "nothing is charged."
        )


def _log_after(context: dg.AssetExecutionContext, report: RunReport) -> None:
    tell_report(report)
    if report.left_for_room:
        context.log.info(
            "%d images are left to a later run: the server accepts no more for now.",
            report.left_for_room,
        )
        context.instance.add_run_tags(context.run.run_id, {GOES_ON_TAG: GOES_ON})
    for message in (*report.price_increases, *report.recovered, *report.same_files):
        context.log.warning("%s.", message)
    if report.missed_callbacks:
        context.log.warning(_MISSED, report.missed_callbacks)
    for message in report.caps_reached:
        context.log.warning("%s. The rows that did not fit are deferred.", message)

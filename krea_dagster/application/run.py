"""Runs partitions of a prompt table: regenerate, apply the quota, buy, write the manifests."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from krea_dagster.application.backend import Backend
from krea_dagster.application.batch import Batch
from krea_dagster.application.buy_options import BuyOptions, Sample
from krea_dagster.application.curation import Curation
from krea_dagster.application.manifest_summary import ManifestSummary
from krea_dagster.application.plan_state import PlanState
from krea_dagster.application.present_partitions import origin_of, retire_departed
from krea_dagster.application.pruning import pruned_rows
from krea_dagster.application.purchase import buy
from krea_dagster.application.quota import QuotaState, apply_quota
from krea_dagster.engine.journal.attribution_log import Buyer
from krea_dagster.engine.run.report import Progress, RunReport
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import write_manifest_parts
from krea_dagster.prompts import PromptTable


@dataclass(frozen=True)
class Ran:
    """The result of a run: the engine's report, a summary of the manifests, and their paths.

    ``pruned`` is the number of rows whose image was pruned, and was not bought again.
    """

    report: RunReport
    summary: ManifestSummary
    manifests: Sequence[str]
    pruned: int = 0


@contextmanager
def prepared(
    backend: Backend,
    table: PromptTable,
    keys: Sequence[str] | None,
    options: BuyOptions,
    *,
    curation: Curation | None = None,
    folders: Sequence[str] = (),
    raised_by: str,
    check: bool = False,
) -> Iterator[tuple[Batch, QuotaState]]:
    """Yield what a run works on, after raising the attempts of what is regenerated.

    Args:
        keys: The partitions; None for all.
        folders: The folders of the manifests, next to which measures are stored.
        raised_by: The root run, whose re-executions raise no attempt again.
        check: Refuse options that name nothing in these partitions. A step of a larger run leaves
            that to its launch: they may be meant for its other partitions.

    Raises:
        ConfigError, PromptTableError, JournalError: before anything is bought.
    """
    curation = curation or Curation()
    batch = Batch.read(table, keys, backend, to_buy=True, look=True, trial=options.trial())
    try:
        if check:
            check_options(backend, batch, options)
        batch = batch.regenerate(options, backend, raised_by)
        batch, quota = apply_quota(
            batch,
            options,
            backend,
            curation.wanted_images,
            curation.rules,
            folders=folders,
            raised_by=raised_by,
        )
        yield batch, quota
    finally:
        batch.close()


def buy_batch(
    backend: Backend,
    batch: Batch,
    state: PlanState,
    options: BuyOptions,
    *,
    run_id: str,
    launch: str = "",
    wait: bool = True,
    buyer: Buyer | None = None,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> RunReport:
    """Buy what a batch lacks; see ``purchase.buy`` for the arguments and errors."""
    report = buy(
        backend,
        state.wanted(),
        reused_rows=int((state.intact & state.inside).sum()),
        run_id=run_id,
        table=batch.table,
        launch=launch or run_id,
        retry_errors=options.retry_errors,
        resolutions=options.resolutions(batch.plan),
        wait=options.waits(wait),
        buyer=buyer,
        on_progress=on_progress,
    )
    batch.end_regenerations(backend)
    return report


def write_manifests(
    backend: Backend, batch: Batch, run_id: str, folders: Sequence[str] = ()
) -> Iterator[tuple[str, ManifestSummary, str]]:
    """Write the manifest of each partition; yields its key, summary, and path."""
    storage = backend.open_storage()
    schema = origin_of(backend, batch.table).noted_in(batch.manifest_schema)
    for key, summary, parts in batch.summarized_parts(backend, run_id):
        yield key, summary, write_manifest_parts(storage, key, schema, parts, folders)
    retire_departed(backend, batch.table, folders, written=batch.plan.keys)


def run(
    backend: Backend,
    table: PromptTable,
    keys: Sequence[str] | None,
    options: BuyOptions,
    *,
    curation: Curation | None = None,
    run_id: str,
    on_progress: Callable[[Progress], None] = lambda _: None,
) -> Ran:
    """Buy what some partitions lack, and write their manifests; for the errors see ``prepared``.

    The manifests are also written if the account stopped the run; ``Ran.report`` says so.
    """
    with prepared(
        backend, table, keys, options, curation=curation, raised_by=run_id, check=True
    ) as found:
        batch, _ = found
        state = batch.state(backend)
        report = buy_batch(backend, batch, state, options, run_id=run_id, on_progress=on_progress)
        total, paths = ManifestSummary(), []
        for _, summary, path in write_manifests(backend, batch, run_id):
            total += summary
            paths.append(path)
        pruned = pruned_rows(backend, batch.plan.all_digests)
    return Ran(report, total, paths, pruned)


def check_options(backend: Backend, batch: Batch, options: BuyOptions) -> list[Sample]:
    """Return the (prompt_id, sample) that the options regenerate.

    Raises ConfigError for options that name a row or purchase that does not exist.
    """
    samples = batch.selected(options, backend, all_rows=True)
    if not options.resolve:
        return samples
    resolutions = options.resolutions(batch.plan)
    images = list(batch.plan.named(options.resolve))
    unknown = {record.request_key for record in backend.unknown()}
    for name, decision in options.resolve.items():
        keys = {
            image.request.request_key
            for image in images
            if name in (image.prompt_id, image.request.request_key)
            and image.request.request_key in unknown & set(resolutions)
        }
        if not keys:
            raise ConfigError(
                f"{name!r} names no purchase with an unknown outcome; nothing was decided"
            )
        if decision.startswith("task:"):
            _check_task(backend, name, decision.removeprefix("task:"), len(keys))
    return samples


def _check_task(backend: Backend, name: str, task_id: str, purchases: int) -> None:
    if purchases > 1:
        raise ConfigError(
            f"{name!r} names {purchases} purchases, but a task belongs to one; use the request_key"
        )
    with backend.open_journal() as journal:
        if journal.known_task_ids([task_id]):
            raise ConfigError(
                f"task {task_id} belongs to another purchase in the journal, so not to {name!r}; "
                "nothing was decided"
            )

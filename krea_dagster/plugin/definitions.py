"""The factory: a prompt table, a way to partition it, and a resource make a code location."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import dagster as dg

import krea_dagster.plugin.assets.images as krea_assets
from krea_dagster.application.curation import Curation
from krea_dagster.engine.budget import CREDITS_PER_USD
from krea_dagster.plugin.assets.curation import build_curation
from krea_dagster.plugin.assets.salvage import build_salvage
from krea_dagster.plugin.assets.spend import build_spend_assets
from krea_dagster.plugin.checks import CheckFactory, default_checks
from krea_dagster.plugin.checks.spend_proof import build_spend_proof_check
from krea_dagster.plugin.checks.spend_warnings import build_spend_warnings_checks
from krea_dagster.plugin.io_manager import KreaManifestIOManager
from krea_dagster.plugin.resource import KreaResource
from krea_dagster.plugin.sensors.collect import build_collect_sensor
from krea_dagster.plugin.sensors.prompts import build_automation_sensor, build_prompts_sensor
from krea_dagster.prompts import Defaults, PromptTable, estimate_tokens, parse_partition_by


def build_krea_definitions(
    *,
    prompts: str,
    krea: KreaResource,
    partition_by: str = "hash:8",
    start: str | None = None,
    defaults: Defaults | None = None,
    count_tokens: Callable[[str], int] = estimate_tokens,
    key_prefix: str | Sequence[str] = (),
    group_name: str = "krea",
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    pool: str | None = krea_assets.POOL,
    checks: Sequence[CheckFactory] | None = None,
    credits_per_usd: float = CREDITS_PER_USD,
    spend_by: Sequence[str] = (),
    soft_budgets: Sequence[str] = (),
    collect_later: bool = False,
    curation: Curation | None = None,
    executor: dg.ExecutorDefinition | None = dg.in_process_executor,
) -> dg.Definitions:
    """Build everything that a code location needs from one prompt table.

    ``prompts`` is a Parquet file, a folder of them, or a URL. ``partition_by`` is ``hash:N``,
    ``column:NAME``, ``day:NAME``, ``week:NAME`` or ``month:NAME``, the last three also in a time
    zone (``day:NAME@Europe/Berlin``) and with a column beside it (``day:NAME,column:NAME``);
    ``start`` is the first day of those, by default the table's. ``defaults`` fill in what a row
    leaves open, and ``count_tokens`` counts the tokens of a prompt. ``key_prefix`` keeps several
    tables apart in one code location. ``automation_condition``, such as ``on_prompts_changed()``,
    has runs launched by themselves, by a sensor of its own; without it nothing is bought that
    nobody asked for. ``freshness_policy`` and ``pool`` are as for ``build_krea_assets``.
    ``checks`` are those of ``image_manifest``, each as a factory such as ``build_files_check``, or
    a ``functools.partial`` of one; None takes the cheap ones. ``credits_per_usd`` is the rate of
    the dollars in the spend tables, and ``spend_by`` names further columns of the prompt table
    that the daily sums are kept apart by. ``soft_budgets``, in the words of
    ``KreaResource.budgets``, stop nothing: the checks of ``spend_daily`` warn before and when they
    are passed. With ``collect_later`` runs submit and end, and the sensor ``krea_collect`` launches
    those that collect, when callbacks or the clock say so: no worker waits. ``curation`` says which
    images are accepted, how many are wanted, and what is measured of them.

    ``executor`` is the code location's: in-process by default, because the steps wait for the
    network and a second process would cost seconds to start; give None where your own definitions
    bring one.

    The result holds

    - the assets ``prompts``, ``prompt_columns``, ``images``, ``image_manifest``, ``spend_ledger``,
      ``spend_daily``, ``salvaged_images``, ``image_measures``, ``near_duplicates``, ``verdicts``
      and ``accepted_images``;
    - the jobs ``krea_images``, ``krea_spend``, ``krea_salvage``, ``krea_proof``, ``krea_dataset``
      and ``krea_accepted``;
    - the sensors ``krea_prompts``, which watches the table, ``krea_verdicts``, which reports what
      people have judged, ``krea_salvage``, which starts its job,
      with an ``automation_condition`` ``krea_automation``, which launches runs, and with
      ``collect_later`` ``krea_collect``;
    - the checks ``all_rows_delivered``, ``spend_proof``, those of ``checks``,
      ``no_near_duplicates``, and of ``spend_daily`` one for each kind of warning;
    - the resources ``krea`` and ``krea_manifest``.

    All these names begin with the prefix where there is one. Merge it with your own by
    ``dagster.Definitions.merge``. Raises ConfigError for a setting that cannot be used.
    """
    key_prefix = [key_prefix] if isinstance(key_prefix, str) else key_prefix
    curation = curation or Curation()
    before = "".join(f"{part}_" for part in key_prefix)
    table = PromptTable(
        _absolute(prompts),
        parse_partition_by(partition_by),
        defaults=defaults or Defaults(),
        count_tokens=count_tokens,
        name="/".join(key_prefix),
    )
    krea, relative_storage = with_absolute_storage(krea)
    assets = krea_assets.build_krea_assets(
        table,
        start=start,
        key_prefix=key_prefix,
        group_name=group_name,
        backfill_policy=backfill_policy,
        automation_condition=automation_condition,
        freshness_policy=freshness_policy,
        pool=pool,
        collect_later=collect_later,
        curation=curation,
        resource_key=f"{before}krea",
        io_manager_key=f"{before}krea_manifest",
        relative_storage=relative_storage,
    )
    proof = build_spend_proof_check(assets.image_manifest.key, resource_key=f"{before}krea")
    chosen = default_checks() if checks is None else checks
    made = [factory(assets.image_manifest.key, resource_key=f"{before}krea") for factory in chosen]
    job = dg.define_asset_job(
        f"{before}{JOB_NAME}",
        # Without the proof: it reads every file again, which is not each run's to do.
        selection=dg.AssetSelection.assets(assets.images, assets.image_manifest)
        - dg.AssetSelection.checks(proof),
        description="Buys what is missing, and writes the manifest.",
    )
    proof_job = dg.define_asset_job(
        f"{before}{PROOF_JOB_NAME}",
        selection=dg.AssetSelection.checks(proof),
        description="Holds every charge against its task, file, manifest row and the account.",
    )
    spend = build_spend_assets(
        assets.image_manifest.key,
        prefix=key_prefix,
        group_name=group_name,
        resource_key=f"{before}krea",
        credits_per_usd=credits_per_usd,
        by=spend_by,
    )
    warnings = build_spend_warnings_checks(
        dg.AssetKey([*key_prefix, "spend_daily"]),
        resource_key=f"{before}krea",
        budgets=soft_budgets,
    )
    sensor = build_prompts_sensor(
        table,
        assets.partitions_def,
        assets.prompts.key,
        name=f"{before}krea_prompts",
        resource_key=f"{before}krea",
        columns_key=assets.prompt_columns.key,
    )
    launching: list[dg.SensorDefinition] = (
        []
        if automation_condition is None
        else [
            build_automation_sensor(
                [assets.images, assets.image_manifest], name=f"{before}krea_automation"
            )
        ]
    )
    if collect_later:
        collecting = build_collect_sensor(
            name=f"{before}krea_collect",
            job_name=job.name,
            images_key=assets.images.key,
            resource_key=f"{before}krea",
        )
        launching.append(collecting)
    salvage = build_salvage(
        assets,
        resource_key=f"{before}krea",
        prefix=before,
        group_name=group_name,
        collect_later=collect_later,
    )
    images = dg.Definitions(
        assets=[*assets.all, spend.tables],
        asset_checks=[proof, *made, warnings],
        jobs=[job, proof_job, spend.job],
        sensors=[sensor, *launching],
        resources={
            f"{before}krea": krea,
            f"{before}krea_manifest": KreaManifestIOManager(storage=krea.storage),
        },
        executor=executor,
    )
    dataset = build_curation(
        curation,
        assets,
        prefix=key_prefix,
        group_name=group_name,
        resource_key=f"{before}krea",
    )
    return dg.Definitions.merge(images, salvage, dataset)


#: The jobs' names where there is no key prefix.
JOB_NAME = "krea_images"
SALVAGE_JOB_NAME = "krea_salvage"
PROOF_JOB_NAME = "krea_proof"


def with_absolute_storage(krea: KreaResource) -> tuple[KreaResource, str]:
    """Make a relative storage folder absolute, and return it as it was named too; "" if it is not.

    Done where definitions are loaded: in another working folder a run would begin another journal,
    which knows of no purchase.
    """
    named = krea.storage
    if isinstance(named, dg.EnvVar) or not named or "://" in named or Path(named).is_absolute():
        return krea, ""
    return krea.model_copy(update={"storage": str(Path(named).absolute())}), named


def _absolute(source: str) -> str:
    """A local path made absolute: Dagster's processes need not share a working folder."""
    return source if "://" in source else str(Path(source).absolute())

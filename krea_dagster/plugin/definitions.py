"""Builds a code location from a prompt table, a way to partition it, and a resource."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg

from krea_dagster.application.curation import Curation
from krea_dagster.application.kept_table import FOLDER
from krea_dagster.engine.budget import Budget
from krea_dagster.errors import ConfigError
from krea_dagster.file_systems import same_kind
from krea_dagster.plugin.assets.curation import build_curation
from krea_dagster.plugin.assets.images import POOL, KreaAssets, build_krea_assets
from krea_dagster.plugin.assets.salvage import SalvagedTable, build_salvage
from krea_dagster.plugin.assets.spend import build_spend
from krea_dagster.plugin.checks import CheckFactory, default_checks
from krea_dagster.plugin.code_references import caller_reference
from krea_dagster.plugin.io_manager import manifest_io_manager
from krea_dagster.plugin.names import JOB_NAME, TAG, Names
from krea_dagster.plugin.resource import KreaResource, named_options
from krea_dagster.plugin.sensors.collect import build_collect_sensor
from krea_dagster.plugin.sensors.prompts import build_automation_sensor, build_prompts_sensor
from krea_dagster.plugin.sensors.retries import build_retries_sensor
from krea_dagster.plugin.upstream import CoercibleToAssetDep, is_asset
from krea_dagster.prompts import (
    Defaults,
    PromptTable,
    estimate_tokens,
    parse_partition_by,
    safe_name,
)


def build_krea_definitions(
    *,
    prompts: Any,
    prompts_options: Mapping[str, Any] | None = None,
    prompt_columns: Sequence[str] = (),
    krea: KreaResource,
    partition_by: str = "hash:8",
    start: str | None = None,
    defaults: Defaults | None = None,
    count_tokens: Callable[[str], int] = estimate_tokens,
    key_prefix: str | Sequence[str] = (),
    group_name: str | None = None,
    owners: Sequence[str] = (),
    tags: Mapping[str, str] | None = None,
    resource_key: str | None = None,
    io_manager_key: str | None = None,
    backfill_policy: dg.BackfillPolicy | None = None,
    automation_condition: dg.AutomationCondition[Any] | None = None,
    freshness_policy: dg.FreshnessPolicy | None = None,
    deps: Sequence[CoercibleToAssetDep] = (),
    pool: str | None = POOL,
    checks: Sequence[CheckFactory] | None = None,
    spend_by: Sequence[str] = (),
    soft_budgets: Sequence[str] = (),
    spend_schedule: str | None = None,
    collect_later: bool = False,
    prune_partitions: bool = False,
    curation: Curation | bool = True,
    spend: bool = True,
    salvage: bool = True,
    executor: dg.ExecutorDefinition | None = dg.in_process_executor,
) -> dg.Definitions:
    """Build the code location of one prompt table.

    All names begin with the prefix, if there is one. Merge the result with other definitions by
    ``dagster.Definitions.merge``.

    Args:
        prompts: The prompt table: a Parquet file, a folder of them, or a URL; a table of pandas,
            Polars, Arrow or DuckDB; a function without arguments that returns one of these; or an
            asset of the same code location whose value is one (``AssetKey``, ``AssetsDefinition``,
            ``AssetSpec`` or ``AssetIn``). A run loads this value through the asset's IO manager
            before it buys, and keeps it in ``prompt_tables`` of the storage root.
        prompts_options: How fsspec opens the table's URL; by default as the storage root, if that
            is of the same kind. Name secrets as ``dagster.EnvVar``.
        prompt_columns: Columns that are read under another name (``text=prompt``), and columns that
            are only copied to the manifest although their names suggest more (``n``).
        krea: The resource that buys the images.
        partition_by: ``hash:N``, ``column:NAME``, ``day:NAME``, ``week:NAME`` or ``month:NAME``.
            The last three may have a time zone (``day:NAME@Europe/Berlin``) and a column
            (``day:NAME,column:NAME``).
        start: First day of partitions by time, as ``YYYY-MM-DD``. By default the table's first, or
            all as an upstream asset of the same windows has them.
        defaults: Values for what a row leaves open.
        count_tokens: Returns the number of tokens of a prompt.
        key_prefix: Prefix of the asset keys and of all other names. It separates several tables
            in one code location; see also ``build_krea_tables``.
        group_name: Group of the assets; the prefix by default, ``krea`` without one.
        owners: Owners of the assets, such as ``team:art``.
        tags: Tags of the assets.
        resource_key: Key of the resource; ``krea`` with the prefix by default. Choose another if
            your project has its own resource of that name.
        io_manager_key: Key of the manifest's IO manager; ``krea_manifest`` with the prefix by
            default.
        backfill_policy: Of ``images`` and ``image_manifest``; single_run by default.
        automation_condition: Of both, such as ``on_prompts_changed()``: a sensor then launches
            runs, which spend credits. Without it, every purchase is launched by a person.
        freshness_policy: Of both.
        deps: The assets that write the table. In a job with them ``images`` runs after them; the
            sensor reports what they have changed, and nothing is reported on them.
        pool: Limits how many steps of ``images`` run at the same time, across runs.
        checks: Factories of the checks of ``image_manifest``, such as ``build_files_check`` or a
            ``functools.partial`` of it; by default those that cost little.
        spend_by: Further columns of the prompt table that the daily sums are grouped by.
        soft_budgets: Budgets, written as in ``KreaResource.budgets``, that stop nothing: the
            checks of ``spend_daily`` warn before they are used up and afterwards.
        spend_schedule: When the job ``krea_spend`` updates the spend tables and looks for warnings,
            as a cron expression such as ``0 7 * * *``, in the resource's ``timezone``. It buys
            nothing, so it is on once it is given.
        collect_later: Runs submit and end. The sensor ``krea_collect`` launches the runs that
            collect, when callbacks arrive or images should be finished.
        prune_partitions: Remove partitions by a column whose value has left the table, once no run
            of them is under way. Their events, manifests, images and purchases stay.
        curation: Which images are accepted, how many are wanted, and what is measured of them.
            False leaves out its assets.
        spend: Build the spend tables, with their checks and the proof. They contain all purchases
            of the journal: of several tables that share one, only one should have them.
        salvage: Build the salvage. Without it, paid images that a killed run left behind are
            collected by the next run of their partitions.
        executor: The code location's executor. In-process by default: the steps wait for the
            network, and another process would take seconds to start. None if other definitions
            bring one.

    Returns:
        Definitions with

        - the assets ``prompts``, ``prompt_columns``, ``images``, ``image_manifest``; with ``spend``
          ``spend_ledger`` and ``spend_daily``; with ``salvage`` ``salvaged_images``; with
          ``curation`` ``image_measures``, ``near_duplicates``, ``verdicts``, ``accepted_images``;
        - the jobs ``krea_images``, ``krea_spend``, ``krea_salvage``, ``krea_proof``,
          ``krea_dataset`` and ``krea_accepted``;
        - the sensors ``krea_prompts`` (reports changed prompts), ``krea_verdicts`` (reports new
          verdicts), ``krea_salvage`` (starts its job), ``krea_retries`` (reports failures again
          whose retry Dagster has missed, and makes lost launches of the automation again), with an
          ``automation_condition`` ``krea_automation`` (launches runs), and with ``collect_later``
          ``krea_collect``;
        - the checks ``all_rows_delivered``, ``spend_proof``, those of ``checks``,
          ``no_near_duplicates``, and for ``spend_daily`` one for each kind of warning;
        - with ``spend_schedule`` the schedule ``krea_spend_schedule``;
        - the resources ``krea`` and ``krea_manifest``.

    Raises:
        ConfigError: for a setting that cannot be used.

    Example::

        defs = build_krea_definitions(
            prompts="data/prompts.parquet",
            partition_by="column:campaign",
            krea=KreaResource(api_key=dg.EnvVar("EVOLINK_API_KEY"), storage="data/krea"),
        )
    """
    for text in krea.budgets:
        Budget.parse(text)
    code_reference = caller_reference()
    names = Names.of(key_prefix, group_name, resource_key)
    io_manager_key = io_manager_key or names.prefixed("krea_manifest")
    if io_manager_key == names.resource_key:
        raise ConfigError(f"resource_key and io_manager_key are both {io_manager_key!r}")
    table = prompt_table(
        names,
        krea,
        prompts=prompts,
        prompts_options=prompts_options,
        prompt_columns=prompt_columns,
        partition_by=partition_by,
        defaults=defaults,
        count_tokens=count_tokens,
    )
    krea, relative_storage = _with_absolute_storage(krea)
    rules = (Curation() if curation else None) if isinstance(curation, bool) else curation
    assets = build_krea_assets(
        table,
        start=start,
        key_prefix=names.prefix,
        group_name=names.group_name,
        backfill_policy=backfill_policy,
        automation_condition=automation_condition,
        freshness_policy=freshness_policy,
        pool=pool,
        deps=deps,
        prompts=prompts if is_asset(prompts) else None,
        collect_later=collect_later,
        curation=rules,
        resource_key=names.resource_key,
        io_manager_key=io_manager_key,
        relative_storage=relative_storage,
        spend_by=spend_by,
    )
    resources = {
        names.resource_key: krea,
        io_manager_key: manifest_io_manager(names.resource_key),
    }
    parts = [
        dg.Definitions(assets=assets.all, resources=resources, executor=executor),
        _job_and_checks(names, assets, default_checks() if checks is None else checks),
        dg.Definitions(
            sensors=_sensors(
                names,
                assets,
                launch=automation_condition is not None,
                collect=collect_later,
                prune=prune_partitions,
            )
        ),
    ]
    if spend:
        parts.append(
            build_spend(
                names,
                [names.manifest_key],
                by=spend_by,
                budgets=soft_budgets,
                schedule=spend_schedule,
                zone=text_of(krea.timezone),
            )
        )
    if salvage:
        salvaged = SalvagedTable(table, names.manifest_key)
        parts.append(build_salvage(names, [salvaged], collect_later=collect_later))
    if rules is not None:
        parts.append(build_curation(names, rules, assets.partitions_def))
    return with_changed_specs(
        dg.Definitions.merge(*parts),
        lambda spec: spec.replace_attributes(
            owners=[*spec.owners, *owners],
            tags={TAG: "", **spec.tags, **(tags or {})},
            metadata={**code_reference, **spec.metadata},
        ),
    )


def with_changed_specs(
    defs: dg.Definitions, change: Callable[[dg.AssetSpec], dg.AssetSpec]
) -> dg.Definitions:
    """Return definitions with another spec of each asset.

    ``Definitions.map_asset_specs`` does the same, but warns that it is a preview.
    """
    own = [one for one in defs.assets or () if isinstance(one, dg.AssetSpec | dg.AssetsDefinition)]
    return dg.Definitions(
        assets=dg.map_asset_specs(change, own),
        asset_checks=defs.asset_checks,
        jobs=defs.jobs,
        schedules=defs.schedules,
        sensors=defs.sensors,
        resources=defs.resources,
        executor=defs.executor,
    )


def prompt_table(
    names: Names,
    krea: KreaResource,
    *,
    prompts: Any,
    prompts_options: Mapping[str, Any] | None = None,
    prompt_columns: Sequence[str] = (),
    partition_by: str = "hash:8",
    defaults: Defaults | None = None,
    count_tokens: Callable[[str], int] = estimate_tokens,
) -> PromptTable:
    """Return the prompt table of these arguments of ``build_krea_definitions``."""
    source: Any = prompts
    if is_asset(prompts):
        if prompts_options:
            raise ConfigError("prompts_options open a path or URL, and prompts is an asset")
        source = _kept_source(names, krea)
    if isinstance(source, str | Path):
        source = _absolute(str(source))
    table = PromptTable(
        source,
        parse_partition_by(partition_by),
        defaults=defaults or Defaults(),
        count_tokens=count_tokens,
        name="/".join(names.prefix),
        prompt_columns=prompt_columns,
    )
    options = _prompts_options(table.place, prompts_options, krea)
    # What has neither a prefix nor a path needs a name, by which the journal knows its rows.
    name = table.name or ("" if table.place else "prompts")
    return replace(table, storage_options=options, name=name)


def _kept_source(names: Names, krea: KreaResource) -> str:
    """Return the folder in which the value of an asset is kept. Raises ConfigError."""
    storage = text_of(krea.storage)
    if not storage:
        raise ConfigError(
            "the storage root is not known (is its variable set?); the prompts that an asset makes "
            "are kept in it"
        )
    folder = safe_name(names.key("prompts").to_user_string())
    return f"{storage.rstrip('/')}/{FOLDER}/{folder}"


def _job_and_checks(
    names: Names, assets: KreaAssets, checks: Sequence[CheckFactory]
) -> dg.Definitions:
    """Build the checks of ``image_manifest``, and the job of the images."""
    job = dg.define_asset_job(
        names.prefixed(JOB_NAME),
        selection=dg.AssetSelection.assets(assets.images, assets.image_manifest),
        description="Buys the missing images, and writes the manifest.",
    )
    built = [check(names.manifest_key, resource_key=names.resource_key) for check in checks]
    return dg.Definitions(asset_checks=built, jobs=[job])


def _sensors(
    names: Names, assets: KreaAssets, *, launch: bool, collect: bool, prune: bool
) -> list[dg.SensorDefinition]:
    sensors: list[dg.SensorDefinition] = [
        build_prompts_sensor(
            names, assets.table, assets.partitions_def, upstream=assets.upstream, prune=prune
        ),
        build_retries_sensor(names, assets.images),
    ]
    if launch:
        name = names.prefixed("krea_automation")
        sensors.append(build_automation_sensor([assets.images, assets.image_manifest], name=name))
    if collect:
        sensors.append(build_collect_sensor(names))
    return sensors


def _prompts_options(
    prompts: str, options: Mapping[str, Any] | None, krea: KreaResource
) -> Mapping[str, Any]:
    """Return how the table is opened: as given, else as a storage root of the same kind."""
    if options:
        return named_options(options)
    is_alike = same_kind(prompts, text_of(krea.storage))
    return named_options(krea.storage_options) if is_alike else {}


def text_of(setting: str) -> str:
    """Return a setting of the resource outside a run, where Dagster leaves an EnvVar as it is."""
    return setting.get_value() or "" if isinstance(setting, dg.EnvVar) else setting


def _with_absolute_storage(krea: KreaResource) -> tuple[KreaResource, str]:
    """Make a relative storage folder absolute, and return it as it was written; "" if absolute.

    Done when definitions are loaded: in another working folder a run would create another journal,
    which knows no purchase.
    """
    written = krea.storage
    if isinstance(written, dg.EnvVar) or not written or "://" in written:
        return krea, ""
    if Path(written).is_absolute():
        return krea, ""
    return krea.model_copy(update={"storage": _absolute(written)}), written


def _absolute(source: str) -> str:
    """Make a local path absolute: Dagster's processes may have other working folders."""
    return source if "://" in source else str(Path(source).absolute())

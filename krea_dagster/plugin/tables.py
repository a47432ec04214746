"""Builds one code location for several prompt tables that share a storage root and a journal."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

import dagster as dg

from krea_dagster.errors import ConfigError
from krea_dagster.plugin.assets.salvage import SalvagedTable, build_salvage
from krea_dagster.plugin.assets.spend import build_spend
from krea_dagster.plugin.definitions import build_krea_definitions, prompt_table, text_of
from krea_dagster.plugin.names import Names
from krea_dagster.plugin.resource import KreaResource

#: The arguments of ``build_krea_definitions`` that make its prompt table.
_OF_THE_TABLE: Final = (
    "prompts", "prompts_options", "prompt_columns", "partition_by", "defaults", "count_tokens"
)  # fmt: skip

#: Its arguments that all tables have in common.
_SHARED: Final = frozenset(
    [
        "krea",
        "resource_key",
        "io_manager_key",
        "key_prefix",
        "spend",
        "salvage",
        "executor",
        "spend_by",
        "soft_budgets",
        "spend_schedule",
    ]
)


def build_krea_tables(
    tables: Mapping[str, Mapping[str, Any]],
    *,
    krea: KreaResource,
    resource_key: str = "krea",
    io_manager_key: str = "krea_manifest",
    spend: bool = True,
    salvage: bool = True,
    spend_by: Sequence[str] = (),
    soft_budgets: Sequence[str] = (),
    spend_schedule: str | None = None,
    executor: dg.ExecutorDefinition | None = dg.in_process_executor,
) -> dg.Definitions:
    """Build the code location of several prompt tables that share a resource and its journal.

    Each table has its own assets, jobs and sensors, with its prefix. What belongs to the journal is
    built once, without a prefix: the spend tables, the proof, and a salvage that collects the
    images of all these tables and rewrites the manifests of each.

    Args:
        tables: The arguments of ``build_krea_definitions`` for each table, by its key prefix. A
            slash separates the parts of a prefix.
        krea: The resource that buys the images.
        resource_key: Key of the resource.
        io_manager_key: Key of the manifests' IO manager.
        spend: Build the spend tables, with their checks and the proof.
        salvage: Build the salvage.
        spend_by: Further columns of the prompt tables that the daily sums are grouped by.
        soft_budgets: Budgets that warn and stop nothing.
        spend_schedule: When the job ``krea_spend`` runs, as a cron expression.
        executor: The code location's executor; None if other definitions bring one.

    Returns:
        The definitions of all tables, and of their journal.

    Raises:
        ConfigError: for a setting that cannot be used, or that tables cannot have of their own.

    Example::

        defs = build_krea_tables(
            {
                "posters": {"prompts": "data/posters.parquet", "partition_by": "column:campaign"},
                "banners": {"prompts": "data/banners.parquet", "curation": False},
            },
            krea=KreaResource(api_key=dg.EnvVar("EVOLINK_API_KEY"), storage="data/krea"),
        )
    """
    names = Names(resource_key=resource_key)
    built: list[dg.Definitions] = []
    salvaged: list[SalvagedTable] = []
    for prefix, options in tables.items():
        own = Names.of(prefix, resource_key=resource_key)
        _refuse_shared(prefix, own, options)
        built.append(
            build_krea_definitions(
                **options,
                krea=krea,
                key_prefix=own.prefix,
                resource_key=resource_key,
                io_manager_key=io_manager_key,
                spend=False,
                spend_by=spend_by,
                salvage=False,
                executor=None,
            )
        )
        of_table = {name: options[name] for name in _OF_THE_TABLE if name in options}
        salvaged.append(SalvagedTable(prompt_table(own, krea, **of_table), own.manifest_key))
    if not built:
        raise ConfigError("there is no prompt table; give at least one by its key prefix")
    parts = [dg.Definitions(resources=built[0].resources, executor=executor)]
    if spend:
        keys = [one.manifest_key for one in salvaged]
        parts.append(
            build_spend(
                names,
                keys,
                by=spend_by,
                budgets=soft_budgets,
                schedule=spend_schedule,
                zone=text_of(krea.timezone),
            )
        )
    if salvage:
        later = any(options.get("collect_later", False) for options in tables.values())
        parts.append(build_salvage(names, salvaged, collect_later=later))
    return dg.Definitions.merge(*parts, *map(_without_resources, built))


def _refuse_shared(prefix: str, names: Names, options: Mapping[str, Any]) -> None:
    if not names.prefix:
        raise ConfigError(f"the table {prefix!r} needs a key prefix, such as 'posters'")
    if wrong := sorted(_SHARED & options.keys()):
        raise ConfigError(
            f"the table {prefix!r} has {wrong[0]!r}, which all tables have in common: give it to "
            "build_krea_tables"
        )


def _without_resources(defs: dg.Definitions) -> dg.Definitions:
    return dg.Definitions(
        assets=defs.assets, asset_checks=defs.asset_checks, jobs=defs.jobs, sensors=defs.sensors
    )

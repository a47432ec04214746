"""The assets of the same project that make a prompt table: they write it, or their value is it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias

import dagster as dg

from krea_dagster.application.kept_table import KeptTable
from krea_dagster.errors import ConfigError
from krea_dagster.plugin.metadata import column_lineage
from krea_dagster.prompts import PromptTable

#: What Dagster takes as a dependency.
CoercibleToAssetDep: TypeAlias = (
    dg.AssetKey | str | Sequence[str] | dg.AssetsDefinition | dg.AssetSpec | dg.AssetDep
)

#: An asset whose value is the prompt table, or the path of one.
PromptsAsset: TypeAlias = dg.AssetKey | dg.AssetsDefinition | dg.AssetSpec | dg.AssetIn

#: The name of the input of ``images``.
INPUT: Final = "prompt_table"


@dataclass(frozen=True)
class Upstream:
    """The assets that make a prompt table. They are foreign: nothing is reported on them.

    Those in ``deps`` write it. The value of ``made`` is the table: each run that buys, and the
    sensor, keep it in the table's own folder, from which everything reads it. ``known`` are the
    partitions of those that were not given by their key alone.
    """

    deps: Sequence[dg.AssetDep] = ()
    made: dg.AssetIn | None = None
    known: Mapping[dg.AssetKey, dg.PartitionsDefinition[str]] = field(default_factory=dict)

    @classmethod
    def of(
        cls, deps: Sequence[CoercibleToAssetDep], prompts: PromptsAsset | None = None
    ) -> "Upstream":
        """Return the upstream of a table. Raises ConfigError for what is not one asset."""
        made = None if prompts is None else _asset_in(prompts)
        # A spec reads them as Dagster does, also an asset definition with several keys.
        written = dg.AssetSpec("of", deps=deps).deps
        others = tuple(dep for dep in written if made is None or dep.asset_key != made.key)
        known = {
            key: one.partitions_def
            for one in (*deps, prompts)
            if isinstance(one, dg.AssetsDefinition | dg.AssetSpec)
            and one.partitions_def is not None
            for key in (one.keys if isinstance(one, dg.AssetsDefinition) else [one.key])
        }
        return cls(others, made, known)

    @property
    def all_deps(self) -> list[dg.AssetDep]:
        """All assets, as dependencies without their values."""
        if self.made is None:
            return list(self.deps)
        made = dg.AssetDep(key_of(self.made), partition_mapping=self.made.partition_mapping)
        return [made, *self.deps]

    @property
    def ins(self) -> Mapping[str, dg.AssetIn]:
        """The inputs of ``images``."""
        return {} if self.made is None else {INPUT: self.made}

    def partitions_like(self, own: dg.PartitionsDefinition[str]) -> dg.PartitionsDefinition[str]:
        """Return the upstream's partitions if they are the same windows, else the table's own.

        Dagster runs two assets in one job only if their partitions also begin and end together.
        """
        for one in self.known.values():
            if _form(own) is not None and _form(own) == _form(one):
                return one
        return own

    def mapped(self, own: dg.PartitionsDefinition[str]) -> "Upstream":
        """Return it with the partitions that each partition of the table depends on.

        For partitions that have nothing to do with each other Dagster would look for equal keys.
        """
        # Compared with None: a mapping without settings is an empty tuple.
        mappings = {key: _mapping(one, own) for key, one in self.known.items()}
        deps = tuple(
            dg.AssetDep(one.asset_key, partition_mapping=mappings.get(one.asset_key))
            if one.partition_mapping is None
            else one
            for one in self.deps
        )
        made = self.made
        if made is not None and made.partition_mapping is None:
            made = made._replace(partition_mapping=mappings.get(key_of(made)))
        return replace(self, deps=deps, made=made)

    @property
    def keys(self) -> list[dg.AssetKey]:
        """The keys of the assets."""
        return [dep.asset_key for dep in self.all_deps]

    @property
    def resource_keys(self) -> set[str]:
        """The resources that the sensor needs to load the value."""
        manager = None if self.made is None else self.made.input_manager_key
        return set() if manager is None else {manager}

    def lineage(self, table: PromptTable) -> dg.TableColumnLineage | None:
        """Return the upstream's columns that the table's come from; None if that is not known.

        It is for one asset that makes the table as it is. What a function reads, or several assets
        write, may have other names there. Raises ConfigError for a table that cannot be read.
        """
        makes_all = self.made is not None or (len(self.deps) == 1 and table.place)
        if not makes_all:
            return None
        names = table.column_names()
        return column_lineage(dict(zip(names, names, strict=True)), self.keys[0])

    def keep_input(self, context: dg.AssetExecutionContext, table: PromptTable, value: Any) -> None:
        """Keep the value that a step was given. Raises ConfigError, StorageError."""
        if self.made is None:
            return
        key, kept = key_of(self.made), KeptTable(table)
        for partition, part in _parts(context, key, value).items():
            mark = _mark_of_run(context, key, partition)
            kept.keep(part, value_of(key), partition=partition, mark=mark)


#: The upstream of a table that no asset makes.
NO_UPSTREAM: Final = Upstream()


def is_asset(prompts: object) -> bool:
    """Return whether prompts are given as an asset."""
    return isinstance(prompts, PromptsAsset)


def _form(partitions_def: dg.PartitionsDefinition[str]) -> tuple[str, str, str] | None:
    if not isinstance(partitions_def, dg.TimeWindowPartitionsDefinition):
        return None
    return partitions_def.cron_schedule, partitions_def.timezone, partitions_def.fmt


def _mapping(
    upstream: dg.PartitionsDefinition[str], own: dg.PartitionsDefinition[str]
) -> dg.PartitionMapping | None:
    """Return how partitions of the table depend on the upstream's; None as Dagster finds it."""
    dimensions = own.partitions_defs if isinstance(own, dg.MultiPartitionsDefinition) else ()
    if own == upstream or upstream in [one.partitions_def for one in dimensions]:
        return None
    if _form(own) is not None and _form(upstream) is not None:
        # The present window is the table's before it is the upstream's.
        return dg.TimeWindowPartitionMapping(allow_nonexistent_upstream_partitions=True)
    return dg.AllPartitionMapping()


def _asset_in(asset: PromptsAsset) -> dg.AssetIn:
    if isinstance(asset, dg.AssetIn):
        if asset.key is None:
            raise ConfigError("the AssetIn of prompts has no key; give it the asset's")
        return asset
    if isinstance(asset, dg.AssetsDefinition) and len(asset.keys) != 1:
        keys = ", ".join(sorted(key.to_user_string() for key in asset.keys))
        raise ConfigError(f"prompts is a definition of several assets: {keys}; give one by its key")
    return dg.AssetIn(asset if isinstance(asset, dg.AssetKey) else asset.key)


def key_of(made: dg.AssetIn) -> dg.AssetKey:
    """Return the key of the asset whose value is the table."""
    key: dg.AssetKey = made.resolve_key(INPUT)
    return key


def value_of(key: dg.AssetKey) -> str:
    """Return what a value is called in messages."""
    return f"the value of {key.to_user_string()}"


def _parts(
    context: dg.AssetExecutionContext, key: dg.AssetKey, value: Any
) -> Mapping[str | None, Any]:
    """Return the value by the upstream's partitions; None is the key of the whole."""
    if not context.get_step_execution_context().has_asset_partitions_for_input(INPUT):
        return {None: value}
    keys = [str(one) for one in context.asset_partition_keys_for_input(INPUT)]
    if len(keys) == 1:
        return {keys[0]: value}
    if isinstance(value, Mapping) and set(value) <= set(keys):
        return {str(partition): part for partition, part in value.items()}
    raise ConfigError(
        f"the IO manager of {key.to_user_string()} gives one table for {len(keys)} partitions, "
        "which does not say whose its rows are. Nothing was bought. Run one partition at a time "
        "(backfill_policy=BackfillPolicy.multi_run(1)), or give prompts as a function that reads "
        "the whole table, with the asset in deps"
    )


def _mark_of_run(context: dg.AssetExecutionContext, key: dg.AssetKey, partition: str | None) -> str:
    """Return the mark of what this run has materialized; empty if another run has.

    It may have done so after the step's input was loaded, which nothing tells.
    """
    wanted = dg.AssetRecordsFilter(key, asset_partitions=None if partition is None else [partition])
    found = context.instance.fetch_materializations(wanted, limit=1).records
    is_own = bool(found) and found[0].run_id == context.run.run_id
    return str(found[0].storage_id) if is_own else ""

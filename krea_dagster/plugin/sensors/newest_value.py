"""The newest value of an asset that makes the prompt table: the sensor loads and keeps it."""

import hashlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Final

import dagster as dg

from krea_dagster import redact
from krea_dagster.application.kept_table import KeptTable
from krea_dagster.errors import ConfigError, KreaError
from krea_dagster.plugin.upstream import key_of, value_of
from krea_dagster.prompts import PromptTable
from krea_dagster.prompts.files import first_line

#: Maximum number of partitions that a tick loads.
_MOST_LOADS: Final = 100


@dataclass(frozen=True)
class NewestValue:
    """The newest materializations of an asset whose value is the table, by partition."""

    made: dg.AssetIn
    marks: Mapping[str | None, str]
    instance: dg.DagsterInstance
    repository: Any

    @classmethod
    def at(cls, instance: dg.DagsterInstance, repository: Any, made: dg.AssetIn) -> "NewestValue":
        """Return the newest materializations."""
        key = key_of(made)
        partitions_def = repository.asset_graph.get(key).partitions_def
        if partitions_def is None:
            (record,) = instance.get_asset_records([key]) or (None,)
            last = record.asset_entry.last_materialization_record if record else None
            return cls(
                made, {} if last is None else {None: str(last.storage_id)}, instance, repository
            )
        known = set(partitions_def.get_partition_keys(dynamic_partitions_store=instance))
        found = instance.event_log_storage.get_latest_storage_id_by_partition(
            key, dg.DagsterEventType.ASSET_MATERIALIZATION
        )
        marks = {partition: str(found[partition]) for partition in sorted(known & found.keys())}
        return cls(made, marks, instance, repository)

    def mark(self) -> str:
        """Return one hash over all, which is cheap to compare."""
        lines = "\n".join(f"{partition}\t{mark}" for partition, mark in self.marks.items())
        return hashlib.sha256(lines.encode()).hexdigest()[:32]

    def keep_newer(self, table: PromptTable, resources: Any, most: int = _MOST_LOADS) -> None:
        """Load and keep the values that are newer than the kept ones.

        Raises ConfigError if there is no value yet, if one cannot be loaded, or if there are more
        than a tick can load: the table is not complete before the next ticks have loaded the rest.
        """
        key, kept = key_of(self.made), KeptTable(table)
        newer = [(part, mark) for part, mark in self.marks.items() if kept.mark(part) != mark]
        with self._loader(resources) as load:
            for partition, mark in newer[:most]:
                kept.keep(load(partition), value_of(key), partition=partition, mark=mark)
        if len(newer) > most:
            raise ConfigError(
                f"{most} of {len(newer)} new partitions of {key.to_user_string()} are loaded; the "
                "next ticks load the others"
            )
        if not kept.exists():
            raise ConfigError(f"{key.to_user_string()} has not been materialized yet")

    @contextmanager
    def _loader(self, resources: Any) -> Iterator[Callable[[str | None], Any]]:
        made, key = self.made, key_of(self.made)
        kind = None if isinstance(made.dagster_type, type) else made.dagster_type.typing_type

        def load(partition: str | None) -> Any:
            try:
                if made.input_manager_key is None:
                    return loader.load_asset_value(
                        key,
                        python_type=kind,
                        partition_key=partition,
                        input_definition_metadata=dict(made.metadata or {}),
                    )
                manager = getattr(resources, made.input_manager_key)
                return manager.load_input(self._input_context(partition))
            except KreaError:
                raise
            except Exception as error:  # noqa: BLE001 - each IO manager raises errors of its own
                raise ConfigError(
                    f"{value_of(key)} cannot be loaded: {type(error).__name__}: {first_line(error)}"
                ) from redact.safe_cause(error)

        with self.repository.get_asset_value_loader(self.instance) as loader:
            yield load

    def _input_context(self, partition: str | None) -> dg.InputContext:
        made, key = self.made, key_of(self.made)
        partitions_def = self.repository.asset_graph.get(key).partitions_def
        return dg.build_input_context(
            asset_key=key,
            upstream_output=dg.build_output_context(asset_key=key),
            dagster_type=None if isinstance(made.dagster_type, type) else made.dagster_type,
            definition_metadata=dict(made.metadata or {}),
            partition_key=partition,
            asset_partition_key_range=(
                None if partition is None else dg.PartitionKeyRange(partition, partition)
            ),
            asset_partitions_def=partitions_def,
            instance=self.instance,
        )

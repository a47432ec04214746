"""How the table is cut, as Dagster's partitions."""

from datetime import datetime, timezone

import dagster as dg

from krea_dagster.errors import InputError
from krea_dagster.prompts import ColumnPartitions, DayPartitions, HashPartitions, PromptTable


def partitions_for(table: PromptTable, *, name: str) -> dg.PartitionsDefinition[str]:
    """The partitions of a prompt table.

    ``hash:N`` gives static partitions; ``column:NAME`` dynamic ones, registered under
    ``<name>_<column>``; ``day:NAME`` daily ones from the table's first day to today, in UTC.
    """
    match table.partition_by:
        case HashPartitions() as by:
            return dg.StaticPartitionsDefinition(by.keys())
        case ColumnPartitions(column=column):
            return dg.DynamicPartitionsDefinition(name=f"{name}_{column}")
        case DayPartitions():
            return dg.DailyPartitionsDefinition(
                start_date=_first_day(table), timezone="UTC", end_offset=1
            )


def _first_day(table: PromptTable) -> str:
    """The table's first day, or today while there is no table that can be read.

    A code location must load without its table: the run that reads it says what is wrong.
    """
    try:
        first = table.first_day()
    except InputError:
        first = None
    return first or datetime.now(timezone.utc).date().isoformat()


def register_partitions(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    keys: list[str],
) -> None:
    """Register the keys of dynamic partitions that the instance does not know yet."""
    if isinstance(partitions_def, dg.DynamicPartitionsDefinition) and partitions_def.name:
        known = set(instance.get_dynamic_partitions(partitions_def.name))
        if missing := [key for key in keys if key not in known]:
            instance.add_dynamic_partitions(partitions_def.name, missing)

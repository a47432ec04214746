"""The partitions of a prompt table as Dagster's partitions."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import date, datetime, timezone
from typing import Final

import dagster as dg
from sqlalchemy.exc import IntegrityError

from krea_dagster.errors import ConfigError, InputError
from krea_dagster.prompts import (
    ColumnPartitions,
    HashPartitions,
    MultiPartitions,
    PromptTable,
    TimePartitions,
)

#: The dimension of a multi-dimensional partition that is a column; the other one has the name of
#: its unit. Dagster joins keys in the order of these names.
COLUMN_DIMENSION: Final = "column"

#: Dagster's tags of a run over a range of partitions.
RANGE_START_TAG: Final = "dagster/asset_partition_range_start"
RANGE_END_TAG: Final = "dagster/asset_partition_range_end"


@contextmanager
def without_beta_warnings() -> Iterator[None]:
    """Silence Dagster's beta warnings while assets are built.

    Backfill policies are beta in Dagster. This package decided to use them and tests them; its
    users cannot act on a warning at each start.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)
        yield


def backfill_policy_of(partitions_per_run: int | None) -> dg.BackfillPolicy | None:
    """Return the backfill policy of a setting; None if one run has all partitions."""
    if partitions_per_run is None:
        return None
    with without_beta_warnings():
        return dg.BackfillPolicy.multi_run(partitions_per_run)


def partitions_for(
    table: PromptTable, *, name: str, start: str | None = None
) -> dg.PartitionsDefinition[str]:
    """Return the partitions of a prompt table.

    ``hash:N`` gives static partitions; ``column:NAME`` dynamic ones, registered under
    ``<name>_<column>``; ``day:NAME``, ``week:NAME`` and ``month:NAME`` time windows in their zone,
    from ``start`` (``YYYY-MM-DD``; None for the table's first) to the present one; with a column,
    the product of both. Raises ConfigError for a start that is not a day, or for partitions
    without a start.
    """
    by = table.partition_by
    if isinstance(by, HashPartitions | ColumnPartitions) and start is not None:
        raise ConfigError(f"partitions by {by} have no start; leave it out, or use day:NAME")
    match by:
        case HashPartitions():
            return dg.StaticPartitionsDefinition(by.keys())
        case ColumnPartitions(column=column):
            return dg.DynamicPartitionsDefinition(name=f"{name}_{column}")
        case TimePartitions():
            return _time_windows(table, by, start)
        case MultiPartitions():
            return dg.MultiPartitionsDefinition(
                {
                    COLUMN_DIMENSION: dg.DynamicPartitionsDefinition(
                        name=f"{name}_{by.by_column.column}"
                    ),
                    by.time.unit: _time_windows(table, by.time, start),
                }
            )


def time_dimension(
    partitions_def: dg.PartitionsDefinition[str],
) -> dg.TimeWindowPartitionsDefinition | None:
    """Return the time windows of partitions: their own, or those of a dimension; else None."""
    if isinstance(partitions_def, dg.MultiPartitionsDefinition):
        dimensions = [one.partitions_def for one in partitions_def.partitions_defs]
    else:
        dimensions = [partitions_def]
    for dimension in dimensions:
        if isinstance(dimension, dg.TimeWindowPartitionsDefinition):
            return dimension
    return None


def range_tags(first: str, last: str) -> dict[str, str]:
    """Return the tags of a run over a range of partitions."""
    return {RANGE_START_TAG: first, RANGE_END_TAG: last}


def _time_windows(
    table: PromptTable, by: TimePartitions, start: str | None
) -> dg.TimeWindowPartitionsDefinition:
    first = by.key_of(_first_day(table) if start is None else _day(start))
    # The present window exists from its beginning, so that its prompts do not wait for its end.
    match by.unit:
        case "day":
            return dg.DailyPartitionsDefinition(first, timezone=by.zone, end_offset=1)
        case "week":
            return dg.WeeklyPartitionsDefinition(
                first, timezone=by.zone, end_offset=1, day_offset=1
            )
        case "month":
            return dg.MonthlyPartitionsDefinition(first, timezone=by.zone, end_offset=1)


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise ConfigError(f"start is {text!r}; use a day such as 2026-11-01") from None


def _first_day(table: PromptTable) -> date:
    """Return the table's first day, or today if the table cannot be read.

    A code location must load without its table; the run that reads it reports the error.
    """
    try:
        first = table.first_time()
    except InputError:
        first = None
    return datetime.now(timezone.utc).date() if first is None else date.fromisoformat(first)


def dynamic_keys(
    partitions_def: dg.PartitionsDefinition[str], keys: Iterable[str]
) -> tuple[str, list[str]] | None:
    """Return the name of the dynamic partitions, and their keys within these; None without any."""
    if isinstance(partitions_def, dg.MultiPartitionsDefinition):
        within = partitions_def.get_partitions_def_for_dimension(COLUMN_DIMENSION)
        parts = [part for part in map(MultiPartitions.split, keys) if part is not None]
        return dynamic_keys(within, dict.fromkeys(value for value, _ in parts))
    if isinstance(partitions_def, dg.DynamicPartitionsDefinition) and partitions_def.name:
        return partitions_def.name, list(keys)
    return None


def missing_dynamic_keys(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    keys: Iterable[str],
) -> tuple[str, list[str]] | None:
    """Return the name and keys of dynamic partitions that the instance does not know; or None."""
    found = dynamic_keys(partitions_def, keys)
    if found is None:
        return None
    name, wanted = found
    known = set(instance.get_dynamic_partitions(name))
    missing = [key for key in wanted if key not in known]
    return (name, missing) if missing else None


def keys_of_run(tags: Mapping[str, str], known: Sequence[str]) -> frozenset[str]:
    """Return the keys of a run's partition or range, by its tags; none without partitions.

    ``known`` are all keys in Dagster's order.
    """
    if (key := tags.get("dagster/partition")) is not None:
        return frozenset([key])
    first, last = tags.get(RANGE_START_TAG), tags.get(RANGE_END_TAG)
    if first is None or last is None:
        return frozenset()
    if first not in known or last not in known:
        return frozenset([first, last])
    return frozenset(known[known.index(first) : known.index(last) + 1])


def register_partitions(
    instance: dg.DagsterInstance,
    partitions_def: dg.PartitionsDefinition[str],
    keys: Iterable[str],
) -> None:
    """Register the keys of dynamic partitions that the instance does not know yet.

    Other processes may do the same at the same time.
    """
    wanted = list(keys)
    missing = missing_dynamic_keys(instance, partitions_def, wanted)
    while missing is not None:
        try:
            instance.add_dynamic_partitions(*missing)
        except IntegrityError:
            # Another process added some between Dagster's read and write; nothing was written.
            still = missing_dynamic_keys(instance, partitions_def, wanted)
            if still == missing:
                raise
            missing = still
        else:
            return


def ranges(
    partitions_def: dg.PartitionsDefinition[str], chosen: Sequence[str], known: Sequence[str]
) -> list[tuple[str, str]]:
    """Return ranges of keys for Dagster, one for each run: the first and the last key.

    ``known`` are all keys in Dagster's order. A range of a multi-dimensional definition is the
    product of a range in each dimension, so that it stays within one value of the column.
    """
    multi = isinstance(partitions_def, dg.MultiPartitionsDefinition)
    position = {key: number for number, key in enumerate(known)}
    found: list[tuple[str, str]] = []
    for key in chosen:
        if found and position[key] == position[found[-1][1]] + 1:
            same = MultiPartitions.split(key) or (key, "")
            before = MultiPartitions.split(found[-1][1]) or (key, "")
            if not multi or same[0] == before[0]:
                found[-1] = (found[-1][0], key)
                continue
        found.append((key, key))
    return found


def without_finished(
    found: Iterable[tuple[str, str]], known: Sequence[str], is_finished: Callable[[str], bool]
) -> list[str]:
    """Return the keys of ranges, without the finished ones at both ends of each.

    Those in between stay, because a range is one run. ``known`` are all keys in Dagster's order.
    """
    position = {key: number for number, key in enumerate(known)}
    left: list[str] = []
    for first, last in found:
        keys = known[position[first] : position[last] + 1]
        begin = next((at for at, key in enumerate(keys) if not is_finished(key)), len(keys))
        end = next((at for at in range(len(keys), begin, -1) if not is_finished(keys[at - 1])), 0)
        left += keys[begin:end]
    return left

"""Metadata of the asset ``prompts``: its columns, and the rows and first prompts of a partition."""

from collections.abc import Callable, Mapping, Sequence
from typing import Final

import dagster as dg
import pyarrow as pa

from krea_dagster.application.partition_look import PartitionLook, looks_of_plan
from krea_dagster.plugin.metadata import Metadata, krea_metadata, small_table, table_schema
from krea_dagster.prompts import Plan
from krea_dagster.prompts.columns import RULES

_RECOGNISED: Final = pa.schema([(name, rule.kind) for name, rule in RULES.items()])
_ALLOWED: Final = {name: rule.allowed for name, rule in RULES.items()}


def prompts_schema(further: pa.Schema | None = None) -> dg.TableSchema:
    """Return the columns that a prompt table may have, and the ``further`` ones of this table."""
    fields = [*_RECOGNISED, *(further or ())]
    return table_schema(pa.schema(fields), _ALLOWED)


def prompts_metadata(
    looks: Mapping[str, PartitionLook],
    further: pa.Schema,
    lineage: dg.TableColumnLineage | None = None,
) -> Mapping[str, Metadata]:
    """Return the metadata of partitions, by key: the rows and some prompts of each.

    Only the last has the columns, and those of the upstream that they come from (``lineage``):
    Dagster shows those of the last event, and they would be the same in thousands of events.
    """
    values = {
        key: {
            **krea_metadata(
                {"sample": small_table({"prompt": prompt} for prompt in look.prompts)}
                if look.prompts
                else {}
            ),
            "dagster/partition_row_count": look.rows,
        }
        for key, look in looks.items()
    }
    if values:
        last = next(reversed(values))
        values[last]["dagster/column_schema"] = prompts_schema(further)
        if lineage is not None:
            values[last]["dagster/column_lineage"] = lineage
    return values


def plan_metadata(
    plan: Plan, lineage: dg.TableColumnLineage | None = None
) -> Callable[[Sequence[str]], Mapping[str, Metadata]]:
    """Return a function that returns the metadata of some partitions of a plan."""
    return lambda keys: prompts_metadata(looks_of_plan(plan, keys), plan.passthrough, lineage)

"""The rows and the first prompts of a partition are counted the same from a table and a plan."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from krea_dagster.application.column_versions import carried_columns
from krea_dagster.application.partition_look import PartitionLook, looks_of, looks_of_plan
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.dagster_bench import write_table


def test_a_table_and_its_plan_give_the_same_look(tmp_path: Path) -> None:
    columns = {
        "prompt": [f"prompt {number}" for number in range(6)],
        "bucket": ["a", "b", "a", "a", "a", "b"],
        "num_images": [1, 2, 1, 3, 1, 1],
    }
    source = write_table(tmp_path / "p.parquet", columns)
    table = PromptTable(source, parse_partition_by("column:bucket"))
    looks = {
        "a": PartitionLook(4, ("prompt 0", "prompt 2", "prompt 3")),
        "b": PartitionLook(2, ("prompt 1", "prompt 5")),
    }
    assert carried_columns(table).looks == looks
    with table.plan() as plan:
        assert looks_of_plan(plan, ["a", "b"]) == looks
        assert looks_of_plan(plan, ["of no row"]) == {"of no row": PartitionLook()}


def test_no_row_is_no_partition() -> None:
    nothing = pa.array([], pa.string())
    assert looks_of(nothing, nothing) == {}

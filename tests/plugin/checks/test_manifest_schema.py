"""The check of the manifests' schema."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.manifest import manifest_name
from krea_dagster.plugin.checks import (
    build_manifest_schema_check,
)
from tests.plugin.checks.stored_manifests import (
    ERROR,
    FOLDERS,
    StoredManifests,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


def rewritten(
    stored: StoredManifests, change: Callable[[pa.Table], pa.Table]
) -> dg.AssetCheckEvaluation:
    """The check of a manifest of three rows that was changed."""
    stored.write([stored.row(0), stored.row(1), stored.failed(2)])
    path = Path(stored.storage.locate(manifest_name("a", FOLDERS)))
    pq.write_table(change(pq.read_table(path)), path)
    return stored.check(build_manifest_schema_check, "a")


def put(table: pa.Table, name: str, values: list[Any]) -> pa.Table:
    at = table.schema.get_field_index(name)
    return table.set_column(at, table.schema.field(at), pa.array(values, table.schema.types[at]))


def test_a_whole_manifest_with_further_columns_keeps_the_contract(stored: StoredManifests) -> None:
    check = rewritten(stored, lambda table: table.append_column("mood", pa.array(["x"] * 3)))
    assert check.passed, check.description


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.drop_columns(["seed"]), "column seed is missing"),
        (
            lambda table: table.select(["sample", "prompt_id", *table.schema.names[2:]]),
            "column prompt_id is in place 2, not 1",
        ),
        (
            lambda table: table.set_column(1, "sample", pa.array([0, 0, 0], pa.int64())),
            "column sample is int64, not int32",
        ),
        (lambda table: put(table, "seed", [1, None, 3]), "row-0001: seed is null"),
        (
            lambda table: put(table, "image_path", ["x", None, None]),
            "row-0001: image_path is null, but it is stored",
        ),
        (lambda table: put(table, "status", ["stored", "stored", "odd"]), "status odd is unknown"),
        (
            lambda table: put(table, "prompt_id", ["row-0000", "row-0001", "row-0001"]),
            "1 violations of the manifest's schema in 3 rows: row-0001: an earlier row",
        ),
        (
            lambda table: put(table, "partition_key", ["a", "a", "c"]),
            "row-0002: it is in the file of another partition, a.parquet",
        ),
    ],
)  # fmt: skip
def test_a_breach_of_the_contract_is_an_error_and_named(
    stored: StoredManifests, change: Callable[[pa.Table], pa.Table], said: str
) -> None:
    check = rewritten(stored, change)
    assert (check.passed, check.severity) == (False, ERROR)
    assert said in (check.description or "")


def test_a_partition_of_the_run_without_a_manifest_is_named(stored: StoredManifests) -> None:
    stored.write([stored.row(0)])
    check = stored.check(build_manifest_schema_check, "a", "b/1")
    assert not check.passed
    assert "partition b/1: it has no manifest" in (check.description or "")

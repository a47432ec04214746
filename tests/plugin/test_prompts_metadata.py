"""The asset ``prompts`` shows its columns, its rows and some prompts; lineage points at them."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import build_krea_definitions
from krea_dagster.testing import FakeKrea, write_prompts
from tests.dagster_bench import latest, run_job, tick

RECOGNISED = ["prompt", "prompt_id", "size", "quality", "seed", "nsfw_check", "num_images"]


def column_names(value: object) -> list[str]:
    assert isinstance(value, dg.TableSchema)
    return [column.name for column in value.columns]


@pytest.mark.parametrize("reported_by", ["sensor", "run"])
def test_a_reported_partition_shows_rows_and_prompts_and_the_last_one_the_columns(
    tmp_path: Path, instance: dg.DagsterInstance, reported_by: str
) -> None:
    prefix = f"shown_by_{reported_by}"
    krea = FakeKrea(storage=str(tmp_path / "krea"))
    defs = build_krea_definitions(
        prompts=write_prompts(tmp_path),
        partition_by="column:category",
        krea=krea,
        key_prefix=prefix,
    )
    if reported_by == "sensor":
        tick(defs, instance, f"{prefix}_krea_prompts")
    else:
        instance.add_dynamic_partitions(f"{prefix}_krea_category", ["land", "sea"])
        assert run_job(defs, instance, "land", "sea", job=f"{prefix}_krea_images").success
    krea.close()
    key = (prefix, "prompts")
    land, sea = (latest(instance, key, name).metadata for name in ("land", "sea"))
    assert land["dagster/partition_row_count"].value == 2
    sample = land["krea/sample"]
    assert isinstance(sample, dg.TableMetadataValue)
    assert [row.data["prompt"] for row in sample.records] == ["a chalk cliff at noon", "a red kite"]
    assert "dagster/column_schema" not in land
    assert column_names(sea["dagster/column_schema"].value) == [*RECOGNISED, "category"]


def test_the_lineage_of_the_manifest_points_at_columns_that_prompts_has(tmp_path: Path) -> None:
    """Before the first report too: they are then those of the definition."""
    defs = build_krea_definitions(
        prompts=write_prompts(tmp_path), krea=FakeKrea(storage=str(tmp_path))
    )
    graph = defs.resolve_asset_graph()
    prompts, manifest = (
        graph.get(dg.AssetKey(name)).metadata for name in ("prompts", "image_manifest")
    )
    columns = column_names(prompts["dagster/column_schema"])
    lineage = manifest["dagster/column_lineage"]
    assert isinstance(lineage, dg.TableColumnLineage)
    sources = {dep.column_name for deps in lineage.deps_by_column.values() for dep in deps}
    assert sources
    assert sources <= set(columns)

"""Export assets: in the graph below accepted_images, with a data version, and honest when bad."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaResource
from krea_dagster.curation.accepted.accepted_table import accepted_name, accepted_schema
from krea_dagster.curation.export.spec import ExportSpec
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest
from krea_dagster.plugin.assets.export import build_export
from krea_dagster.plugin.names import Names
from tests.curation.export.export_project import ExportProject
from tests.dagster_bench import QUIET, values

NAMES = Names(("hand",))
MANIFEST = NAMES.manifest_key
ACCEPTED = dg.AssetKey(["hand", "accepted_images"])
FOLDERS = ["hand"]


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    return ExportProject(str(tmp_path / "krea"))


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as opened:
        yield opened


def accept(project: ExportProject, count: int, partition: str) -> None:
    schema = accepted_schema(MANIFEST_SCHEMA)
    begin = 100 * ord(partition[0])
    table = pa.Table.from_pylist(project.rows(count, begin), schema)
    name = accepted_name(partition, FOLDERS)
    project.storage.write(name, lambda file: pq.write_table(table, file))


def asset(**fields: Any) -> dg.AssetsDefinition:
    spec = ExportSpec.parse(
        splits=["train=0.5", "test=0.5"], form="webdataset", shard_images=5, **fields
    )
    return build_export(NAMES, "training", spec)


def run(
    project: ExportProject, instance: dg.DagsterInstance, exported: dg.AssetsDefinition
) -> dg.ExecuteInProcessResult:
    defs = dg.Definitions(
        assets=[exported],
        resources={"krea": KreaResource(storage=project.root)},
        jobs=[dg.define_asset_job("hand_on", selection=[exported.key])],
    )
    return defs.resolve_job_def("hand_on").execute_in_process(
        instance=instance, run_config=QUIET, raise_on_error=False
    )


def test_it_exports_all_partitions_and_shows_where_from_and_how_many(
    project: ExportProject, instance: dg.DagsterInstance
) -> None:
    accept(project, 12, "a")
    accept(project, 8, "b")
    exported = asset()
    assert exported.asset_deps[exported.key] == {ACCEPTED, NAMES.key("near_duplicates")}
    result = run(project, instance, exported)
    assert result.success
    (event,) = result.asset_materializations_for_node("hand__training")
    shown = values(event)
    assert (shown["dagster/row_count"], shown["shards_written"]) == (20, shown["shards"])
    assert shown["credits"] == pytest.approx(18.0)
    home = Path(project.root) / "exports" / "hand" / "training"
    assert shown["path"] == str(home / (home / "LATEST").read_text().strip())
    lineage = event.metadata["dagster/column_lineage"].value
    assert isinstance(lineage, dg.TableColumnLineage)
    assert list(lineage.deps_by_column["prompt"]) == [dg.TableColumnDep(ACCEPTED, "prompt")]
    assert event.tags is not None
    assert event.tags["dagster/data_version"] == shown["version"]


def test_an_export_without_changes_has_the_same_data_version(
    project: ExportProject, instance: dg.DagsterInstance
) -> None:
    accept(project, 6, "a")
    versions = []
    for count in (6, 6, 7):
        accept(project, count, "a")
        (event,) = run(project, instance, asset()).asset_materializations_for_node("hand__training")
        versions.append((event.tags or {})["dagster/data_version"])
    assert versions[0] == versions[1] != versions[2]


def test_images_that_are_missing_fail_the_run_and_nothing_is_published(
    project: ExportProject, instance: dg.DagsterInstance
) -> None:
    accept(project, 6, "a")
    Path(project.row(100 * ord("a") + 2)["image_path"]).unlink()
    result = run(project, instance, asset())
    assert not result.success
    (failure,) = [one for one in result.all_events if one.is_step_failure]
    said = str(failure.step_failure_data.user_failure_data)
    assert "1 image differs from the manifest. Nothing was published" in said
    assert "is missing" in said
    assert not list(Path(project.root).glob("exports/**/LATEST"))


def test_all_stored_images_hang_on_the_manifest(
    project: ExportProject, instance: dg.DagsterInstance
) -> None:
    table = pa.Table.from_pylist(project.rows(4), MANIFEST_SCHEMA)
    write_manifest(project.storage, "a", table, FOLDERS)
    exported = asset(everything=True)
    assert exported.asset_deps[exported.key] == {MANIFEST, NAMES.key("near_duplicates")}
    (event,) = run(project, instance, exported).asset_materializations_for_node("hand__training")
    assert values(event)["images"] == 4


def test_an_export_needs_a_name() -> None:
    with pytest.raises(ConfigError, match="needs a name"):
        build_export(NAMES, "", ExportSpec())

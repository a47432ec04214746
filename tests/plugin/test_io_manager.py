"""The manifest's IO manager: what is written per partition, and read as one by those downstream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaManifestIOManager, KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import MANIFEST_SCHEMA, write_manifest
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, run_job, write_table

#: hash:5, of which the last partition is never materialized.
MADE = [f"bucket-{number:03d}" for number in range(4)]
PARTITIONS = dg.StaticPartitionsDefinition([*MADE, "bucket-004"])
MANIFEST = dg.AssetKey(["io", "image_manifest"])
INS = {"image_manifest": dg.AssetIn(MANIFEST, input_manager_key="io_krea_manifest")}


@dataclass(frozen=True)
class MaterializedTable:
    """A table, four of whose five partitions have been materialized in one run."""

    folder: Path
    defs: dg.Definitions
    instance: dg.DagsterInstance

    def run(self, asset: dg.AssetsDefinition, **how: Any) -> dg.ExecuteInProcessResult:
        """Materialize an asset that reads the manifest."""
        both = dg.Definitions.merge(self.defs, dg.Definitions(assets=[asset]))
        job = both.resolve_implicit_job_def_def_for_assets([asset.key])
        assert job is not None
        return job.execute_in_process(
            instance=self.instance, asset_selection=[asset.key], run_config=QUIET, **how
        )

    def files(self) -> dict[str, pa.Table]:
        """The manifest files, by partition."""
        folder = self.folder / "krea" / "manifest" / "io"
        return {file.stem: pq.read_table(file) for file in sorted(folder.glob("*.parquet"))}


@pytest.fixture(scope="module")
def made(
    tmp_path_factory: pytest.TempPathFactory, emulator: Emulator, instance: dg.DagsterInstance
) -> MaterializedTable:
    folder = tmp_path_factory.mktemp("io")
    columns = {
        "prompt_id": [f"io-{number}" for number in range(12)],
        "prompt": [f"for the IO manager {number} [emulator: refuse]" for number in range(12)],
        "tags": [["a", "b"][: number % 3] for number in range(12)],
    }
    defs = build_krea_definitions(
        prompts=write_table(folder / "prompts.parquet", columns),
        partition_by="hash:5",
        krea=KreaResource(
            api_key="emulator",
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(folder / "krea"),
        ),
        key_prefix="io",
    )
    assert run_job(defs, instance, MADE[0], MADE[-1], job="io_krea_images").success
    return MaterializedTable(folder, defs, instance)


def test_each_partition_of_a_range_is_a_file_of_its_own_rows(made: MaterializedTable) -> None:
    files = made.files()
    assert list(files) == MADE
    for key, table in files.items():
        assert set(table["partition_key"].to_pylist()) <= {key}
        assert table.schema.names == [*MANIFEST_SCHEMA.names, "tags"]


def test_an_unpartitioned_asset_reads_all_partitions_as_pandas_where_it_says_so(
    made: MaterializedTable,
) -> None:
    @dg.asset(ins=INS)
    def as_pandas(image_manifest: pd.DataFrame) -> list[str]:
        assert isinstance(image_manifest, pd.DataFrame)
        return sorted(image_manifest["prompt_id"])

    result = made.run(as_pandas)
    ids = sorted(id_ for table in made.files().values() for id_ in table["prompt_id"].to_pylist())
    assert 0 < len(ids) <= 12
    assert result.output_for_node("as_pandas") == ids


@pytest.mark.parametrize("annotation", [pa.Table, Any])
def test_any_other_annotation_gives_an_arrow_table(
    made: MaterializedTable, annotation: Any
) -> None:
    def read(image_manifest: Any) -> bool:
        assert isinstance(image_manifest, pa.Table)
        assert image_manifest.schema.names == [*MANIFEST_SCHEMA.names, "tags"]
        return True

    read.__annotations__["image_manifest"] = annotation
    assert made.run(dg.asset(ins=INS)(read)).success


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta
def test_a_partition_reads_its_own_file_and_a_range_reads_several(made: MaterializedTable) -> None:
    @dg.asset(ins=INS, partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run())
    def per_partition(image_manifest: pa.Table) -> None:
        read.append(image_manifest)

    read: list[pa.Table] = []
    files = made.files()
    assert made.run(per_partition, partition_key=MADE[0]).success
    assert made.run(per_partition, tags={RANGE_START: MADE[1], RANGE_END: MADE[2]}).success
    assert read[0].equals(files[MADE[0]])
    assert read[1].equals(pa.concat_tables([files[MADE[1]], files[MADE[2]]]))


def test_a_partition_that_was_never_written_is_an_empty_manifest(made: MaterializedTable) -> None:
    @dg.asset(ins=INS, partitions_def=PARTITIONS)
    def early(image_manifest: pd.DataFrame) -> None:
        assert image_manifest.empty
        assert list(image_manifest.columns) == MANIFEST_SCHEMA.names

    assert made.run(early, partition_key="bucket-004").success


def test_an_asset_of_ones_own_that_uses_the_io_manager_does_not_write_over_the_manifest(
    made: MaterializedTable,
) -> None:
    @dg.asset(
        key=["io", "best"],
        ins=INS,
        partitions_def=PARTITIONS,
        io_manager_key="io_krea_manifest",
    )
    def best(image_manifest: pa.Table) -> pa.Table:
        return image_manifest.slice(0, 1)

    before = made.files()
    fullest = max(before, key=lambda key: before[key].num_rows)
    assert before[fullest].num_rows > 1
    assert made.run(best, partition_key=fullest).success
    assert made.files()[fullest].equals(before[fullest])
    own = made.folder / "krea" / "manifest" / "io" / "best" / f"{fullest}.parquet"
    assert pq.read_metadata(own).num_rows == 1


def test_a_misspelt_setting_is_refused() -> None:
    with pytest.raises(ValueError, match="storrage"):
        KreaManifestIOManager(storrage="data")  # type: ignore[call-arg]  # the point


# -- shapes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("annotation", [pl.DataFrame, pl.LazyFrame, duckdb.DuckDBPyRelation])
def test_polars_and_duckdb_get_the_same_rows_by_the_annotation(
    made: MaterializedTable, annotation: Any
) -> None:
    def read(image_manifest: Any) -> pa.Table:
        assert isinstance(image_manifest, annotation)
        if isinstance(image_manifest, pl.LazyFrame):
            image_manifest = image_manifest.collect()
        if isinstance(image_manifest, pl.DataFrame):
            return image_manifest.to_arrow()
        return image_manifest.to_arrow_table()

    read.__annotations__["image_manifest"] = annotation
    table = made.run(dg.asset(ins=INS)(read)).output_for_node("read")
    expected = pa.concat_tables(made.files().values())
    assert table.schema.names == expected.schema.names
    assert table["prompt_id"].to_pylist() == expected["prompt_id"].to_pylist()
    assert table["tags"].to_pylist() == expected["tags"].to_pylist()


def test_a_lazy_frame_asks_the_files_when_it_is_collected(made: MaterializedTable) -> None:
    @dg.asset(ins=INS)
    def counted(image_manifest: pl.LazyFrame) -> int:
        plan = image_manifest.select("prompt_id").explain()
        assert "Parquet SCAN" in plan
        assert "PROJECT 1/31" in plan
        return int(image_manifest.select(pl.len()).collect().item())

    rows = sum(table.num_rows for table in made.files().values())
    assert made.run(counted).output_for_node("counted") == rows


def test_an_annotation_that_there_is_not_fails_and_names_those_that_there_are(
    made: MaterializedTable,
) -> None:
    @dg.asset(ins=INS)
    def wrong(image_manifest: dict) -> None:  # type: ignore[type-arg]  # as people write it
        """Never called."""

    said = refusal(made.run(wrong, raise_on_error=False))
    assert "cannot be loaded as <class 'dict'>" in said
    for shape in ("pandas.DataFrame", "polars.LazyFrame", "duckdb.DuckDBPyRelation"):
        assert shape in said


def refusal(result: dg.ExecuteInProcessResult) -> str:
    """What a step that could not be given its input says."""
    assert not result.success
    (failed,) = result.get_step_failure_events()
    data = failed.step_failure_data
    said = data.user_failure_data.description if data.user_failure_data else None
    return f"{said} {data.error.to_string() if data.error else ''}"


# -- columns ----------------------------------------------------------------------------------


def asking(**metadata: Any) -> dict[str, dg.AssetIn]:
    """The input, with wishes."""
    return {
        "image_manifest": dg.AssetIn(
            MANIFEST, input_manager_key="io_krea_manifest", metadata=metadata
        )
    }


@pytest.mark.parametrize(
    "annotation", [pa.Table, pd.DataFrame, pl.DataFrame, pl.LazyFrame, duckdb.DuckDBPyRelation]
)
def test_only_the_columns_that_are_asked_for_are_given_in_their_order(
    made: MaterializedTable, annotation: Any
) -> None:
    def read(image_manifest: Any) -> list[str]:
        if isinstance(image_manifest, pl.LazyFrame):
            return image_manifest.collect_schema().names()
        if isinstance(image_manifest, pa.Table):
            return list(image_manifest.schema.names)
        return list(image_manifest.columns)

    read.__annotations__["image_manifest"] = annotation
    asset = dg.asset(ins=asking(columns=["tags", "prompt_id"]))(read)
    assert made.run(asset).output_for_node("read") == ["tags", "prompt_id"]


def test_a_column_that_there_is_not_fails_and_names_those_that_there_are(
    made: MaterializedTable,
) -> None:
    @dg.asset(ins=asking(columns=["prompt_id", "promt"]))
    def wrong(image_manifest: pa.Table) -> None:
        """Never called."""

    said = refusal(made.run(wrong, raise_on_error=False))
    assert "no column 'promt'" in said
    assert "prompt_id, sample, prompt, model" in said
    assert "tags" in said


def test_the_io_manager_reads_a_range_behind_a_url(
    made: MaterializedTable, instance: dg.DagsterInstance
) -> None:
    url = "memory://io-range/krea"
    for key, table in made.files().items():
        write_manifest(Storage(url), key, table, ["io"])

    @dg.asset(
        ins={
            "image_manifest": dg.AssetIn(
                MANIFEST,
                input_manager_key="io_krea_manifest",
                metadata={"columns": ["partition_key"]},
                partition_mapping=dg.SpecificPartitionsPartitionMapping(MADE[1:3]),
            )
        }
    )
    def some(image_manifest: pl.DataFrame) -> list[str]:
        return sorted(set(image_manifest["partition_key"]))

    defs = dg.Definitions(
        assets=[dg.AssetSpec(MANIFEST, partitions_def=PARTITIONS), some],
        resources={"io_krea_manifest": KreaManifestIOManager(storage=url)},
    )
    job = defs.resolve_implicit_job_def_def_for_assets([some.key])
    assert job is not None
    result = job.execute_in_process(instance=instance, asset_selection=[some.key], run_config=QUIET)
    files = made.files()
    assert result.output_for_node("some") == [key for key in MADE[1:3] if files[key].num_rows]

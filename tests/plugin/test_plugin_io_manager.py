"""The manifest's IO manager: what is written per partition, and read as one by those downstream."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster import KreaManifestIOManager, KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator
from krea_dagster.manifest import MANIFEST_SCHEMA
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START, run_job, write_table

#: hash:5, of which the last partition is never materialized.
MADE = [f"bucket-{number:03d}" for number in range(4)]
PARTITIONS = dg.StaticPartitionsDefinition([*MADE, "bucket-004"])
MANIFEST = dg.AssetKey(["io", "image_manifest"])
INS = {"image_manifest": dg.AssetIn(MANIFEST, input_manager_key="io_krea_manifest")}


@dataclass(frozen=True)
class Made:
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
) -> Made:
    folder = tmp_path_factory.mktemp("io")
    columns = {
        "prompt_id": [f"io-{number}" for number in range(12)],
        "prompt": [f"for the IO manager {number} [emulator: refuse]" for number in range(12)],
        "tags": [["a", "b"][: number % 3] for number in range(12)],
    }
    defs = build_krea_definitions(
        prompts=write_table(folder / "prompts.parquet", columns),
        partition_by="hash:5",
        krea=KreaResource(api_key="emulator", base_url=emulator.url, storage=str(folder / "krea")),
        key_prefix="io",
    )
    assert run_job(defs, instance, MADE[0], MADE[-1], job="io_krea_images").success
    return Made(folder, defs, instance)


def test_each_partition_of_a_range_is_a_file_of_its_own_rows(made: Made) -> None:
    files = made.files()
    assert list(files) == MADE
    for key, table in files.items():
        assert set(table["partition_key"].to_pylist()) <= {key}
        assert table.schema.names == [*MANIFEST_SCHEMA.names, "tags"]


def test_an_unpartitioned_asset_reads_all_partitions_as_pandas_where_it_says_so(
    made: Made,
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
def test_any_other_annotation_gives_an_arrow_table(made: Made, annotation: Any) -> None:
    def read(image_manifest: Any) -> bool:
        assert isinstance(image_manifest, pa.Table)
        assert image_manifest.schema.names == [*MANIFEST_SCHEMA.names, "tags"]
        return True

    read.__annotations__["image_manifest"] = annotation
    assert made.run(dg.asset(ins=INS)(read)).success


@pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta
def test_a_partition_reads_its_own_file_and_a_range_reads_several(made: Made) -> None:
    @dg.asset(ins=INS, partitions_def=PARTITIONS, backfill_policy=dg.BackfillPolicy.single_run())
    def per_partition(image_manifest: pa.Table) -> None:
        read.append(image_manifest)

    read: list[pa.Table] = []
    files = made.files()
    assert made.run(per_partition, partition_key=MADE[0]).success
    assert made.run(per_partition, tags={RANGE_START: MADE[1], RANGE_END: MADE[2]}).success
    assert read[0].equals(files[MADE[0]])
    assert read[1].equals(pa.concat_tables([files[MADE[1]], files[MADE[2]]]))


def test_a_partition_that_was_never_written_is_an_empty_manifest(made: Made) -> None:
    @dg.asset(ins=INS, partitions_def=PARTITIONS)
    def early(image_manifest: pd.DataFrame) -> None:
        assert image_manifest.empty
        assert list(image_manifest.columns) == MANIFEST_SCHEMA.names

    assert made.run(early, partition_key="bucket-004").success


def test_an_asset_of_ones_own_that_uses_the_io_manager_does_not_write_over_the_manifest(
    made: Made,
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

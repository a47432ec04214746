"""Read this first: ten lines of definitions, their images and manifest, a run that buys nothing.

The emulator of EvoLink's API stands in for EvoLink; with a key of your own only ``base_url`` and
``api_key`` change.
"""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pandas as pd
import pytest

from krea_dagster import KreaResource, build_krea_definitions
from krea_dagster.emulator import Emulator


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A prompt table with two columns; only ``prompt`` is required."""
    folder = tmp_path_factory.mktemp("tutorial")
    pd.DataFrame(
        {
            "prompt": [
                "A red kite over stubble fields, wide angle",
                "A tram in the rain at night, reflections on the rails",
                "Still life with three lemons and a tin jug",
            ],
            "size": ["16:9", "3:4", "1:1"],
        }
    ).to_parquet(folder / "prompts.parquet")
    return folder


@pytest.fixture(scope="module")
def defs(folder: Path, emulator: Emulator) -> dg.Definitions:
    """A whole ``definitions.py``."""
    return build_krea_definitions(
        prompts=str(folder / "prompts.parquet"),
        partition_by="hash:1",
        krea=KreaResource(
            api_key="emulator",  # yours: dg.EnvVar("EVOLINK_API_KEY")
            base_url=emulator.url,  # yours: leave it out
            storage=str(folder / "krea"),
        ),
    )


@pytest.fixture(scope="module")
def first_run(defs: dg.Definitions, instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """What "Materialize" in the UI does, or ``krea-dagster materialize`` in a terminal."""
    job = defs.resolve_job_def("krea_images")
    return job.execute_in_process(instance=instance, partition_key="bucket-000")


def test_1_materializing_a_partition_buys_its_images_and_writes_its_manifest(
    first_run: dg.ExecuteInProcessResult, folder: Path
) -> None:
    assert first_run.success

    manifest = pd.read_parquet(folder / "krea" / "manifest" / "bucket-000.parquet")
    assert list(manifest["status"]) == ["stored", "stored", "stored"]
    assert manifest["credits_charged"].sum() == pytest.approx(3 * 0.45)
    for image in manifest.to_dict("records"):
        assert Path(image["image_path"]).stat().st_size == image["image_bytes"]


@pytest.mark.usefixtures("first_run")
def test_2_an_asset_of_your_own_reads_the_manifest_as_pandas(
    defs: dg.Definitions, instance: dg.DagsterInstance
) -> None:
    @dg.asset(ins={"image_manifest": dg.AssetIn(input_manager_key="krea_manifest")})
    def wide_images(image_manifest: pd.DataFrame) -> int:
        return len(image_manifest.query("status == 'stored' and width > height"))

    yours = dg.Definitions(assets=[wide_images])
    job = dg.Definitions.merge(defs, yours).resolve_implicit_global_asset_job_def()
    result = job.execute_in_process(instance=instance, asset_selection=[wide_images.key])
    assert result.output_for_node("wide_images") == 1


@pytest.mark.usefixtures("first_run")
def test_3_running_it_again_buys_nothing(
    defs: dg.Definitions, emulator: Emulator, instance: dg.DagsterInstance
) -> None:
    before = emulator.stats(tasks=False)
    job = defs.resolve_job_def("krea_images")
    result = job.execute_in_process(instance=instance, partition_key="bucket-000")
    assert result.success

    after = emulator.stats(tasks=False)
    assert after["submit_posts"] == before["submit_posts"]
    assert after["charged_units"] == before["charged_units"]
    images = result.asset_materializations_for_node("images")[0]
    assert images.metadata["images_reused"].value == 3

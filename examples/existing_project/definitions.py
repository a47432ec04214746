"""Images in a project that has assets, a resource ``krea``, a schedule and an executor already."""

import os
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import KreaResource, build_krea_definitions, build_krea_schedule

FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/existing_project")).absolute()
PROMPTS = FOLDER / "prompts.parquet"


class OwnResource(dg.ConfigurableResource[None]):
    """Whatever this project calls ``krea``."""

    shop: str = "vases"


@dg.asset
def products(krea: OwnResource) -> dg.MaterializeResult[None]:
    """Writes the prompt table."""
    PROMPTS.parent.mkdir(parents=True, exist_ok=True)
    colours = ["red", "blue", "white"]
    prompts = [f"a {colour} vase on a table, {krea.shop}" for colour in colours]
    pd.DataFrame({"prompt_id": colours, "prompt": prompts}).to_parquet(PROMPTS)
    return dg.MaterializeResult()


@dg.asset(
    ins={
        "manifest": dg.AssetIn(
            dg.AssetKey(["vases", "image_manifest"]), input_manager_key="vases_krea_manifest"
        )
    }
)
def catalog(manifest: pd.DataFrame) -> list[str]:
    """Takes all partitions of the manifest."""
    return [str(path) for path in manifest.query("status == 'stored'")["image_path"]]


def build(krea: KreaResource) -> dg.Definitions:
    """Merge the project's own definitions with those of the images."""
    images = build_krea_definitions(
        prompts=str(PROMPTS),
        deps=[products],  # in a job with it, the images are bought after it
        partition_by="hash:2",
        key_prefix="vases",  # before all names, also of the resources: nothing collides
        krea=krea,
        executor=None,  # the project has one
    )
    nightly = build_krea_schedule(images, key_prefix="vases", cron_schedule="0 3 * * *")
    selection = dg.AssetSelection.assets(products, ["vases", "images"], ["vases", "image_manifest"])
    own = dg.Definitions(
        assets=[products, catalog],
        resources={"krea": OwnResource()},
        jobs=[dg.define_asset_job("everything", selection | dg.AssetSelection.assets(catalog))],
        schedules=[nightly],
        executor=dg.in_process_executor,
    )
    return dg.Definitions.merge(own, images)


@dg.definitions
def defs() -> dg.Definitions:
    """What Dagster loads. With ``api_key=dg.EnvVar("EVOLINK_API_KEY")`` it buys real images."""
    return build(KreaResource(emulator=True, storage=str(FOLDER / "krea")))

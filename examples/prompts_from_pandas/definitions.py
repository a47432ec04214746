"""Prompts that a pandas asset makes from a table of products, and their images, in one job.

``python examples/prompts_from_pandas/definitions.py`` runs the job three times: at first, with the
same products again, and after three products have changed.
"""

import os
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import KreaResource, build_krea_definitions

FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/prompts_from_pandas")).absolute()
STYLE = "on a plain background, soft light"
PRODUCTS = [
    ("kettle", "kitchen", "red"),
    ("jug", "kitchen", "blue"),
    ("bowl", "kitchen", "white"),
    ("lamp", "living room", "green"),
    ("vase", "living room", "blue"),
    ("clock", "living room", "black"),
]


@dg.asset
def products() -> pd.DataFrame:
    """The products; anything that writes ``products.csv`` may stand here."""
    return pd.read_csv(FOLDER / "products.csv")


@dg.asset
def product_prompts(products: pd.DataFrame) -> pd.DataFrame:
    """A prompt for each product. The columns that Krea does not know are copied to the manifest."""
    text = "a " + products["color"] + " " + products["product"] + " " + STYLE
    table: pd.DataFrame = products.assign(prompt_id=products["product"], prompt=text)
    return table


images = build_krea_definitions(
    # The asset itself: its value, through its IO manager, is the prompt table.
    prompts=product_prompts,
    partition_by="hash:2",
    krea=KreaResource(emulator=True, storage=str(FOLDER / "krea")),
    checks=(),
)
everything = dg.define_asset_job(
    "everything",
    selection=["products", "product_prompts", "images", "image_manifest"],
)
defs = dg.Definitions.merge(
    images,
    dg.Definitions(
        assets=[products, product_prompts],
        jobs=[everything],
        resources={"io_manager": dg.FilesystemIOManager(base_dir=str(FOLDER / "values"))},
    ),
)


def run(instance: dg.DagsterInstance) -> str:
    """Run the job for both partitions, and return the order of its steps and what it bought."""
    result = defs.resolve_job_def("everything").execute_in_process(
        instance=instance,
        tags={
            "dagster/asset_partition_range_start": "bucket-000",
            "dagster/asset_partition_range_end": "bucket-001",
        },
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )
    steps = [event.step_key for event in result.all_events if event.is_step_materialization]
    manifest = pd.read_parquet(FOLDER / "krea" / "manifest")
    bought = sorted(manifest.query("run_id == @result.run_id")["product"])
    return f"{' > '.join(dict.fromkeys(map(str, steps)))}: bought {bought}"


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    table = pd.DataFrame(PRODUCTS, columns=["product", "room", "color"])
    with dg.DagsterInstance.ephemeral() as instance:
        for said, changed in (("first", {}), ("the same", {}), ("changed", {1: "pink", 4: "grey"})):
            for row, color in changed.items():
                table.loc[row, "color"] = color
            table.to_csv(FOLDER / "products.csv", index=False)
            print(f"{said}: {run(instance)}")

"""A dataset by category: images, checks, and a JSONL of the delivered images.

``python examples/curated_dataset/definitions.py`` makes it; ``dagster dev -f`` and this file opens
Dagster's UI on it.
"""

import json
import os
from functools import partial
from pathlib import Path

import dagster as dg
import pandas as pd

from krea_dagster import (
    KreaResource,
    build_failure_share_check,
    build_files_check,
    build_images_check,
    build_krea_definitions,
    build_manifest_schema_check,
    build_spend_check,
)

FOLDER = Path(os.environ.get("EXAMPLE_FOLDER", "data/examples/curated_dataset")).absolute()
PROMPTS = FOLDER / "prompts.parquet"

ROWS = [
    ("harbor", "a harbor at dawn, film grain", "sea"),
    ("sailor", "portrait of an old sailor, window light", "people"),
    ("baker", "a baker at four in the morning, flour in the air", "people"),
    ("surf", "surf on black sand, long exposure", "sea"),
    ("lighthouse", "a lighthouse in fog, telephoto", "sea"),
    ("twins", "two sisters on a tandem, summer", "people"),
    # The emulator refuses this one, to show what the checks say.
    ("refused", "a prompt that is refused [emulator: refuse]", "people"),
]

krea_defs = build_krea_definitions(
    prompts=str(PROMPTS),
    partition_by="column:category",
    # With a key: KreaResource(api_key=dg.EnvVar("EVOLINK_API_KEY"), storage=...)
    krea=KreaResource(emulator=True, storage=str(FOLDER / "krea"), run_credits=10),
    checks=[
        build_manifest_schema_check,
        partial(build_failure_share_check, warn_above=0.1, error_above=0.3),
        partial(build_files_check, sample=None),
        partial(build_images_check, sample=None),
        partial(build_spend_check, most_credits=5),
    ],
)


@dg.asset(
    group_name="krea",
    ins={
        "image_manifest": dg.AssetIn(
            input_manager_key="krea_manifest",
            metadata={
                "columns": ["prompt_id", "prompt", "category", "seed", "status", "image_path"]
            },
        )
    },
)
def dataset(image_manifest: pd.DataFrame) -> dg.MaterializeResult[None]:
    """One line of JSON for each delivered image."""
    delivered = image_manifest.query("status == 'stored'").drop(columns="status")
    lines = [json.dumps(row) for row in delivered.sort_values("prompt_id").to_dict("records")]
    (FOLDER / "dataset.jsonl").write_text("\n".join([*lines, ""]))
    return dg.MaterializeResult(metadata={"images": len(lines)})


defs = dg.Definitions.merge(krea_defs, dg.Definitions(assets=[dataset]))


def main() -> None:
    """Write the prompts, buy the images, and write the dataset."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(ROWS, columns=["prompt_id", "prompt", "category"]).to_parquet(PROMPTS)
    quiet = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
    with dg.DagsterInstance.local_temp(str(FOLDER)) as instance:
        # The sensor krea_prompts does this where the daemon runs.
        instance.add_dynamic_partitions("krea_category", ["people", "sea"])
        bought = defs.resolve_job_def("krea_images").execute_in_process(
            run_config=quiet,
            instance=instance,
            tags={
                "dagster/asset_partition_range_start": "people",
                "dagster/asset_partition_range_end": "sea",
            },
        )
        written = defs.resolve_implicit_global_asset_job_def().execute_in_process(
            run_config=quiet, instance=instance, asset_selection=[dataset.key]
        )
    for check in bought.get_asset_check_evaluations():
        said = "passed" if check.passed else check.severity.value
        print(f"{check.check_name}: {said}. {check.description}")
    (event,) = written.asset_materializations_for_node("dataset")
    print(f"{event.metadata['images'].value} images in {FOLDER / 'dataset.jsonl'}")


if __name__ == "__main__":
    main()

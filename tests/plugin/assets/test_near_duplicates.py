"""near_duplicates in Dagster: what a run makes and shows, and what its check says."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from krea_dagster import KreaResource
from krea_dagster.curation.similarity.near_duplicates import (
    near_duplicates_name,
    read_near_duplicates,
)
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.plugin.assets.near_duplicates import (
    build_near_duplicates,
    build_no_near_duplicates_check,
)
from krea_dagster.plugin.names import Names
from tests.curation.similarity.similar_images import SimilarImages, digest, flipped, hashes
from tests.dagster_bench import QUIET, check_of, values

NAMES = Names(("shop",), resource_key="shop_krea")
DUPLICATES = NAMES.key("near_duplicates")


@pytest.fixture
def images(tmp_path: Path) -> SimilarImages:
    return SimilarImages(tmp_path / "krea", ["shop"])


def definitions(images: SimilarImages) -> dg.Definitions:
    return dg.Definitions(
        assets=[build_near_duplicates(NAMES)],
        asset_checks=[build_no_near_duplicates_check(NAMES)],
        resources={"shop_krea": KreaResource(storage=str(images.root))},
        jobs=[
            dg.define_asset_job("both", selection=dg.AssetSelection.assets(DUPLICATES)),
            dg.define_asset_job(
                "check",
                selection=dg.AssetSelection.checks(
                    dg.AssetCheckKey(DUPLICATES, "no_near_duplicates")
                ),
            ),
        ],
    )


def run(images: SimilarImages, job: str = "both") -> dg.ExecuteInProcessResult:
    with dg.DagsterInstance.ephemeral() as instance:
        return (
            definitions(images)
            .resolve_job_def(job)
            .execute_in_process(instance=instance, run_config=QUIET)
        )


def test_a_run_makes_the_table_and_adds_up_the_cost_of_copies(images: SimilarImages) -> None:
    hashed, other = hashes(2)
    images.add("one", hashed, sharpness=9.0)
    images.add("two", flipped(hashed, range(12)), partition="b", sharpness=1.0)
    images.add("bought again", hashed, file="one", sharpness=9.0, later_s=5)
    images.add("other", other)
    images.write()
    result = run(images)
    (made,) = result.asset_materializations_for_node("shop__near_duplicates")
    found = values(made)
    assert {name: found[name] for name in ("images", "purchases", "clusters")} == {
        "images": 3,
        "purchases": 4,
        "clusters": 1,
    }
    assert (found["copies_exact"], found["copies_near"]) == (1, 1)
    assert (found["credits_in_copies"], found["dagster/row_count"]) == (0.9, 3)
    (bar,) = found["copies_by_distance"].records
    assert bar.data == {"bits": 12, "copies": 1}
    assert found["path"] == images.storage.locate(near_duplicates_name(["shop"]))
    (cluster,) = found["largest_clusters"].records
    assert (cluster.data["prompt_id"], cluster.data["purchases"]) == ("one", 3)

    check = check_of(result, "no_near_duplicates")
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert (check.description or "").startswith(
        "1 images are exact copies and 1 nearly equal ones, in 1 clusters; these copies cost 0.9 "
        "credits. 3 similar to one sample 0 (partition a, cluster "
    )


def test_without_duplicates_the_check_passes(images: SimilarImages) -> None:
    for number, hashed in enumerate(hashes(3)):
        images.add(f"{number}", hashed)
    images.write()
    check = check_of(run(images), "no_near_duplicates")
    assert check.passed


def test_the_check_warns_before_the_table_exists(images: SimilarImages) -> None:
    images.write()
    check = check_of(run(images, "check"), "no_near_duplicates")
    assert (check.passed, check.severity) == (False, dg.AssetCheckSeverity.WARN)
    assert "does not exist yet" in (check.description or "")


def test_an_accepted_image_is_kept_even_with_worse_measures(images: SimilarImages) -> None:
    hashed = hashes(1)[0]
    images.add("sharp", hashed, sharpness=900.0)
    chosen = images.add("chosen", flipped(hashed, [1]), sharpness=1.0)
    images.write()
    given = Verdict(
        verdict_id="1",
        image_sha256=chosen,
        verdict="keep",
        reviewer="ada",
        request_key=digest("request chosen"),
        prompt_id="chosen",
        sample=0,
        attempt=0,
        partition_key="a",
    )
    with KreaResource(storage=str(images.root)).krea().open_journal() as journal:
        journal.verdicts.add([given])
    run(images)
    table = read_near_duplicates(images.storage, ["shop"])
    assert table is not None
    assert {row["prompt_id"] for row in table.to_pylist() if row["keep"]} == {"chosen"}

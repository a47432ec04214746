"""Near-duplicates: what counts as the same image, which one is kept, and what the others cost."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krea_dagster.curation.measures.builtin import measure
from krea_dagster.curation.similarity.near_duplicates import (
    NEAR_DUPLICATES_SCHEMA,
    NearDuplicateSummary,
    largest_clusters,
    near_duplicates_name,
    read_near_duplicates,
    update_near_duplicates,
)
from krea_dagster.emulator.render import render
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from tests.curation.similarity.similar_images import SimilarImages, digest, flipped, hashes


@pytest.fixture
def images(tmp_path: Path) -> SimilarImages:
    return SimilarImages(tmp_path)


def found(
    images: SimilarImages, **options: Any
) -> tuple[NearDuplicateSummary, dict[str, dict[str, Any]]]:
    """Update the table; return its summary, and its rows by prompt_id."""
    figures = update_near_duplicates(images.write(), images.folders, **options)
    return figures, rows_of(images.storage, images.folders)


def rows_of(storage: Storage, folders: Any = ()) -> dict[str, dict[str, Any]]:
    table = read_near_duplicates(storage, folders)
    assert table is not None
    assert table.schema.remove_metadata() == NEAR_DUPLICATES_SCHEMA
    return {row["prompt_id"]: row for row in table.to_pylist()}


# -- what counts --------------------------------------------------------------------------------


def test_near_images_of_other_prompts_and_partitions_are_one_cluster(images: SimilarImages) -> None:
    one, other = hashes(2)
    first = images.add("one", one, sharpness=200.0)
    second = images.add("near", flipped(one, range(31)), partition="b/2")
    images.add("not near", flipped(one, range(100, 132)))
    images.add("other", other)
    figures, rows = found(images)
    assert set(rows) == {"one", "near"}
    assert rows["one"] == {
        "image_sha256": first,
        "partition_key": "a",
        "prompt_id": "one",
        "sample": 0,
        "request_key": digest("request one"),
        "cluster": min(first, second),
        "kind": "near",
        "keep": True,
        "distance": 0,
        "credits_charged": 0.45,
    }
    assert (rows["near"]["keep"], rows["near"]["distance"]) == (False, 31)
    assert rows["near"]["cluster"] == rows["one"]["cluster"]
    copies = figures.copies
    assert (figures.images, figures.purchases) == (4, 4)
    assert (copies.clusters, copies.exact, copies.near, copies.largest) == (1, 0, 1, 2)
    assert (copies.credits, copies.by_distance) == (0.45, {31: 1})


def test_one_file_under_two_request_keys_was_bought_twice(images: SimilarImages) -> None:
    images.add("later", file="x", later_s=60)
    images.add("first", file="x")
    figures, rows = found(images)
    assert {name: row["keep"] for name, row in rows.items()} == {"first": True, "later": False}
    assert {row["kind"] for row in rows.values()} == {"exact"}
    assert (figures.copies.exact, figures.copies.credits) == (1, 0.45)
    assert figures.not_measured == 1


def test_rows_that_share_a_purchase_are_not_duplicates(images: SimilarImages) -> None:
    for number, partition in enumerate("abc"):
        images.add(
            f"twin {partition}",
            file="x",
            partition=partition,
            request_key=digest("shared"),
            later_s=number // 2,  # also where two manifests say different times of it
        )
    figures, rows = found(images)
    assert rows == {}
    assert (figures.purchases, figures.copies.count) == (1, 0)


def test_rows_that_share_a_purchase_are_kept_or_not_together_and_counted_once(
    images: SimilarImages,
) -> None:
    hashed = hashes(1)[0]
    images.add("sharp", hashed, sharpness=300.0)
    for partition in ("a", "b"):
        images.add(
            f"twin {partition}",
            flipped(hashed, [3]),
            file="x",
            partition=partition,
            request_key=digest("shared"),
        )
    figures, rows = found(images)
    assert {name: row["keep"] for name, row in rows.items()} == {
        "sharp": True,
        "twin a": False,
        "twin b": False,
    }
    assert (figures.copies.near, figures.copies.credits) == (1, 0.45)


def test_a_cluster_may_hold_copies_of_both_kinds(images: SimilarImages) -> None:
    hashed = hashes(1)[0]
    images.add("kept", hashed, file="x", sharpness=300.0)
    images.add("same file", hashed, file="x", later_s=1, sharpness=300.0)
    images.add("near", flipped(hashed, [1]), file="y")
    images.add("near again", flipped(hashed, [1]), file="y", later_s=1)
    figures, rows = found(images)
    kinds = {name: (row["kind"], row["keep"], row["distance"]) for name, row in rows.items()}
    assert kinds == {
        "kept": ("exact", True, 0),
        "same file": ("exact", False, 0),
        "near": ("near", False, 1),
        "near again": ("near", False, 1),
    }
    assert (figures.copies.exact, figures.copies.near, figures.copies.largest) == (1, 2, 4)


def test_images_with_too_little_structure_are_compared_by_sha256_only(
    images: SimilarImages,
) -> None:
    """Otherwise a thousand skies would be one cluster."""
    sky = hashes(1)[0]
    for number in range(20):
        images.add(f"sky {number}", sky, quality=49)
    images.add("same sky", sky, quality=49, file="sky 3", later_s=1)
    figures, rows = found(images)
    assert set(rows) == {"sky 3", "same sky"}
    assert figures.low_quality == 20
    figures, rows = found(images, least_quality=49)
    assert len(rows) == 21


def test_rows_without_an_image_are_ignored(images: SimilarImages) -> None:
    hashed = hashes(1)[0]
    images.add("stored", hashed)
    images.add("failed", hashed, status="failed")
    images.add("no hash", hashed, image_sha256=None)
    figures, rows = found(images)
    assert (figures.images, rows) == (1, {})


def test_the_limit_can_be_set(images: SimilarImages) -> None:
    hashed = hashes(1)[0]
    images.add("one", hashed)
    images.add("other", flipped(hashed, range(10)))
    assert found(images, most_bits=9)[1] == {}
    assert len(found(images, most_bits=10)[1]) == 2


def test_a_limit_out_of_range_is_rejected(images: SimilarImages) -> None:
    with pytest.raises(ConfigError, match="0 to 47 bits of 256, not 48"):
        update_near_duplicates(images.write(), most_bits=48)


# -- which one is kept ----------------------------------------------------------------------------


def test_the_kept_one_is_by_verdict_sharpness_time_and_key(images: SimilarImages) -> None:
    """Each image is better than the one before by a rule with higher priority."""
    hashed = hashes(1)[0]
    first, second = sorted(["1", "2"], key=lambda name: digest(f"request {name}"))
    images.add(second, hashed, sharpness=None, later_s=9)
    images.add(first, flipped(hashed, [1]), sharpness=None, later_s=9)
    images.add("earlier", flipped(hashed, [2]), sharpness=None, later_s=8)
    images.add("sharper", flipped(hashed, [3]), sharpness=1.0, later_s=20)
    images.add("sharpest", flipped(hashed, [4]), sharpness=2.0, later_s=30)
    accepted = images.add("accepted", flipped(hashed, [5]), sharpness=0.5, later_s=40)
    rejected = images.add("rejected", flipped(hashed, [6]), sharpness=900.0)
    verdicts = {accepted: "keep", rejected: "reject", digest("unknown"): "keep"}
    best_first = ["accepted", "sharpest", "sharper", "earlier", first, second, "rejected"]
    while len(best_first) > 1:
        _, rows = found(images, verdicts=verdicts)
        assert [name for name, row in rows.items() if row["keep"]] == best_first[:1]
        gone = best_first.pop(0)
        images.rows = [row for row in images.rows if row["prompt_id"] != gone]


def test_clusters_are_stars_around_the_kept_one_and_do_not_chain(images: SimilarImages) -> None:
    hashed = hashes(1)[0]
    for step in range(4):
        images.add(f"step {step}", flipped(hashed, range(20 * step)), sharpness=100.0 - step)
    _, rows = found(images)
    assert {name: row["keep"] for name, row in rows.items()} == {
        "step 0": True,
        "step 1": False,
        "step 2": True,
        "step 3": False,
    }
    assert rows["step 0"]["cluster"] != rows["step 2"]["cluster"]


@pytest.mark.parametrize("shuffle", range(3))
def test_the_order_of_rows_changes_no_byte(tmp_path: Path, shuffle: int) -> None:
    files = []
    for root, order in ((tmp_path / "one", None), (tmp_path / "two", shuffle)):
        images = SimilarImages(root)
        for number, hashed in enumerate(hashes(20)):
            for copy in range(number % 4):
                images.add(
                    f"{number}-{copy}",
                    flipped(hashed, range(copy * 14)),
                    partition="abc"[(number + copy) % 3],
                    file=f"{number}" if copy == 2 else None,
                )
        update_near_duplicates(images.write(order))
        files.append((root / near_duplicates_name()).read_bytes())
    assert files[0] == files[1]


# -- the table ------------------------------------------------------------------------------------


def test_tables_that_share_a_root_are_kept_apart(tmp_path: Path) -> None:
    hashed = hashes(1)[0]
    for folders in ([], ["shop"]):
        images = SimilarImages(tmp_path, folders)
        images.add(f"one of {folders}", hashed)
        images.add(f"two of {folders}", hashed)
        images.write()
    update_near_duplicates(Storage(str(tmp_path)), ["shop"])
    assert read_near_duplicates(Storage(str(tmp_path))) is None
    assert set(rows_of(Storage(str(tmp_path)), ["shop"])) == {"one of ['shop']", "two of ['shop']"}


def test_nothing_stored_gives_an_empty_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert update_near_duplicates(storage).copies.clusters == 0
    assert rows_of(storage) == {}


def test_a_copy_of_unknown_cost_is_counted_apart(images: SimilarImages) -> None:
    images.add("first", file="x")
    images.add("second", file="x", later_s=1, credits_charged=None)
    images.add("third", file="x", later_s=2, credits_charged=0.9)
    figures, _ = found(images)
    assert (figures.copies.credits, figures.copies.unpriced) == (0.9, 1)


def test_the_largest_clusters_come_first_with_what_went_into_their_copies(
    images: SimilarImages,
) -> None:
    small, large = hashes(2)
    for number in range(2):
        images.add(f"small {number}", flipped(small, [number]), sharpness=9.0 - number)
    for number in range(3):
        images.add(f"large {number}", flipped(large, [number]), sharpness=9.0 - number)
    found(images)
    table = read_near_duplicates(images.storage)
    assert table is not None
    shown = largest_clusters(table, 5)
    assert [(one["prompt_id"], one["purchases"], one["copies_credits"]) for one in shown] == [
        ("large 0", 3, 0.9),
        ("small 0", 2, 0.45),
    ]
    assert len(largest_clusters(table, 1)) == 1


# -- real images ----------------------------------------------------------------------------------


def test_recompressed_and_smaller_images_are_found_and_others_are_not(
    images: SimilarImages,
) -> None:
    """With real hashes, of the emulator's images and variants of one."""
    rendered = {f"seed {seed}": render("a heron at dawn", seed, 512, 512) for seed in range(1, 9)}
    one = rendered["seed 3"]
    buffer = io.BytesIO()
    one.save(buffer, "JPEG", quality=40)
    rendered["compressed"] = Image.open(buffer)
    rendered["smaller"] = one.resize((400, 400))
    rendered["flat"] = Image.new("RGB", (512, 512), "teal")
    rendered["flat too"] = Image.new("RGB", (512, 512), "navy")
    for name, image in rendered.items():
        figures = measure(image)
        bits = np.frombuffer(figures.perceptual_hash, np.uint8)
        quality = figures.perceptual_hash_quality
        images.add(name, bits, quality=quality, sharpness=figures.sharpness)
    figures_of_all, rows = found(images)
    assert set(rows) == {"seed 3", "compressed", "smaller"}
    assert figures_of_all.low_quality == 2

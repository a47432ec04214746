"""Near-duplicates: what counts as the same picture, which one is kept, and what the others cost."""

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
from tests.curation.similarity.similar_images import Pile, digest, flipped, hashes


@pytest.fixture
def pile(tmp_path: Path) -> Pile:
    return Pile(tmp_path)


def found(pile: Pile, **options: Any) -> tuple[NearDuplicateSummary, dict[str, dict[str, Any]]]:
    """The figures, and the table's rows by prompt_id."""
    figures = update_near_duplicates(pile.write(), pile.folders, **options)
    return figures, rows_of(pile.storage, pile.folders)


def rows_of(storage: Storage, folders: Any = ()) -> dict[str, dict[str, Any]]:
    table = read_near_duplicates(storage, folders)
    assert table is not None
    assert table.schema.remove_metadata() == NEAR_DUPLICATES_SCHEMA
    return {row["prompt_id"]: row for row in table.to_pylist()}


# -- what counts --------------------------------------------------------------------------------


def test_near_pictures_of_other_prompts_and_partitions_are_one_cluster(pile: Pile) -> None:
    one, other = hashes(2)
    first = pile.add("one", one, sharpness=200.0)
    second = pile.add("near", flipped(one, range(31)), partition="b/2")
    pile.add("not near", flipped(one, range(100, 132)))
    pile.add("other", other)
    figures, rows = found(pile)
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


def test_one_file_under_two_request_keys_was_bought_twice(pile: Pile) -> None:
    pile.add("later", file="x", later_s=60)
    pile.add("first", file="x")
    figures, rows = found(pile)
    assert {name: row["keep"] for name, row in rows.items()} == {"first": True, "later": False}
    assert {row["kind"] for row in rows.values()} == {"exact"}
    assert (figures.copies.exact, figures.copies.credits) == (1, 0.45)
    assert figures.not_measured == 1


def test_rows_that_share_a_purchase_are_no_duplicates(pile: Pile) -> None:
    for number, partition in enumerate("abc"):
        pile.add(
            f"twin {partition}",
            file="x",
            partition=partition,
            request_key=digest("shared"),
            later_s=number // 2,  # also where two manifests say different times of it
        )
    figures, rows = found(pile)
    assert rows == {}
    assert (figures.purchases, figures.copies.count) == (1, 0)


def test_rows_that_share_a_purchase_are_kept_or_not_together_and_counted_once(pile: Pile) -> None:
    picture = hashes(1)[0]
    pile.add("sharp", picture, sharpness=300.0)
    for partition in ("a", "b"):
        pile.add(
            f"twin {partition}",
            flipped(picture, [3]),
            file="x",
            partition=partition,
            request_key=digest("shared"),
        )
    figures, rows = found(pile)
    assert {name: row["keep"] for name, row in rows.items()} == {
        "sharp": True,
        "twin a": False,
        "twin b": False,
    }
    assert (figures.copies.near, figures.copies.credits) == (1, 0.45)


def test_a_cluster_may_hold_copies_of_both_kinds(pile: Pile) -> None:
    picture = hashes(1)[0]
    pile.add("kept", picture, file="x", sharpness=300.0)
    pile.add("same file", picture, file="x", later_s=1, sharpness=300.0)
    pile.add("near", flipped(picture, [1]), file="y")
    pile.add("near again", flipped(picture, [1]), file="y", later_s=1)
    figures, rows = found(pile)
    kinds = {name: (row["kind"], row["keep"], row["distance"]) for name, row in rows.items()}
    assert kinds == {
        "kept": ("exact", True, 0),
        "same file": ("exact", False, 0),
        "near": ("near", False, 1),
        "near again": ("near", False, 1),
    }
    assert (figures.copies.exact, figures.copies.near, figures.copies.largest) == (1, 2, 4)


def test_pictures_with_too_little_structure_are_compared_by_their_file_only(pile: Pile) -> None:
    """Else a thousand skies would be one cluster."""
    sky = hashes(1)[0]
    for number in range(20):
        pile.add(f"sky {number}", sky, quality=49)
    pile.add("same sky", sky, quality=49, file="sky 3", later_s=1)
    figures, rows = found(pile)
    assert set(rows) == {"sky 3", "same sky"}
    assert figures.low_quality == 20
    figures, rows = found(pile, least_quality=49)
    assert len(rows) == 21


def test_rows_without_an_image_take_no_part(pile: Pile) -> None:
    picture = hashes(1)[0]
    pile.add("stored", picture)
    pile.add("failed", picture, status="failed")
    pile.add("no hash", picture, image_sha256=None)
    figures, rows = found(pile)
    assert (figures.images, rows) == (1, {})


def test_the_limit_can_be_set(pile: Pile) -> None:
    picture = hashes(1)[0]
    pile.add("one", picture)
    pile.add("other", flipped(picture, range(10)))
    assert found(pile, most_bits=9)[1] == {}
    assert len(found(pile, most_bits=10)[1]) == 2


def test_a_limit_that_cannot_be_is_refused(pile: Pile) -> None:
    with pytest.raises(ConfigError, match="0 to 47 bits of 256, not 48"):
        update_near_duplicates(pile.write(), most_bits=48)


# -- which one is kept ----------------------------------------------------------------------------


def test_the_kept_one_is_by_verdict_sharpness_time_and_key(pile: Pile) -> None:
    """Each is better than the one before it by the rule that comes first."""
    picture = hashes(1)[0]
    first, second = sorted(["1", "2"], key=lambda name: digest(f"request {name}"))
    pile.add(second, picture, sharpness=None, later_s=9)
    pile.add(first, flipped(picture, [1]), sharpness=None, later_s=9)
    pile.add("earlier", flipped(picture, [2]), sharpness=None, later_s=8)
    pile.add("sharper", flipped(picture, [3]), sharpness=1.0, later_s=20)
    pile.add("sharpest", flipped(picture, [4]), sharpness=2.0, later_s=30)
    accepted = pile.add("accepted", flipped(picture, [5]), sharpness=0.5, later_s=40)
    rejected = pile.add("rejected", flipped(picture, [6]), sharpness=900.0)
    verdicts = {accepted: "keep", rejected: "reject", digest("unknown"): "keep"}
    best_first = ["accepted", "sharpest", "sharper", "earlier", first, second, "rejected"]
    while len(best_first) > 1:
        _, rows = found(pile, verdicts=verdicts)
        assert [name for name, row in rows.items() if row["keep"]] == best_first[:1]
        gone = best_first.pop(0)
        pile.rows = [row for row in pile.rows if row["prompt_id"] != gone]


def test_clusters_are_stars_around_the_kept_one_and_do_not_chain(pile: Pile) -> None:
    picture = hashes(1)[0]
    for step in range(4):
        pile.add(f"step {step}", flipped(picture, range(20 * step)), sharpness=100.0 - step)
    _, rows = found(pile)
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
        pile = Pile(root)
        for number, picture in enumerate(hashes(20)):
            for copy in range(number % 4):
                pile.add(
                    f"{number}-{copy}",
                    flipped(picture, range(copy * 14)),
                    partition="abc"[(number + copy) % 3],
                    file=f"{number}" if copy == 2 else None,
                )
        update_near_duplicates(pile.write(order))
        files.append((root / near_duplicates_name()).read_bytes())
    assert files[0] == files[1]


# -- the table ------------------------------------------------------------------------------------


def test_tables_that_share_a_root_are_kept_apart(tmp_path: Path) -> None:
    picture = hashes(1)[0]
    for folders in ([], ["shop"]):
        pile = Pile(tmp_path, folders)
        pile.add(f"one of {folders}", picture)
        pile.add(f"two of {folders}", picture)
        pile.write()
    update_near_duplicates(Storage(str(tmp_path)), ["shop"])
    assert read_near_duplicates(Storage(str(tmp_path))) is None
    assert set(rows_of(Storage(str(tmp_path)), ["shop"])) == {"one of ['shop']", "two of ['shop']"}


def test_nothing_stored_gives_an_empty_table(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    assert update_near_duplicates(storage).copies.clusters == 0
    assert rows_of(storage) == {}


def test_a_copy_of_unknown_cost_is_counted_apart(pile: Pile) -> None:
    pile.add("first", file="x")
    pile.add("second", file="x", later_s=1, credits_charged=None)
    pile.add("third", file="x", later_s=2, credits_charged=0.9)
    figures, _ = found(pile)
    assert (figures.copies.credits, figures.copies.unpriced) == (0.9, 1)


def test_the_largest_clusters_come_first_with_what_went_into_their_copies(pile: Pile) -> None:
    small, large = hashes(2)
    for number in range(2):
        pile.add(f"small {number}", flipped(small, [number]), sharpness=9.0 - number)
    for number in range(3):
        pile.add(f"large {number}", flipped(large, [number]), sharpness=9.0 - number)
    found(pile)
    table = read_near_duplicates(pile.storage)
    assert table is not None
    shown = largest_clusters(table, 5)
    assert [(one["prompt_id"], one["purchases"], one["copies_credits"]) for one in shown] == [
        ("large 0", 3, 0.9),
        ("small 0", 2, 0.45),
    ]
    assert len(largest_clusters(table, 1)) == 1


# -- real pictures --------------------------------------------------------------------------------


def test_a_picture_that_was_compressed_anew_or_made_smaller_is_found_and_others_are_not(
    pile: Pile,
) -> None:
    """Through the hash that image_measures takes: pictures of the emulator, and changes of one."""
    pictures = {f"seed {seed}": render("a heron at dawn", seed, 512, 512) for seed in range(1, 9)}
    one = pictures["seed 3"]
    buffer = io.BytesIO()
    one.save(buffer, "JPEG", quality=40)
    pictures["compressed"] = Image.open(buffer)
    pictures["smaller"] = one.resize((400, 400))
    pictures["flat"] = Image.new("RGB", (512, 512), "teal")
    pictures["flat too"] = Image.new("RGB", (512, 512), "navy")
    for name, picture in pictures.items():
        figures = measure(picture)
        bits = np.frombuffer(figures.perceptual_hash, np.uint8)
        quality = figures.perceptual_hash_quality
        pile.add(name, bits, quality=quality, sharpness=figures.sharpness)
    figures_of_all, rows = found(pile)
    assert set(rows) == {"seed 3", "compressed", "smaller"}
    assert figures_of_all.low_quality == 2

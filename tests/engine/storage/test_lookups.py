"""How an object store is asked for images: by what is wanted, not by what it has."""

from __future__ import annotations

import numpy as np
import pytest

from krea_dagster.digests import Digests
from krea_dagster.engine.storage.lookups import digits_for, plan_lookups


def keys(count: int) -> Digests:
    return np.random.default_rng(1).integers(0, 256, (count, 32), np.uint8)


@pytest.mark.parametrize(
    ("stored", "digits"),
    [(0, 0), (1000, 0), (1001, 1), (16_000, 1), (200_000, 2), (10_000_000, 4)],
)
def test_a_listing_is_about_one_page_however_much_is_stored(stored: int, digits: int) -> None:
    assert digits_for(stored, by_prefix=True) == digits


def test_a_store_that_cannot_list_a_part_of_a_folder_lists_folders() -> None:
    assert digits_for(900, by_prefix=False) == 0
    assert digits_for(10_000_000, by_prefix=False) == 2


def test_few_images_of_many_are_asked_for_one_by_one() -> None:
    (only,) = plan_lookups(keys(100), 100_000, by_prefix=True)
    assert only.beginning is None
    assert sorted(only.places) == list(range(100))


def test_all_images_are_listed_page_by_page() -> None:
    plan = list(plan_lookups(keys(100_000), 100_000, by_prefix=True))
    assert len(plan) == 256
    assert plan[0].beginning == "00"


def test_of_a_small_store_everything_is_listed_at_once() -> None:
    (only,) = plan_lookups(keys(200), 200, by_prefix=True)
    assert only.beginning == ""
    assert len(only.places) == 200


@pytest.mark.parametrize("stored", [10, 5_000, 100_000, 3_000_000, 20_000_000])
def test_every_wanted_image_is_asked_for_exactly_once(stored: int) -> None:
    wanted = keys(3_000)
    plan = list(plan_lookups(wanted, stored, by_prefix=True))
    assert sorted(np.concatenate([one.places for one in plan])) == list(range(3_000))
    for one in plan:
        for place in one.places if one.beginning is not None else ():
            assert wanted[place].tobytes().hex().startswith(str(one.beginning))


def test_nothing_wanted_is_nothing_asked() -> None:
    assert list(plan_lookups(keys(0), 1_000_000, by_prefix=True)) == []

"""Shards: bounded, numbered without gaps, and images stay in theirs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.curation.export.shard_assignment import Numbers, place


def put(old: list[int], lost: set[int] | None = None, **bounds: Any) -> list[int]:
    sizes = np.array(bounds.pop("sizes", [1] * len(old)), np.int64)
    limits = {"most_images": 3, "most_bytes": 1_000, **bounds}
    shards = place(np.array(old, np.int64), sizes, frozenset(lost or ()), **limits)
    found: list[int] = shards.tolist()
    return found


def test_the_first_time_shards_are_filled_one_after_the_other() -> None:
    assert put([-1] * 7) == [0, 0, 0, 1, 1, 1, 2]


def test_a_shard_is_bounded_by_bytes_and_an_image_larger_than_that_is_alone() -> None:
    assert put([-1] * 5, sizes=[40, 60, 1, 500, 10], most_bytes=100) == [0, 0, 1, 2, 3]


def test_new_images_fill_the_last_shard_and_then_new_ones() -> None:
    assert put([0, 0, -1, 1, -1, -1, 0]) == [0, 0, 1, 1, 1, 2, 0]


def test_a_shard_that_has_lost_an_image_takes_a_new_one() -> None:
    assert put([0, 1, -1, 1, 1, 2, 0], lost={0}) == [0, 1, 0, 1, 1, 2, 0]


def test_an_empty_shard_takes_the_images_of_the_last() -> None:
    assert put([0, 2, 2, 3], lost={1}) == [0, 2, 2, 1]


@given(st.data())
def test_numbers_have_no_gap_and_shards_stay_within_bounds(
    data: st.DataObject,
) -> None:
    sizes = np.array(data.draw(st.lists(st.integers(0, 50), min_size=1, max_size=60)), np.int64)
    count = len(sizes)
    shards = place(np.full(count, -1), sizes, frozenset(), most_images=5, most_bytes=100)
    stays = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)), np.bool_)
    lost = frozenset(np.unique(shards[~stays]).tolist())
    old: Numbers = np.concatenate([shards[stays], np.full(9, -1)])
    sizes = np.concatenate([sizes[stays], np.full(9, 30)])
    later = place(old, sizes, lost, most_images=5, most_bytes=100)
    assert sorted(set(later.tolist())) == list(range(int(later.max()) + 1))
    for shard in range(int(later.max()) + 1):
        members = sizes[later == shard]
        assert len(members) <= 5
        assert members.sum() <= 100
    # Those that stay move only as a whole shard, into the place of one that is empty.
    for shard in set(old[old >= 0].tolist()):
        assert len(set(later[: len(old)][old == shard].tolist())) == 1
    moved = int((later[old >= 0] != old[old >= 0]).sum())
    emptied = lost - set(old.tolist())
    assert moved == 0 or emptied


def test_large_images_fill_shards_by_bytes() -> None:
    found = place(
        np.full(100_000, -1),
        np.full(100_000, 2_000_000),
        frozenset(),
        most_images=10_000,
        most_bytes=500_000_000,
    )
    assert found.max() == 100_000 // 250 - 1


@pytest.mark.parametrize("old", [[], [0], [0, 0, 1]])
def test_without_new_images_nothing_moves(old: list[int]) -> None:
    assert put(old) == old

"""Multi-index hashing finds exactly what comparing all pairs finds."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from krea_dagster.curation.similarity.multi_index_hash import MOST_BITS, find_stars
from tests.curation.similarity.similar_images import flipped, hashes


def all_pairs(given: npt.NDArray[np.uint8], most_bits: int) -> list[int]:
    """Return the stars by comparing every pair."""
    bits = np.unpackbits(given, axis=1)
    centre = list(range(len(given)))
    taken: set[int] = set()
    for one in range(len(given)):
        if one in taken:
            continue
        near = np.flatnonzero((bits[one + 1 :] != bits[one]).sum(axis=1) <= most_bits) + one + 1
        for other in near.tolist():
            if other not in taken:
                taken.add(other)
                centre[other] = one
    return centre


def crowd(count: int, families: int, most_flips: int, seed: int) -> npt.NDArray[np.uint8]:
    """Return hashes of some families, which differ in up to ``most_flips`` bits from the first."""
    drawn = np.random.default_rng(seed)
    first = hashes(families, seed)
    return np.array(
        [
            flipped(
                first[drawn.integers(families)],
                drawn.choice(256, drawn.integers(most_flips + 1), replace=False).tolist(),
            )
            for _ in range(count)
        ]
    )


@pytest.mark.parametrize("most_bits", [0, 1, 7, 15, 16, 23, 31, 32, MOST_BITS])
def test_it_finds_the_same_as_comparing_all_pairs(most_bits: int) -> None:
    given = crowd(1200, 90, most_bits + 4, seed=most_bits)
    found = find_stars(given, most_bits)
    assert found.centre.tolist() == all_pairs(given, most_bits)
    assert (found.centre != np.arange(len(given))).sum() > 100, "the test has something to find"
    bits = np.unpackbits(given, axis=1)
    assert found.distance.tolist() == (bits != bits[found.centre]).sum(axis=1).tolist()


@pytest.mark.parametrize("seed", range(12))
def test_a_pair_at_the_limit_is_found_wherever_its_bits_lie(seed: int) -> None:
    """Also two in each piece but one, or all side by side: no pair slips between the pieces."""
    drawn = np.random.default_rng(seed)
    given = hashes(400, seed)
    choices = [
        drawn.choice(256, 31, replace=False),
        np.arange(31) + drawn.integers(225),
        (np.arange(31) * 17 + drawn.integers(256)) % 256,
        (np.arange(31) * 16 + np.arange(31) // 16 + drawn.integers(256)) % 256,
    ]
    for at, places in enumerate(choices):
        given[100 + at] = flipped(given[at], places.tolist())
        one_more = int(np.setdiff1d(np.arange(256), places)[0])
        given[200 + at] = flipped(given[at], [*places.tolist(), one_more])
    found = find_stars(given, 31)
    assert found.centre[100:104].tolist() == [0, 1, 2, 3]
    assert found.distance[100:104].tolist() == [31] * 4
    # Of the copies they differ in one bit, but those belong to the originals already.
    assert found.centre[200:204].tolist() == [200, 201, 202, 203]


def test_stars_do_not_chain() -> None:
    (first,) = hashes(1)
    chain = np.array([flipped(first, range(20 * step)) for step in range(6)])
    assert find_stars(chain, 31).centre.tolist() == [0, 0, 2, 2, 4, 4]


def test_very_many_similar_hashes_take_bounded_memory() -> None:
    """9,000 hashes that are near each other make 40 million pairs, of which few are kept."""
    given = np.repeat(hashes(1), 9000, axis=0)
    rows = np.arange(len(given))
    for turn in range(3):
        given[rows, (rows * 7 + turn) % 32] ^= (1 << (rows + turn) % 8).astype(np.uint8)
    found = find_stars(given, 31)
    assert (found.centre == 0).all()
    assert found.distance.max() <= 6


def test_no_hash_and_a_single_hash_have_no_neighbours() -> None:
    assert find_stars(hashes(0), 31).centre.tolist() == []
    assert find_stars(hashes(1), 31).centre.tolist() == [0]


def test_the_number_of_threads_changes_nothing() -> None:
    given = crowd(3000, 200, 34, seed=5)
    one, two = (find_stars(given, 31, threads=threads) for threads in (1, 2))
    assert one.centre.tolist() == two.centre.tolist()
    assert one.pairs == two.pairs


def test_only_a_small_share_of_the_pairs_is_compared() -> None:
    given = hashes(20_000)
    assert find_stars(given, 31).pairs < len(given) ** 2 / 2 / 100


@pytest.mark.parametrize("most_bits", [-1, MOST_BITS + 1])
def test_a_limit_out_of_range_is_rejected(most_bits: int) -> None:
    with pytest.raises(ValueError, match="most_bits must be 0 to 47"):
        find_stars(hashes(2), most_bits)

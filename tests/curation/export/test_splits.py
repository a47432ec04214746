"""Splits: equal prompts stay together, nothing moves as the table grows, and nothing leaks."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.curation.export.splits import (
    leaking,
    normal,
    parse_splits,
    split_numbers,
)
from krea_dagster.errors import ConfigError


def numbers(texts: list[str], *splits: str) -> list[int]:
    prompts = pa.chunked_array([pa.array(texts, pa.string())])
    found: list[int] = split_numbers(prompts, parse_splits(splits)).tolist()
    return found


def test_each_split_has_about_its_share_of_the_prompts() -> None:
    found = numbers([f"prompt {n}" for n in range(20_000)], "train=0.8", "val=0.15", "test=0.05")
    shares = np.bincount(found) / 20_000
    assert shares == pytest.approx([0.8, 0.15, 0.05], abs=0.01)


@given(st.lists(st.text(max_size=20), min_size=1, max_size=30), st.lists(st.text(max_size=20)))
def test_no_prompt_moves_when_rows_are_added_or_reordered(
    texts: list[str], more: list[str]
) -> None:
    alone = numbers(texts, "train=0.5", "test=0.5")
    grown = numbers([*reversed(more), *texts], "train=0.5", "test=0.5")
    assert grown[len(more) :] == alone


def test_a_split_that_is_added_at_the_end_takes_only_from_the_one_before_it() -> None:
    texts = [f"prompt {n}" for n in range(2_000)]
    two = numbers(texts, "train=0.8", "test=0.2")
    three = numbers(texts, "train=0.8", "test=0.1", "holdout=0.1")
    assert [min(one, 1) for one in three] == two


@pytest.mark.parametrize("same", ["A  red\tcat", "a red cat ", "A RED CAT", "ａ red cat"], ids=repr)
def test_case_spaces_and_unicode_forms_do_not_change_the_split(same: str) -> None:
    assert normal(same) == normal("a red cat") == "a red cat"


def test_the_hash_of_splits_never_changes() -> None:
    """Published datasets depend on it: a change of the hash would move their images."""
    texts = ["a harbor at dawn", "straße", "", *(f"prompt {n}" for n in range(12))]
    found = "".join("abc"[n] for n in numbers(texts, "a=0.5", "b=0.3", "c=0.2"))
    assert found == "aaababcaabcaaba"


def test_the_last_split_keeps_its_similar_images() -> None:
    splits = np.array([0, 1, 0, 0, 2, 1])
    alike = np.array([7, 7, 3, 3, 1, 1])
    assert leaking(splits, alike).tolist() == [True, False, False, False, False, True]


def test_growth_of_the_first_split_takes_nothing_from_those_held_out() -> None:
    random = np.random.default_rng(4)
    splits, alike = random.integers(0, 3, 500), random.integers(0, 200, 500)
    before = leaking(splits, alike)
    grown = leaking(np.append(splits, [0] * 99), np.append(alike, random.integers(0, 200, 99)))
    assert (grown[:500] == before).all()


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["train=0.9"], "sum to 0.9 instead of 1"),
        (["train=0.9", "test=0.2"], "sum to 1.1"),
        (["train"], "not NAME=SHARE"),
        (["train=nan"], "not NAME=SHARE"),
        (["train=-1", "test=2"], "not NAME=SHARE"),
        (["train/x=1"], "invalid split name"),
        (["all=1"], "and not 'all'"),
        (["train=0.5", "Train=0.5"], "duplicate split"),
    ],
    ids=str,
)
def test_an_invalid_split_is_rejected(texts: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        parse_splits(texts)


def test_shares_are_exact_decimals() -> None:
    assert len(parse_splits(["a=0.1", "b=0.2", "c=0.7"])) == 3

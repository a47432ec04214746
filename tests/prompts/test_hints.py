"""What a wrong cell probably means is said with it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.errors import PromptTableError
from krea_dagster.models import PIXELS, SEED_MAX
from krea_dagster.prompts import PromptTable
from krea_dagster.prompts.hints import quality_hint, seeds_hint, size_hint

Open = Callable[..., PromptTable]


@pytest.mark.parametrize(
    ("size", "hint"),
    [
        ("1024x1024", "1024x1024 is 1:1"),
        ("1920 × 1080", "1920 × 1080 is 16:9"),
        ("1344*768", "the nearest is 16:9"),
        ("21:9", "the nearest is 2:1"),
        (" 3:4", "3:4 is 3:4"),
        ("0x5", ""),
        ("square", ""),
        (None, ""),
    ],
)
def test_a_width_and_a_height_have_a_nearest_size(size: object, hint: str) -> None:
    assert size_hint(size) == hint


def test_the_pixels_of_a_size_lead_to_a_size_of_the_same_pixels() -> None:
    for (_, quality), (width, height) in PIXELS.items():
        found = size_hint(f"{width}x{height}").rpartition(" ")[2]
        assert PIXELS[found, quality] == (width, height)


def test_a_quality_in_another_case_is_said() -> None:
    assert [quality_hint(text) for text in ("1k", " 2K", "HD", 2)] == [
        "write 1K",
        "write 2K",
        "",
        "",
    ]


def test_the_hint_is_a_part_of_the_problem(open_table: Open) -> None:
    with pytest.raises(PromptTableError) as caught:
        open_table({"prompt": ["a"], "size": ["1024x768"], "quality": ["1k"]}).plan()
    said = str(caught.value)
    assert "size is '1024x768'; must be one of" in said
    assert "; 1024x768 is 4:3" in said
    assert "quality is '1k'; must be one of 1K, 2K; write 1K" in said


def test_seeds_of_32_bits_get_a_remainder_that_keeps_them_different(open_table: Open) -> None:
    seeds = [4294967295, 7, 1048583]
    with pytest.raises(PromptTableError) as caught:
        open_table({"prompt": ["a", "b", "c"], "seed": seeds}).plan()
    (hint,) = caught.value.hints
    assert "(seed - 1) % 1048575 + 1 is in the range for all of these 3 seeds" in hint
    assert f"  hint: {hint}" in str(caught.value)


@given(st.sets(st.integers(1, 2**64 - 1), min_size=1, max_size=300))
def test_the_remainders_are_in_the_range_and_different(seeds: set[int]) -> None:
    hint = seeds_hint(seeds)
    if max(seeds) <= SEED_MAX:
        assert not hint
    elif "%" in hint:
        modulus = int(hint.partition("% ")[2].partition(" ")[0])
        small = {(seed - 1) % modulus + 1 for seed in seeds}
        assert len(small) == len(seeds)
        assert min(small) >= 1
        assert max(small) <= SEED_MAX


def test_more_seeds_than_there_are_in_the_range_have_no_remainder() -> None:
    assert "no remainder keeps these 1,048,577 seeds different" in seeds_hint(
        range(1, SEED_MAX + 2)
    )

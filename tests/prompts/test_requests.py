"""Identity, seeds and the plan: a row's requests are the same on every machine and forever."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.errors import ConfigError, InputError
from krea_dagster.models import QUALITIES, SIZES
from krea_dagster.prompts import Defaults, drawn_seed, request_key
from tests.prompts.reference import (
    PromptRow,
    derived_prompt_id,
    partition_version,
    plan_images,
    seed_for,
)

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60)
SEEDS = st.none() | st.integers(1, 1_048_576)
ROWS = st.builds(
    PromptRow,
    row=st.integers(1, 10**9),
    prompt_id=TEXTS,
    prompt=TEXTS,
    size=st.sampled_from(SIZES),
    quality=st.sampled_from(QUALITIES),
    seed=SEEDS,
    nsfw_check=st.booleans(),
    num_images=st.integers(1, 5),
    partition_key=st.just("a"),
)


def row(**changes: object) -> PromptRow:
    values: dict[str, object] = {
        "row": 1,
        "prompt_id": "harbor-dawn-01",
        "prompt": "a red kite",
        "size": "1:1",
        "quality": "1K",
        "seed": None,
        "nsfw_check": False,
        "num_images": 1,
        "partition_key": "bucket-000",
    }
    return PromptRow(**(values | changes))  # type: ignore[arg-type]  # a table of defaults


# -- the formulas, pinned: these values were made with printf and sha256sum --------------------


def test_the_request_key_is_the_pinned_hash_of_what_decides_the_image() -> None:
    key = request_key(
        prompt="a red kite over a green hill", size="16:9", quality="1K", seed=42, nsfw_check=False
    )
    assert key == "782aa0fc08a6733455bbe89c7ecbae98a0b3c05469f86c2dae971ebec0f5eae1"
    key = request_key(
        prompt="雪の朝 – café", size="1:1", quality="2K", seed=1_048_576, nsfw_check=True, attempt=3
    )
    assert key == "d212cf66ab505505ff99dbfc9eb6c1402a68f283e8228903d093f43174e71009"


def test_the_drawn_seed_is_the_pinned_hash_of_prompt_id_sample_and_attempt() -> None:
    assert drawn_seed("harbor-dawn-01") == 929_724
    assert drawn_seed("harbor-dawn-01", sample=1) == 992_837
    assert drawn_seed("harbor-dawn-01", attempt=1) == 542_541
    assert drawn_seed("雪") == 879_103


def test_the_derived_prompt_id_is_the_pinned_hash_of_the_rows_content() -> None:
    plain = derived_prompt_id(
        prompt="a red kite", size="1:1", quality="1K", seed=None, nsfw_check=False
    )
    assert plain == "p-457fa5deab7b641c"
    other = derived_prompt_id(
        prompt="a red kite", size="16:9", quality="2K", seed=7, nsfw_check=True
    )
    assert other == "p-25993f78dd42580d"


def test_the_partition_version_is_the_pinned_hash_of_the_sorted_keys() -> None:
    assert partition_version([]) == "77fe539b87ee02b6"
    assert partition_version(["a" * 64, "1" * 64]) == "2540aa427239bde0"


# -- identity -----------------------------------------------------------------------------------

CHANGES: list[dict[str, object]] = [
    {"prompt": "b"},
    {"size": "4:3"},
    {"quality": "2K"},
    {"seed": 2},
    {"nsfw_check": True},
    {"attempt": 1},
    {"model": "another"},
]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: next(iter(change)))
def test_each_thing_that_decides_the_image_changes_the_key(change: dict[str, object]) -> None:
    values: dict[str, object] = {
        "prompt": "a",
        "size": "1:1",
        "quality": "1K",
        "seed": 1,
        "nsfw_check": False,
    }
    assert request_key(**values) != request_key(**(values | change))  # type: ignore[arg-type]


@given(TEXTS, TEXTS)
def test_a_separator_inside_the_prompt_imitates_no_other_request(left: str, right: str) -> None:
    def key(prompt: str, attempt: int) -> str:
        return request_key(
            prompt=prompt, size="1:1", quality="1K", seed=1, nsfw_check=False, attempt=attempt
        )

    assert key(f"{left}\x1f{right}", 0) != key(right, 0)
    assert key(f"0\x1f{left}", 0) != key(left, 0)
    assert key(f"1\x1f{left}", 0) != key(left, 1)


def test_text_without_a_utf8_form_is_a_clear_error_that_does_not_print_it_raw() -> None:
    with pytest.raises(InputError, match=r"'\\ud800' has no UTF-8 form") as caught:
        request_key(prompt="a \ud800", size="1:1", quality="1K", seed=1, nsfw_check=False)
    assert str(caught.value).isascii()
    with pytest.raises(InputError):
        drawn_seed("\udfff")


# -- seeds --------------------------------------------------------------------------------------


@given(TEXTS, st.integers(0, 99), st.integers(0, 1000))
def test_a_drawn_seed_can_be_asked_for_and_is_never_0(
    prompt_id: str, sample: int, attempt: int
) -> None:
    assert 1 <= drawn_seed(prompt_id, sample, attempt) <= 1_048_576


def test_drawn_seeds_use_the_whole_range_evenly() -> None:
    seeds = [drawn_seed(f"row-{number}") for number in range(4000)]
    by_quarter = [0] * 4
    for seed in seeds:
        by_quarter[(seed - 1) * 4 // 1_048_576] += 1
    assert min(by_quarter) > 900


@given(st.integers(1, 1_048_576), st.integers(0, 5))
def test_an_explicit_seed_is_used_unchanged_at_every_attempt(seed: int, attempt: int) -> None:
    assert seed_for(seed, "a", 0, attempt) == seed


@given(st.integers(1, 1_048_576))
def test_samples_of_an_explicit_seed_take_the_next_seeds_and_stay_in_range(seed: int) -> None:
    seeds = [seed_for(seed, "a", sample) for sample in range(100)]
    assert len(set(seeds)) == 100
    assert all(1 <= each <= 1_048_576 for each in seeds)


def test_after_the_highest_seed_comes_1() -> None:
    assert [seed_for(1_048_575, "a", sample) for sample in range(3)] == [1_048_575, 1_048_576, 1]


# -- the plan -----------------------------------------------------------------------------------


def test_a_row_asks_for_each_of_its_samples_with_a_seed_of_its_own() -> None:
    images = list(plan_images([row(num_images=3, partition_key="k")]))
    assert [image.sample for image in images] == [0, 1, 2]
    assert {(image.prompt_id, image.partition_key) for image in images} == {("harbor-dawn-01", "k")}
    assert [image.request.seed for image in images] == [
        drawn_seed("harbor-dawn-01", sample) for sample in range(3)
    ]
    assert len({image.request.request_key for image in images}) == 3
    assert images[0].request.pixels == (1024, 1024)


def test_a_key_in_the_plan_is_the_key_of_its_request() -> None:
    raised = {("harbor-dawn-01", 0): 2}
    (image,) = plan_images([row(seed=5, size="2:1", quality="2K", nsfw_check=True)], raised)
    request = image.request
    assert (request.size, request.quality, request.seed) == ("2:1", "2K", 5)
    assert (request.nsfw_check, request.attempt, request.model) == (True, 2, "krea-2-turbo")
    assert request.request_key == request_key(
        prompt="a red kite", size="2:1", quality="2K", seed=5, nsfw_check=True, attempt=2
    )


def test_a_raised_attempt_requests_another_image_of_that_sample_only() -> None:
    rows = [row(num_images=2)]
    before = [image.request for image in plan_images(rows)]
    after = [image.request for image in plan_images(rows, {("harbor-dawn-01", 1): 1})]
    assert after[0] == before[0]
    assert after[1].attempt == 1
    assert after[1].seed == drawn_seed("harbor-dawn-01", 1, 1) != before[1].seed
    assert after[1].request_key != before[1].request_key


def test_two_rows_that_ask_for_the_same_thing_share_the_request() -> None:
    first, second = plan_images([row(seed=9), row(seed=9, prompt_id="other", row=2)])
    assert first.request == second.request


@given(st.lists(ROWS, max_size=8), st.randoms(use_true_random=False))
def test_order_and_partition_of_the_rows_change_no_request(
    rows: list[PromptRow], chance: random.Random
) -> None:
    moved = [
        PromptRow(
            number,
            old.prompt_id,
            old.prompt,
            old.size,
            old.quality,
            old.seed,
            old.nsfw_check,
            old.num_images,
            f"p{chance.randrange(3)}",
        )
        for number, old in enumerate(chance.sample(rows, len(rows)), 1)
    ]

    def requests(of: list[PromptRow]) -> list[tuple[str, int, str]]:
        return sorted(
            (image.prompt_id, image.sample, image.request.request_key) for image in plan_images(of)
        )

    assert requests(rows) == requests(moved)


KEYS = st.lists(st.integers(0, 5).map(lambda number: f"{number:064x}"), max_size=6)


@given(KEYS, KEYS)
def test_a_version_is_that_of_the_keys_as_a_multiset(left: list[str], right: list[str]) -> None:
    same = sorted(left) == sorted(right)
    assert (partition_version(left) == partition_version(right)) is same


# -- defaults -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"size": "7:1"}, "size is '7:1'"),
        ({"quality": "4K"}, "quality is '4K'"),
        ({"num_images": 0}, "from 1 to 100"),
        ({"num_images": 101}, "from 1 to 100"),
        ({"num_images": True}, "num_images is True"),
        ({"nsfw_check": "no"}, "nsfw_check is 'no'"),
    ],
)
def test_a_default_that_evolink_does_not_take_is_refused_at_once(
    wrong: dict[str, object], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        Defaults(**wrong)  # type: ignore[arg-type]  # wrong on purpose

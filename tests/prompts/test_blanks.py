"""Prompts of invisible characters, and prompts that differ only by blanks."""

from __future__ import annotations

from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.errors import Problem
from krea_dagster.prompts import PromptTable
from krea_dagster.prompts.blanks import are_invisible, blanks_note, is_invisible

Open = Callable[..., PromptTable]
Problems = Callable[..., list[Problem]]

CHARACTERS = st.sampled_from(
    ["a", "狐", " ", "\n", "\u3000", "\u200b", "\ufeff", "\ufe0f", "\u00ad"]
)


@pytest.mark.parametrize("prompt", ["\u200b", "\ufeff \u2060", "\u3164", "\u2800\n"])
def test_a_prompt_that_nobody_can_see_is_a_problem(prompt: str, problems: Problems) -> None:
    (problem,) = problems({"prompt": ["a fox", prompt]})
    assert (problem.row, problem.column) == (2, "prompt")
    assert problem.allowed == "must be text, and not only white space or invisible characters"


@given(st.lists(st.text(CHARACTERS, max_size=4), max_size=4))
def test_a_column_and_a_cell_are_told_in_the_same_way(prompts: list[str]) -> None:
    found = are_invisible(pa.array(prompts, pa.string())).to_pylist()
    assert found == [is_invisible(prompt) for prompt in prompts]


def test_prompts_that_differ_only_by_blanks_are_said_with_their_rows(open_table: Open) -> None:
    prompts = [
        "a red fox",
        "a hare",
        "a red  fox",
        "a hare",
        "\u200ba hare",
        " a red fox",
        "a\u00a0hare",
    ]
    with open_table({"prompt": prompts}).plan() as plan:
        (note,) = plan.notes
    assert note == (
        "4 prompts differ from another only by blanks or invisible characters, and each is an "
        "image of its own: row 3 from row 1, row 5 from row 2, row 6 from row 1, row 7 from row 2"
    )


def test_prompts_that_are_the_same_or_say_more_are_not_said(open_table: Open) -> None:
    prompts = [" a fox", " a fox", "a hare ", "ahare", "an astronaut 👩\u200d🚀"]
    with open_table({"prompt": prompts}).plan() as plan:
        assert plan.notes == ()


def test_only_the_first_rows_are_named() -> None:
    assert blanks_note([(row, 1) for row in range(2, 10)]).endswith("row 6 from row 1 and 3 more")

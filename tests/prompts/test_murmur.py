"""The hash of prompt_ids: its pinned values, and the same for a column as for one text."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from krea_dagster.prompts.murmur import hashes_of_texts
from tests.prompts.reference import hash_of_text

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("", 0),
        ("a", 510903276987443985),
        ("seven b", 12823581393688157122),
        ("eight by", 1054536267013781730),
        ("harbor-dawn-01", 17199580388396520558),
        ("sixteen bytes 🌊", 18095869374180656397),
        ("harbor-dawn-01" * 20, 5921776484701847194),
    ],
)
def test_a_text_has_the_number_that_libstdcxx_gives_it(text: str, number: int) -> None:
    """Made with its ``_Hash_bytes``, which is the same function, and the seed 0."""
    assert hash_of_text(text) == number


@given(st.lists(TEXTS | st.none(), max_size=30))
@example(["", None, ""])
@example(["row-01", "row-02", "row-03"])
@example(["row-0001", "row-0002", "row-0003"])
@example(["row-00000001", "row-00000002"])
def test_a_column_has_the_numbers_of_its_texts_and_a_null_that_of_no_text(
    texts: list[str | None],
) -> None:
    # Cut out of a larger column, as batches are.
    column = pa.array(["before", *texts, "after"], pa.string()).slice(1, len(texts))
    assert hashes_of_texts(column).tolist() == [hash_of_text(text or "") for text in texts]

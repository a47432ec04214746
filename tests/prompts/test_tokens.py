"""The estimate of tokens: upward, bounded, and never far below a tokenizer's count.

Counts that are certain are used as facts: a common English word is one token of every such
tokenizer, with the space before it; so is a comma or a full stop; and no byte-level tokenizer
counts more tokens than there are bytes.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.prompts import MAX_TOKENS, WARN_TOKENS, estimate_tokens


def test_the_limits_are_those_of_evolink_and_of_the_open_model() -> None:
    assert (WARN_TOKENS, MAX_TOKENS) == (500, 640)


@pytest.mark.parametrize("word", ["a", "the", "cat", "tree", "blue", "on"])
def test_a_short_common_word_is_one_token(word: str) -> None:
    assert estimate_tokens(word) == 1
    assert estimate_tokens(f"{word} {word}") == 2


@pytest.mark.parametrize(
    ("text", "counted"),
    [
        ("", 0),
        ("lighthouse", 3),
        ("The Blue House", 4),
        ("NEON", 2),
        ("a, b.", 4),
        ("2026", 4),
        ("f 1.8", 5),
        ("a  b", 3),
        ("a\n\nb", 4),
        ("a\tb", 3),
        ("café", 2),
        ("雪の朝", 3),
        ("नमस्ते", 12),
        ("🦊", 3),
        ("\ud800", 2),
    ],
)
def test_the_rule_is_the_one_that_is_written_down(text: str, counted: int) -> None:
    assert estimate_tokens(text) == counted


# Counted with the vocabulary of GPT-2.
KNOWN = [
    ("a photograph of a lighthouse above a quiet harbor", 9),
    ("A red fox asleep on stone stairs, ivy, soft morning light", 14),
    ("Bees over a meadow of clover and cornflowers, one bee in sharp focus, bright noon", 22),
    ("A potter's hands shaping a tall vase on the wheel, wet clay, dark apron, side light", 23),
]


@pytest.mark.parametrize(("text", "tokens"), KNOWN)
def test_known_counts_are_not_undercounted(text: str, tokens: int) -> None:
    assert estimate_tokens(text) >= 0.95 * tokens


def test_short_rare_words_are_the_stated_limit() -> None:
    """GPT-2 counts 10: "lynx", "gnu" and "yak" are two or three tokens each."""
    assert estimate_tokens("a lynx, a gnu and a yak") == 8


@given(
    st.lists(
        st.sampled_from(["the", "of", "a", "in", "with", "light", "water", "house", "morning"])
    )
)
def test_plain_words_count_at_least_one_token_each(words: list[str]) -> None:
    """Each is one token of GPT-2 and its successors, the space before it included."""
    assert estimate_tokens(" ".join(words)) >= len(words)


@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=200))
def test_the_estimate_is_never_above_the_number_of_bytes(text: str) -> None:
    assert 0 <= estimate_tokens(text) <= len(text.encode())


@given(st.text(max_size=80), st.text(max_size=80))
def test_a_prompt_grows_no_shorter_by_a_further_sentence(first: str, second: str) -> None:
    assert estimate_tokens(f"{first}. {second}") >= max(
        estimate_tokens(first), estimate_tokens(second)
    )

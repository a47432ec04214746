"""Estimate how many tokens a prompt has, without a tokenizer.

EvoLink takes at most 640 tokens and does not document the tokenizer. The open Krea 2 model uses
the byte-level BPE of Qwen3-VL, conditions on about 500 tokens, and returns black images from about
640. A tokenizer would be a large dependency for a limit that few prompts reach, so this is a rule;
a real counter can be passed as ``count_tokens``.
"""

from __future__ import annotations

import re
from typing import Final

import pyarrow as pa
import pyarrow.compute as pc

#: EvoLink's limit. A longer prompt is refused before anything is bought.
MAX_TOKENS: Final = 640

#: Tokens that the open model conditions on, rounded down. A longer prompt is a warning.
WARN_TOKENS: Final = 500

_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+")
# A single space belongs to the token of the following word or mark. Before a digit and at the end
# it is a token, and so are all but the last of several spaces.
_LONE_SPACE = re.compile(r"\s(?=[\s\d]|$)|[\r\n\t\f\v]")
_MARKS_AND_DIGITS = bytes(
    code for code in range(0x80) if not (chr(code).isalpha() or chr(code).isspace())
)
_NOT_ASCII = re.compile(r"[^\x00-\x7f]")
# Scripts for which such tokenizers have a token for nearly every character.
_EAST_ASIAN = re.compile(r"[\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff\uff00-\uffef]")


def estimate_tokens(prompt: str) -> int:
    """Return an estimate of the prompt's tokens that errs upward.

    A word is one token for every four letters begun, or every two in capitals. A digit or a
    punctuation mark is one; spaces between words are free. An accented, Greek, Cyrillic, Hebrew,
    Arabic or East Asian character is one, other characters are two or three.

    For plain English of 20 words and more it is at least 0.95 of the count of a byte-level BPE like
    those of GPT and Qwen. Measured with GPT-2's vocabulary on 147 English prompts of 20 to 70 words
    it is 1.0 to 1.6 times the count, for half of them above 1.3; on texts of some 300 tokens 1.2 to
    1.4 times. It never exceeds the number of UTF-8 bytes, as such tokenizers do not either. A short
    rare word ("lynx") counts as one token and may be two or three; invented words, and scripts
    other than Latin, can be undercounted.
    """
    count = 0
    for word in _WORD.findall(prompt):
        letters = len(word)
        count += (letters + 1) // 2 if letters > 1 and word.isupper() else (letters + 3) // 4
    data = prompt.encode("utf-8", "surrogatepass")
    count += len(data) - len(data.translate(None, _MARKS_AND_DIGITS))
    count += len(_LONE_SPACE.findall(prompt))
    if not prompt.isascii():
        for character in _NOT_ASCII.findall(prompt):
            if character < "\u0800" or _EAST_ASIAN.match(character):
                count += 1
            else:
                count += 2 if character <= "\uffff" else 3
    return count


def at_most_tokens(prompts: pa.Array) -> pa.Array:
    """Return an upper bound of the estimate for a column of prompts.

    Up to four lower-case letters with the space before them count as one, and every other byte as
    one. Few prompts under the limit then need to be counted one by one.
    """
    letters = pc.replace_substring_regex(prompts, pattern=" ?[a-z]{1,4}", replacement="a")
    return pc.binary_length(letters)

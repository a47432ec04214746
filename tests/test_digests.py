"""Sets of digests, held against Python's own."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from krea_dagster.digests import Digests, DigestSet, first_of_each

KEYS = st.lists(st.binary(min_size=32, max_size=32), max_size=20)


@given(KEYS, KEYS)
def test_a_set_of_keys_finds_what_is_in_it(inside: list[bytes], others: list[bytes]) -> None:
    """Also where keys agree in their first eight bytes, which is what they are sorted by."""
    begun = [key[:8] + bytes(24) for key in inside]
    wanted = [*inside, *others, *begun]
    held = DigestSet(packed(inside), np.arange(len(inside)))
    firsts = [key[:8] for key in inside]
    for key, place in zip(wanted, held.find(packed(wanted)).tolist(), strict=True):
        if place >= 0:
            assert inside[held.values[place]] == key
        else:
            assert key not in inside or firsts.count(key[:8]) > 1


@given(st.lists(st.sampled_from([b"a" * 32, b"a" * 31 + b"b", b"b" * 32, bytes(32)]), max_size=20))
def test_the_first_of_each_kind_and_their_number(keys: list[bytes]) -> None:
    first, counts = first_of_each(packed(keys))
    assert first.tolist() == [key not in keys[:at] for at, key in enumerate(keys)]
    assert counts.tolist() == [keys.count(key) for key in keys]


def packed(keys: list[bytes]) -> Digests:
    return np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)

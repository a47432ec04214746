"""A plan, made of whole columns, is image for image that of the reference."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from krea_dagster.digests import digests_from_hex, digests_from_joined_hex
from krea_dagster.models import SIZES
from krea_dagster.prompts import (
    HashPartitions,
    PlannedImage,
    PromptTable,
    estimate_tokens,
    parse_partition_by,
)
from krea_dagster.prompts import spool as spool_module
from krea_dagster.prompts.blanks import are_invisible
from krea_dagster.prompts.identity import buckets, sha256
from krea_dagster.prompts.identity import partition_version as version_of_digests
from krea_dagster.prompts.murmur import hashes_of_texts
from krea_dagster.prompts.tokens import at_most_tokens
from tests.prompts.reference import key_for, partition_version, plan_images, read_rows

Open = Callable[..., PromptTable]

#: Text as people write it and as it hurts: quotes, newlines, separators, other planes.
TEXTS = st.one_of(
    st.sampled_from(["'", '"', "\\", "\n", "\x1f", "a\x1f0\x1fb", "\u2028", "é", "e\u0301", "🦊"]),
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30),
)
ROW = st.fixed_dictionaries(
    {
        "prompt": TEXTS.filter(lambda text: bool(text.strip())),
        "size": st.sampled_from([None, *SIZES]),
        "quality": st.sampled_from([None, "1K", "2K"]),
        "seed": st.one_of(st.none(), st.sampled_from([0, 1, 1_048_575, 1_048_576])),
        "nsfw_check": st.sampled_from([None, False, True]),
        "num_images": st.one_of(st.none(), st.sampled_from([1, 2, 100])),
        "prompt_id": TEXTS.filter(bool),
    }
)
KINDS = {
    "prompt": pa.string(),
    "size": pa.string(),
    "quality": pa.string(),
    "seed": pa.int64(),
    "nsfw_check": pa.bool_(),
    "num_images": pa.int16(),
    "prompt_id": pa.string(),
}


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(ROW, min_size=1, max_size=6, unique_by=lambda row: row["prompt_id"]),
    st.booleans(),
    st.dictionaries(st.tuples(st.integers(0, 5), st.integers(0, 3)), st.integers(1, 3)),
)
def test_keys_seeds_ids_and_versions_are_those_of_the_definition(
    tmp_path: Path, rows: list[dict[str, Any]], with_ids: bool, raised: dict[tuple[int, int], int]
) -> None:
    kinds = {name: kind for name, kind in KINDS.items() if with_ids or name != "prompt_id"}
    path = tmp_path / "prompts.parquet"
    given_rows = [{name: row[name] for name in kinds} for row in rows]
    pq.write_table(pa.Table.from_pylist(given_rows, pa.schema(kinds.items())), path)
    table = PromptTable(str(path), parse_partition_by("hash:3"))
    defined = read_rows(table).rows
    attempts = {
        (defined[number % len(defined)].prompt_id, sample): attempt
        for (number, sample), attempt in raised.items()
    }
    with table.plan(attempts=attempts) as plan:
        expected = list(plan_images(defined, attempts))
        assert len(plan.all_digests) == len(expected)
        by_key: dict[str, list[PlannedImage]] = {key: [] for key in plan.keys}
        for image in expected:
            by_key[image.partition_key].append(image)
        assert plan.keys == HashPartitions(3).keys()
        for key, images in by_key.items():
            found = pa.Table.from_batches(plan.batches(key)) if images else None
            assert (found.to_pylist() if found else []) == [planned(image) for image in images]
            assert plan.digests(key).tobytes().hex() == "".join(
                image.request.request_key for image in images
            )
        assert plan.versions() == {
            key: partition_version(image.request.request_key for image in images)
            for key, images in by_key.items()
        }
        assert list(
            plan.requests({key: np.ones(len(plan.digests(key)), bool) for key in by_key})
        ) == [(image.request, key) for key, images in by_key.items() for image in images]
    for row in defined:
        assert row.partition_key == key_for(HashPartitions(3), row.prompt_id)


def planned(image: PlannedImage) -> dict[str, Any]:
    request = image.request
    return {
        "prompt_id": image.prompt_id,
        "sample": image.sample,
        "prompt": request.prompt,
        "size": request.size,
        "quality": request.quality,
        "seed": request.seed,
        "nsfw_check": request.nsfw_check,
        "attempt": request.attempt,
        "request_key": request.request_key,
        "partition_key": image.partition_key,
    }


@settings(deadline=None)
@given(st.lists(TEXTS, min_size=1, max_size=20))
def test_hashes_are_those_of_the_standard_library(texts: list[str]) -> None:
    # Cut out of a larger column, as batches are.
    column = pa.array(["before", *texts, "after"], pa.string()).slice(1, len(texts))
    numbers = buckets(HashPartitions(7), hashes_of_texts(column))
    names = [HashPartitions(7).keys()[at] for at in numbers]
    assert names == [key_for(HashPartitions(7), text) for text in texts]
    digests = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
    assert sha256(column).tobytes().hex() == "".join(digests)
    found = pa.array(digests)
    assert digests_from_hex(found.slice(1)).tobytes().hex() == "".join(digests[1:])
    assert digests_from_joined_hex("".join(digests)).tobytes().hex() == "".join(digests)


@given(
    st.lists(st.binary(min_size=32, max_size=32), max_size=30), st.binary(min_size=8, max_size=8)
)
def test_a_version_of_bytes_is_that_of_the_keys_also_where_keys_begin_with_the_same_bytes(
    keys: list[bytes], begin: bytes
) -> None:
    keys += [begin + key[8:] for key in keys]
    digests = np.frombuffer(b"".join(keys), np.uint8).reshape(-1, 32)
    assert version_of_digests(digests) == partition_version(key.hex() for key in keys)


def test_a_prompt_of_any_white_space_is_looked_at_closely() -> None:
    """What Python strips must never pass for a prompt because Arrow knows less white space."""
    blank = [chr(code) for code in range(sys.maxunicode + 1) if chr(code).isspace()]
    assert len(blank) > 20
    prompts = pa.array([*blank, *(f" {space}\n" for space in blank)], pa.string())
    assert pc.all(are_invisible(prompts)).as_py()


@given(st.one_of(TEXTS, st.from_regex(r"([A-Z]?[a-z]+|[A-Z]+|[0-9 ,.é]+){1,40}", fullmatch=True)))
def test_the_quick_bound_of_tokens_is_never_below_the_estimate(prompt: str) -> None:
    (bound,) = at_most_tokens(pa.array([prompt], pa.string())).to_pylist()
    assert bound >= estimate_tokens(prompt)


def test_the_quick_bound_spares_a_long_english_prompt_the_counting() -> None:
    prompt = "a wide view of an old harbor at dawn with fishing boats and gulls, " * 20
    assert len(prompt) > 1300
    assert at_most_tokens(pa.array([prompt])).to_pylist() < [500]


def test_a_large_plan_is_on_disk_and_read_back_in_the_order_of_the_table(
    open_table: Open, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "_GATHERED_BYTES", 10_000)
    rows = 5_000
    table = open_table(
        {
            "prompt_id": [f"row-{number}" for number in range(rows)],
            "prompt": [f"cat {number}" for number in range(rows)],
            "part": [f"p{number % 3}" for number in range(rows)],
            "prompt_key": [{"nested": [number]} for number in range(rows)],
            "row": pa.array([f"r{number % 7}" for number in range(rows)]).dictionary_encode(),
        },
        "column:part",
    )
    with table.plan() as plan:
        for part in range(3):
            found = pa.Table.from_batches(plan.batches(f"p{part}"))
            numbers = range(part, rows, 3)
            assert found["prompt_id"].to_pylist() == [f"row-{number}" for number in numbers]
            assert found["prompt_key"].to_pylist() == [{"nested": [number]} for number in numbers]
            assert found["row"].to_pylist() == [f"r{number % 7}" for number in numbers]
        assert plan.passthrough.names == ["part", "prompt_key", "row"]
        named = list(plan.named({"row-4", "row-4999", "unknown"}))
        assert [(image.prompt_id, image.partition_key) for image in named] == [
            ("row-4", "p1"),
            ("row-4999", "p1"),
        ]


def test_a_plan_that_is_not_kept_still_knows_its_keys_and_versions(open_table: Open) -> None:
    table = open_table({"prompt": ["a", "b", "a"], "num_images": [1, 3, 1], "sample_": [1, 2, 3]})
    with table.plan() as kept, table.plan(keep=False) as bare:
        assert bare.versions() == kept.versions() == table.versions()
        assert bare.same_images(kept)
        assert [list(bare.batches(key)) for key in bare.keys] == [[]] * 4

"""The sample table: what the demonstration counts on, and that it is what its maker makes."""

from __future__ import annotations

import runpy
from collections import Counter
from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from krea_dagster.models import QUALITIES, SIZES
from krea_dagster.prompts import PromptTable, estimate_tokens, parse_partition_by
from tests.prompts.reference import PromptRows, plan_images, read_rows

DATA = Path(__file__).parents[2] / "data"
SAMPLE = DATA / "prompts.parquet"


@pytest.fixture(scope="module")
def sample() -> PromptRows:
    return read_rows(PromptTable(str(SAMPLE), parse_partition_by("hash:8")))


def test_the_committed_table_is_what_its_maker_makes(tmp_path: Path) -> None:
    made = tmp_path / "made.parquet"
    again = tmp_path / "again.parquet"
    main = runpy.run_path(str(DATA / "make_prompts.py"))["main"]
    main(made)
    main(again)
    assert made.read_bytes() == again.read_bytes()
    assert pq.read_table(made).equals(pq.read_table(SAMPLE), check_metadata=True)
    if pq.read_metadata(made).created_by == pq.read_metadata(SAMPLE).created_by:
        assert made.read_bytes() == SAMPLE.read_bytes()


def test_it_has_60_rows_and_asks_for_68_different_images(sample: PromptRows) -> None:
    assert len(sample.rows) == 60
    images = list(plan_images(sample.rows))
    assert len(images) == 68
    assert len({image.request.request_key for image in images}) == 68
    assert sample.warnings == ()


def test_it_uses_every_size_and_quality(sample: PromptRows) -> None:
    assert {row.size for row in sample.rows} == set(SIZES)
    qualities = Counter(row.quality for row in sample.rows)
    assert set(qualities) == set(QUALITIES)
    assert qualities["2K"] == 8


def test_it_has_fixed_and_drawn_seeds_and_rows_of_several_images(sample: PromptRows) -> None:
    fixed = sum(row.seed is not None for row in sample.rows)
    assert 20 <= fixed <= 40
    assert Counter(row.num_images for row in sample.rows) == {1: 55, 2: 2, 3: 3}


def test_its_prompts_are_short_and_some_are_not_english(sample: PromptRows) -> None:
    assert max(estimate_tokens(row.prompt) for row in sample.rows) < 50
    assert sum(not row.prompt.isascii() for row in sample.rows) >= 4
    assert len({row.prompt for row in sample.rows}) == 60


def test_two_rows_are_for_the_emulator_to_refuse(sample: PromptRows) -> None:
    marked = {row.prompt_id: row.prompt for row in sample.rows if "[" in row.prompt}
    assert set(marked) == {"demo-refused-at-submit", "demo-refused-by-task"}
    assert "[emulator: refuse]" in marked["demo-refused-at-submit"]
    assert "[emulator: fail content_policy_violation]" in marked["demo-refused-by-task"]


@pytest.mark.parametrize(
    ("by", "count", "one"),
    [("column:category", 8, "Food & Drink"), ("day:day", 7, "2026-11-07"), ("hash:8", 8, None)],
)
def test_it_can_be_partitioned_in_each_way(by: str, count: int, one: str | None) -> None:
    table = PromptTable(str(SAMPLE), parse_partition_by(by))
    keys = table.partition_keys()
    assert len(keys) == count
    assert one is None or one in keys
    assert {row.partition_key for row in read_rows(table).rows} == set(keys)


def test_its_further_columns_are_category_campaign_and_day(sample: PromptRows) -> None:
    assert sample.passthrough.column_names == ["category", "campaign", "day"]
    days = sample.passthrough.column("day").to_pylist()
    assert (min(days), max(days)) == (date(2026, 11, 1), date(2026, 11, 7))

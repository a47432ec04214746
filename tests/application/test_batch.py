"""The state of a plan before the purchase: which images exist, and which are to be bought."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from krea_dagster import PromptTable
from krea_dagster.application.batch import Batch
from krea_dagster.application.krea import Krea
from krea_dagster.application.purchase import buy
from krea_dagster.application.settings import Settings
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal import bulk_reads
from krea_dagster.plugin.io_manager import split_by_partition
from krea_dagster.prompts import parse_partition_by
from tests.dagster_bench import posts, wanted, write_table
from tests.prompts.reference import images_of

ROWS: dict[str, list[Any]] = {
    "prompt_id": ["one", "two", "twin-a", "twin-b", "refused", "three"],
    "prompt": ["one", "two", "twins", "twins", "[emulator: refuse] this", "three"],
    "seed": [1, 2, 3, 3, 4, 5],
    "num_images": [1, 1, 1, 1, 1, 3],
    "size": ["1:2"] * 6,
}


class Bought:
    """A table of which all rows were asked for once."""

    def __init__(self, folder: Path, emulator: Emulator) -> None:
        source = write_table(folder / "prompts.parquet", ROWS)
        self.table = PromptTable(source, parse_partition_by("hash:2"))
        self.krea = Krea(
            Settings(
                api_key="emulator",
                base_url=emulator.url,
                expected_latency_s=0.02,
                storage=str(folder / "krea"),
            )
        )
        self.images = images_of(self.table)
        buy(self.krea, wanted(self.images), run_id="first")

    def left(self) -> dict[str, int]:
        """The prompts of what is left to carry, each with its rows."""
        with Batch.read(self.table, None, self.krea, look=True) as batch:
            state = batch.state(self.krea)
            wanted = list(state.wanted())
            assert int(state.intact.sum()) + sum(one.rows for one in wanted) == 8
            return {f"{one.request.prompt} {one.request.seed}": one.rows for one in wanted}

    def file_of(self, prompt_id: str) -> Path:
        (image,) = [image for image in self.images if image.prompt_id == prompt_id]
        stored = self.krea.records([image])[image.request.request_key].image
        assert stored is not None
        return Path(self.krea.settings.storage) / stored.path


@pytest.fixture(params=["looked up", "a pass over all"])
def bought(
    request: pytest.FixtureRequest,
    tmp_path: Path,
    emulator: Emulator,
    monkeypatch: pytest.MonkeyPatch,
) -> Bought:
    monkeypatch.setattr(bulk_reads, "_LOOKUP_COST", 0 if request.param == "looked up" else 5)
    return Bought(tmp_path, emulator)


def test_only_what_is_not_plainly_done_is_left_to_the_runner(
    bought: Bought, emulator: Emulator
) -> None:
    assert bought.left() == {"[emulator: refuse] this 4": 1}
    bought.file_of("one").unlink()
    bought.file_of("twin-a").write_bytes(b"cut")
    before = posts(emulator)
    assert bought.left() == {"one 1": 1, "twins 3": 2, "[emulator: refuse] this 4": 1}
    assert posts(emulator) == before


def test_before_anything_was_bought_everything_is_left_and_twins_are_one(
    tmp_path: Path, emulator: Emulator
) -> None:
    table = PromptTable(
        write_table(tmp_path / "prompts.parquet", ROWS), parse_partition_by("hash:2")
    )
    krea = Krea(
        Settings(
            api_key="emulator",
            base_url=emulator.url,
            expected_latency_s=0.02,
            storage=str(tmp_path / "krea"),
        )
    )
    with Batch.read(table, None, krea, look=True) as batch:
        wanted = list(batch.state(krea).wanted())
    assert not (tmp_path / "krea").exists(), "no journal is made to look into it"
    assert sorted(one.rows for one in wanted) == [1, 1, 1, 1, 1, 1, 2]
    keys = {image.request.request_key for image in images_of(table)}
    assert {one.request.request_key for one in wanted} == keys


def test_a_table_is_cut_by_partition_in_the_order_of_its_rows() -> None:
    table = pa.table({"partition_key": list("bacbaab"), "number": range(7)})
    parts = split_by_partition(table, ["d", "b", "a"])
    assert {key: part["number"].to_pylist() for key, part in parts.items()} == {
        "a": [1, 4, 5],
        "b": [0, 3, 6],
        "d": [],
    }


def test_a_batch_that_is_handed_over_serves_the_steps_of_a_run(
    tmp_path: Path, emulator: Emulator
) -> None:
    bought = Bought(tmp_path, emulator)
    written_a_while_ago(bought.table)
    keys = bought.table.partition_keys()
    with Batch.read(bought.table, None, bought.krea, look=True) as batch:
        with batch.handed_over(batch.state(bought.krea)):
            with Batch.read(bought.table, keys, bought.krea, to_buy=True) as step:
                assert step.plan is batch.plan
                left = [one.request.prompt for one in step.state(bought.krea).wanted()]
                assert left == ["[emulator: refuse] this"]
            with Batch.read(bought.table, keys, bought.krea) as next_step:
                assert next_step.plan is batch.plan
                assert sum(part.num_rows for key in keys for part in step.plan.batches(key)) == 8
        with Batch.read(bought.table, keys, bought.krea) as later:
            assert later.plan is not batch.plan


@pytest.mark.parametrize("what", ["the table", "an attempt"])
def test_what_changed_since_a_batch_was_read_is_read_again(
    what: str, tmp_path: Path, emulator: Emulator
) -> None:
    bought = Bought(tmp_path, emulator)
    written_a_while_ago(bought.table)
    with handed_over(bought) as batch:
        if what == "the table":
            write_table(Path(bought.table.source), {**ROWS, "seed": [9, 2, 3, 3, 4, 5]})
        else:
            bought.krea.raise_attempts(bought.table, [("one", 0)], raised_by="a person")
        with Batch.read(bought.table, bought.table.partition_keys(), bought.krea) as step:
            assert step.versions() != batch.versions()


def test_a_run_of_some_partitions_uses_its_part_of_a_batch_that_is_handed_over(
    tmp_path: Path, emulator: Emulator
) -> None:
    bought = Bought(tmp_path, emulator)
    written_a_while_ago(bought.table)
    keys = bought.table.partition_keys()[1:]
    with Batch.read(bought.table, keys, bought.krea) as alone, handed_over(bought):
        with Batch.read(bought.table, keys, bought.krea) as images:
            assert images.plan.same_images(alone.plan)
            assert images.versions() == alone.versions()
            for one in (images, images):  # handed over, and looked up again
                state = one.state(bought.krea)
                assert (state.intact == alone.state(bought.krea).intact).all()
            figures = images.summaries(bought.krea, "run")
        with Batch.read(bought.table, keys, bought.krea) as manifest:
            made = manifest.manifests(bought.krea, "run")
            assert made.summaries is figures
            made.manifests.close()


def test_a_run_makes_its_manifests_once_for_their_figures_and_their_files(
    tmp_path: Path, emulator: Emulator
) -> None:
    bought = Bought(tmp_path, emulator)
    written_a_while_ago(bought.table)
    keys = bought.table.partition_keys()
    with handed_over(bought):
        with Batch.read(bought.table, keys, bought.krea) as images:
            figures = images.summaries(bought.krea, "run")
        with Batch.read(bought.table, keys, bought.krea) as manifest:
            made = manifest.manifests(bought.krea, "run")
            assert made.summaries is figures
            assert made.manifests.to_table().num_rows == 8
            made.manifests.close()
            another = manifest.manifests(bought.krea, "another run")
            assert another.summaries is not figures
            assert sum(one.rows for one in another.summaries.values()) == 8
            another.manifests.close()


def test_without_a_step_that_takes_them_manifests_are_made_for_their_figures_only(
    tmp_path: Path, emulator: Emulator
) -> None:
    bought = Bought(tmp_path, emulator)
    with Batch.read(bought.table, None, bought.krea) as batch:
        figures = batch.summaries(bought.krea, "run")
        made = batch.manifests(bought.krea, "run")
        assert made.summaries is not figures
        assert [one.statuses for one in made.summaries.values()] == [
            one.statuses for one in figures.values()
        ]
        made.manifests.close()


@contextmanager
def handed_over(bought: Bought) -> Iterator[Batch]:
    """Read the whole table and hand it over to the runs in the block."""
    with (
        Batch.read(bought.table, None, bought.krea) as batch,
        batch.handed_over(batch.state(bought.krea)),
    ):
        yield batch


def written_a_while_ago(table: PromptTable) -> None:
    """Another write to a file that was just written might leave no trace, so it is read again."""
    os.utime(table.source, (1_000_000_000, 1_000_000_000))

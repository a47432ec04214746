"""Measuring partitions: each file read once, whatever stops in between, and what is wrong named."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from krea_dagster.curation.measures.builtin import NAMES, measure
from krea_dagster.curation.measures.cache import measured_while_verified
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.curation.measures.measure_partitions import MeasuredPartition, measure_partitions
from krea_dagster.curation.measures.measures_table import (
    MEASURES_SCHEMA,
    measures_name,
    read_measures,
)
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError
from tests.curation.measures.stored_images import Shelf, drawn, png


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(str(tmp_path / "krea"))


def measured(shelf: Shelf, *keys: str, **options: Any) -> list[MeasuredPartition]:
    return list(measure_partitions(shelf.storage, keys or ("a",), **options))


class Redness:
    """A user's function that remembers what it was called with."""

    def __init__(self, fails_on: Sequence[int] = ()) -> None:
        self.batches: list[int] = []
        self._fails_on = [drawn(number).tobytes() for number in fails_on]

    def __call__(self, pictures: list[Image.Image]) -> list[float]:
        self.batches.append(len(pictures))
        assert {picture.mode for picture in pictures} == {"RGB"}
        if any(picture.tobytes() in self._fails_on for picture in pictures):
            raise RuntimeError("too red")
        return [redness(picture) for picture in pictures]


def redness(picture: Image.Image) -> float:
    pixel = picture.convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return float(pixel[0])


# -- what is written --------------------------------------------------------------------------


def test_each_stored_image_has_a_row_with_the_figures_of_its_picture(shelf: Shelf) -> None:
    rows = [shelf.row(number) for number in range(5)]
    failed = {**shelf.row(9), "status": "failed", "image_sha256": None, "image_path": None}
    shelf.write("a/b", [*rows, failed], ["shop"])
    (one,) = measured(shelf, "a/b", folders=["shop"])
    assert (one.images, one.read, one.troubles) == (5, 5, [])
    table = read_measures(shelf.storage, ["a/b"], folders=["shop"])
    assert table.schema == MEASURES_SCHEMA
    assert table.equals(one.table)
    assert table["image_sha256"].to_pylist() == [row["image_sha256"] for row in rows]
    for number, row in enumerate(table.to_pylist()):
        assert (row["partition_key"], row["width"], row["height"]) == ("a/b", 64, 64)
        assert tuple(row[name] for name in NAMES) == measure(drawn(number)).values()


def test_one_file_of_two_requests_has_one_row(shelf: Shelf) -> None:
    same = png(drawn(1))
    shelf.write("a", [shelf.row(1, same), shelf.row(2, same), shelf.row(3)])
    (one,) = measured(shelf)
    assert (one.images, len(one.table)) == (2, 2)


def test_partitions_that_share_a_file_each_have_its_row_and_it_is_read_once(shelf: Shelf) -> None:
    same = png(drawn(1))
    shelf.write("a", [shelf.row(1, same)])
    shelf.write("b", [shelf.row(2, same)])
    red = Redness()
    measured(shelf, "a", "b", further=[Measure("red", red)])
    assert red.batches == [1]
    table = read_measures(shelf.storage, ["b", "a"])
    assert table["partition_key"].to_pylist() == ["b", "a"]
    assert table["red"].to_pylist() == [redness(drawn(1))] * 2


def test_a_partition_without_a_manifest_or_without_images_has_an_empty_file(shelf: Shelf) -> None:
    failed = {**shelf.row(9), "status": "failed", "image_sha256": None, "image_path": None}
    shelf.write("b", [failed])
    for one in measured(shelf, "a", "b"):
        assert (one.images, len(one.table)) == (0, 0)
    assert read_measures(shelf.storage, ["a", "b"]).schema == MEASURES_SCHEMA


def test_equal_measures_are_equal_bytes(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(number) for number in range(3)])
    measured(shelf)
    path = Path(shelf.storage.locate(measures_name("a")))
    before = path.read_bytes()
    path.unlink()
    measured(shelf)
    assert path.read_bytes() == before


def test_columns_may_be_chosen_and_a_wrong_one_is_named(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(1)])
    assert (
        read_measures(shelf.storage, ["a"], ["sharpness"]).schema
        == MEASURES_SCHEMA.empty_table().select(["sharpness"]).schema
    )
    measured(shelf)
    found = read_measures(shelf.storage, ["a", "never"], ["sharpness", "image_sha256"])
    assert found.column_names == ["sharpness", "image_sha256"]
    with pytest.raises(ConfigError, match="'beauty'; they have image_sha256, "):
        read_measures(shelf.storage, ["a"], ["beauty"])


# -- what is read again -----------------------------------------------------------------------


def test_what_the_run_measured_while_it_verified_is_not_read_again(shelf: Shelf) -> None:
    rows = [shelf.row(number, written=False) for number in range(3)]
    with measured_while_verified(shelf.storage) as on_image:
        for number, row in enumerate(rows):
            on_image(row["image_sha256"], drawn(number))
    shelf.write("a", rows)
    (one,) = measured(shelf)  # the files are not even there
    assert (one.read, len(one.table), one.troubles) == (0, 3, [])


def test_measuring_again_reads_only_what_is_new(shelf: Shelf) -> None:
    rows = [shelf.row(number) for number in range(3)]
    shelf.write("a", rows)
    (before,) = measured(shelf)
    shelf.write("a", [*rows, shelf.row(4)])
    (one,) = measured(shelf)
    assert (one.images, one.read) == (4, 1)
    assert one.table.slice(0, 3).equals(before.table)


@pytest.mark.parametrize("lost", ["measures/_cache", "measures/a.parquet"])
def test_the_cache_or_the_earlier_file_may_be_lost(shelf: Shelf, lost: str) -> None:
    shelf.write("a", [shelf.row(number) for number in range(3)])
    further = [Measure("red", Redness())]
    (before,) = measured(shelf, further=further)
    for name in list(shelf.storage.names(lost)) or [lost]:
        shelf.storage.remove(name)
    (one,) = measured(shelf, further=further)
    assert one.read == 0
    assert one.table.equals(before.table)


def test_damaged_files_of_figures_are_as_good_as_none(
    shelf: Shelf, caplog: pytest.LogCaptureFixture
) -> None:
    shelf.write("a", [shelf.row(number) for number in range(3)])
    (before,) = measured(shelf)
    for name in shelf.storage.names("measures"):
        path = Path(shelf.storage.locate(name))
        path.write_bytes(path.read_bytes()[:-20])
    (one,) = measured(shelf)
    assert one.read == 3
    assert one.table.equals(before.table)
    assert "is damaged, and may be removed" in caplog.text


# -- what is wrong ----------------------------------------------------------------------------


def test_missing_damaged_and_other_files_are_named_and_tried_again(shelf: Shelf) -> None:
    whole = png(drawn(3))
    rows = [
        shelf.row(0),
        shelf.row(1, written=False),
        shelf.row(2, whole[:-40]),
        {**shelf.row(3), "image_sha256": "0" * 64},
    ]
    shelf.write("a", rows)
    (one,) = measured(shelf)
    assert one.table["image_sha256"].to_pylist() == [rows[0]["image_sha256"]]
    said = [str(trouble) for trouble in one.troubles]
    assert said[0] == f"row-0001, sample 0: the file is missing ({rows[1]['image_path']})"
    assert "row-0002, sample 0: the PNG file is cut short" in said[1]
    assert "row-0003, sample 0: the file is not the one that was stored" in said[2]
    shelf.row(1)
    (again,) = measured(shelf)
    assert (again.read, len(again.table), len(again.troubles)) == (3, 2, 2)


def test_a_storage_that_takes_no_file_is_told(shelf: Shelf) -> None:
    shelf.write("a", [])
    partial = Path(shelf.root) / ".partial"
    partial.rmdir()
    partial.write_text("in the way")
    shelf.storage = Storage(shelf.root)
    with pytest.raises(StorageError, match="measures cannot be written to"):
        measured(shelf)


def test_a_flat_picture_is_measured_for_its_figures_say_so(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(1, png(Image.new("RGB", (64, 64), "black")))])
    (one,) = measured(shelf)
    (row,) = one.table.to_pylist()
    assert (row["main_colour_share"], row["contrast"], one.troubles) == (1.0, 0.0, [])


# -- measures of one's own --------------------------------------------------------------------


def test_own_measures_are_taken_in_batches_and_kept_by_name_and_version(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(number) for number in range(10)])
    red, other = Redness(), Redness()
    further = [Measure("red", red, batch_size=4), Measure("rouge", other, batch_size=100)]
    (one,) = measured(shelf, further=further)
    assert (red.batches, other.batches) == ([4, 4, 2], [10])
    assert one.table.column_names == [*MEASURES_SCHEMA.names, "red", "rouge"]
    assert one.table["red"].to_pylist() == [redness(drawn(number)) for number in range(10)]
    (again,) = measured(shelf, further=further)
    assert (again.read, len(red.batches)) == (0, 3)
    assert again.table.equals(one.table)
    (third,) = measured(shelf, further=[Measure("red", red, version="2", batch_size=10)])
    assert (third.read, red.batches[3:]) == (10, [10])
    assert "rouge" not in third.table.column_names


def test_no_value_is_kept_as_the_functions_answer(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(number) for number in range(2)])
    calls: list[int] = []

    def unsure(pictures: list[Image.Image]) -> list[float | None]:
        calls.append(len(pictures))
        return [None, float("nan")]

    for _ in range(2):
        (one,) = measured(shelf, further=[Measure("unsure", unsure)])
        assert one.table["unsure"].to_pylist() == [None, None]
        assert one.troubles == []
    assert calls == [2]


def test_a_picture_that_a_function_fails_on_is_named_and_costs_only_its_own_value(
    shelf: Shelf,
) -> None:
    shelf.write("a", [shelf.row(number) for number in range(6)])
    (one,) = measured(shelf, further=[Measure("red", Redness([2]), batch_size=4)])
    values = one.table["red"].to_pylist()
    assert values == [None if at == 2 else redness(drawn(at)) for at in range(6)]
    (said,) = map(str, one.troubles)
    assert said.startswith("row-0002, sample 0, red: RuntimeError: too red (")
    mended = Redness()
    (again,) = measured(shelf, further=[Measure("red", mended, batch_size=4)])
    assert (mended.batches, again.troubles, again.table["red"].null_count) == ([1], [], 0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [([1.0], "it gave 1 values for"), (["much"] * 20, "could not convert"), ([[]] * 20, "no numb")],
)
def test_a_function_that_is_broken_stops_the_measuring(
    shelf: Shelf, answer: list[Any], said: str
) -> None:
    shelf.write("a", [shelf.row(number) for number in range(20)])

    def broken(pictures: list[Image.Image]) -> list[Any]:
        return answer if len(pictures) > 1 or answer != [1.0] else []

    text = "'broken' failed on 10 pictures one after the other; the last was row-0009, sample 0"
    with pytest.raises(ConfigError, match=text) as raised:
        measured(shelf, further=[Measure("broken", broken, batch_size=20)])
    assert raised.value.__cause__ is not None
    if answer != [1.0]:
        assert said in str(raised.value) or "values for 1 pictures" in str(raised.value)
    (one,) = measured(shelf)
    assert one.read == 0, "what was measured before it stopped is kept"


def test_a_killed_measuring_goes_on_where_it_was(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(number) for number in range(40)])
    script = f"""
import os, signal
from krea_dagster.curation.measures import measure_partitions
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.engine.storage.storage import Storage
measure_partitions._WAIT_S = 0.0  # written at once
def slow(pictures):
    slow.calls += 1
    if slow.calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.5] * len(pictures)
slow.calls = 0
list(measure_partitions.measure_partitions(Storage({shelf.root!r}), ["a"],
    further=[Measure("slow", slow, batch_size=5)]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert shelf.storage.size_bytes(measures_name("a")) is None
    rest: list[int] = []

    def quick(pictures: list[Image.Image]) -> list[float]:
        rest.append(len(pictures))
        return [1.0] * len(pictures)

    (one,) = measured(shelf, further=[Measure("slow", quick, batch_size=5)])
    assert sum(rest) == 20
    assert one.table["slow"].to_pylist() == [0.5] * 20 + [1.0] * 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sharpness"}, "as one of those of every picture"),
        ({"name": "Width"}, "as one of those of every picture"),
        ({"name": "my score"}, "it names a column"),
        ({"name": "score", "version": ""}, "an empty version"),
        ({"name": "score", "batch_size": 0}, "a batch_size of 0"),
    ],
)
def test_a_measure_that_cannot_be_used_is_told_when_it_is_made(
    options: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        Measure(function=Redness(), **options)


def test_two_measures_may_not_share_a_name(shelf: Shelf) -> None:
    with pytest.raises(ConfigError, match="two measures are named 'Red'"):
        measured(shelf, further=[Measure("red", Redness()), Measure("Red", Redness())])


def test_how_far_it_is_is_told_after_each_file(shelf: Shelf) -> None:
    shelf.write("a", [shelf.row(number) for number in range(3)])
    told: list[tuple[int, int]] = []
    measured(shelf, on_progress=lambda read, of: told.append((read, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]

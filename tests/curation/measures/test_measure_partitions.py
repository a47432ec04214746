"""Measuring partitions: each file is read once, also after a crash, and failures are named."""

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
from krea_dagster.curation.measures.measures_table import MEASURES_SCHEMA, measures_name
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError
from tests.curation.measures.stored_images import StoredImages, drawn, png, read_measures


@pytest.fixture
def stored(tmp_path: Path) -> StoredImages:
    return StoredImages(str(tmp_path / "krea"))


def measured(stored: StoredImages, *keys: str, **options: Any) -> list[MeasuredPartition]:
    return list(measure_partitions(stored.storage, keys or ("a",), **options))


class Redness:
    """A custom function that records the sizes of its batches."""

    def __init__(self, fails_on: Sequence[int] = ()) -> None:
        self.batches: list[int] = []
        self._fails_on = [drawn(number).tobytes() for number in fails_on]

    def __call__(self, images: list[Image.Image]) -> list[float]:
        self.batches.append(len(images))
        assert {image.mode for image in images} == {"RGB"}
        if any(image.tobytes() in self._fails_on for image in images):
            raise RuntimeError("too red")
        return [redness(image) for image in images]


def redness(image: Image.Image) -> float:
    pixel = image.convert("RGB").getpixel((0, 0))
    assert isinstance(pixel, tuple)
    return float(pixel[0])


# -- what is written --------------------------------------------------------------------------


def test_each_stored_image_has_a_row_with_its_measures(stored: StoredImages) -> None:
    rows = [stored.row(number) for number in range(5)]
    failed = {**stored.row(9), "status": "failed", "image_sha256": None, "image_path": None}
    stored.write("a/b", [*rows, failed], ["shop"])
    (one,) = measured(stored, "a/b", folders=["shop"])
    assert (one.images, one.read, one.failures) == (5, 5, [])
    table = read_measures(stored.storage, ["a/b"], folders=["shop"])
    assert table.schema == MEASURES_SCHEMA
    assert table.equals(one.table)
    assert table["image_sha256"].to_pylist() == [row["image_sha256"] for row in rows]
    for number, row in enumerate(table.to_pylist()):
        assert (row["partition_key"], row["width"], row["height"]) == ("a/b", 64, 64)
        assert tuple(row[name] for name in NAMES) == measure(drawn(number)).values()


def test_one_file_of_two_requests_has_one_row(stored: StoredImages) -> None:
    same = png(drawn(1))
    stored.write("a", [stored.row(1, same), stored.row(2, same), stored.row(3)])
    (one,) = measured(stored)
    assert (one.images, len(one.table)) == (2, 2)


def test_partitions_that_share_a_file_each_have_its_row_and_it_is_read_once(
    stored: StoredImages,
) -> None:
    same = png(drawn(1))
    stored.write("a", [stored.row(1, same)])
    stored.write("b", [stored.row(2, same)])
    red = Redness()
    measured(stored, "a", "b", custom=[Measure("red", red)])
    assert red.batches == [1]
    table = read_measures(stored.storage, ["b", "a"])
    assert table["partition_key"].to_pylist() == ["b", "a"]
    assert table["red"].to_pylist() == [redness(drawn(1))] * 2


def test_a_partition_without_a_manifest_or_without_images_has_an_empty_file(
    stored: StoredImages,
) -> None:
    failed = {**stored.row(9), "status": "failed", "image_sha256": None, "image_path": None}
    stored.write("b", [failed])
    for one in measured(stored, "a", "b"):
        assert (one.images, len(one.table)) == (0, 0)
    assert read_measures(stored.storage, ["a", "b"]).schema == MEASURES_SCHEMA


def test_equal_measures_are_equal_bytes(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(3)])
    measured(stored)
    path = Path(stored.storage.locate(measures_name("a")))
    before = path.read_bytes()
    path.unlink()
    measured(stored)
    assert path.read_bytes() == before


# -- what is read again -----------------------------------------------------------------------


def test_what_the_run_measured_while_it_verified_is_not_read_again(stored: StoredImages) -> None:
    rows = [stored.row(number, written=False) for number in range(3)]
    with measured_while_verified(stored.storage) as on_image:
        for number, row in enumerate(rows):
            on_image(row["image_sha256"], drawn(number))
    stored.write("a", rows)
    (one,) = measured(stored)  # the files are not even there
    assert (one.read, len(one.table), one.failures) == (0, 3, [])


def test_measuring_again_reads_only_what_is_new(stored: StoredImages) -> None:
    rows = [stored.row(number) for number in range(3)]
    stored.write("a", rows)
    (before,) = measured(stored)
    stored.write("a", [*rows, stored.row(4)])
    (one,) = measured(stored)
    assert (one.images, one.read) == (4, 1)
    assert one.table.slice(0, 3).equals(before.table)


@pytest.mark.parametrize("lost", ["measures/_cache", "measures/a.parquet"])
def test_the_cache_or_the_earlier_file_may_be_lost(stored: StoredImages, lost: str) -> None:
    stored.write("a", [stored.row(number) for number in range(3)])
    custom = [Measure("red", Redness())]
    (before,) = measured(stored, custom=custom)
    for name in list(stored.storage.names(lost)) or [lost]:
        stored.storage.remove(name)
    (one,) = measured(stored, custom=custom)
    assert one.read == 0
    assert one.table.equals(before.table)


def test_damaged_files_of_measures_are_ignored(
    stored: StoredImages, caplog: pytest.LogCaptureFixture
) -> None:
    stored.write("a", [stored.row(number) for number in range(3)])
    (before,) = measured(stored)
    for name in stored.storage.names("measures"):
        path = Path(stored.storage.locate(name))
        path.write_bytes(path.read_bytes()[:-20])
    (one,) = measured(stored)
    assert one.read == 3
    assert one.table.equals(before.table)
    assert "is damaged, and may be removed" in caplog.text


# -- what is wrong ----------------------------------------------------------------------------


def test_missing_damaged_and_changed_files_are_named_and_tried_again(stored: StoredImages) -> None:
    whole = png(drawn(3))
    rows = [
        stored.row(0),
        stored.row(1, written=False),
        stored.row(2, whole[:-40]),
        {**stored.row(3), "image_sha256": "0" * 64},
    ]
    stored.write("a", rows)
    (one,) = measured(stored)
    assert one.table["image_sha256"].to_pylist() == [rows[0]["image_sha256"]]
    said = [str(failure) for failure in one.failures]
    assert said[0] == f"row-0001, sample 0: the file is missing ({rows[1]['image_path']})"
    assert "row-0002, sample 0: the PNG file is cut short" in said[1]
    assert "row-0003, sample 0: the file is not the one that was stored" in said[2]
    stored.row(1)
    (again,) = measured(stored)
    assert (again.read, len(again.table), len(again.failures)) == (3, 2, 2)


def test_a_storage_that_cannot_be_written_is_an_error(stored: StoredImages) -> None:
    stored.write("a", [])
    partial = Path(stored.root) / ".partial"
    partial.rmdir()
    partial.write_text("in the way")
    stored.storage = Storage(stored.root)
    with pytest.raises(StorageError, match="measures cannot be written to"):
        measured(stored)


def test_a_flat_image_is_measured(stored: StoredImages) -> None:
    stored.write("a", [stored.row(1, png(Image.new("RGB", (64, 64), "black")))])
    (one,) = measured(stored)
    (row,) = one.table.to_pylist()
    assert (row["main_colour_share"], row["contrast"], one.failures) == (1.0, 0.0, [])


# -- custom measures ------------------------------------------------------------------------


def test_custom_measures_run_in_batches_and_are_cached_by_name_and_version(
    stored: StoredImages,
) -> None:
    stored.write("a", [stored.row(number) for number in range(10)])
    red, other = Redness(), Redness()
    custom = [Measure("red", red, batch_size=4), Measure("rouge", other, batch_size=100)]
    (one,) = measured(stored, custom=custom)
    assert (red.batches, other.batches) == ([4, 4, 2], [10])
    assert one.table.column_names == [*MEASURES_SCHEMA.names, "red", "rouge"]
    assert one.table["red"].to_pylist() == [redness(drawn(number)) for number in range(10)]
    (again,) = measured(stored, custom=custom)
    assert (again.read, len(red.batches)) == (0, 3)
    assert again.table.equals(one.table)
    (third,) = measured(stored, custom=[Measure("red", red, version="2", batch_size=10)])
    assert (third.read, red.batches[3:]) == (10, [10])
    assert "rouge" not in third.table.column_names


def test_a_missing_value_is_cached_too(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(2)])
    calls: list[int] = []

    def unsure(images: list[Image.Image]) -> list[float | None]:
        calls.append(len(images))
        return [None, float("nan")]

    for _ in range(2):
        (one,) = measured(stored, custom=[Measure("unsure", unsure)])
        assert one.table["unsure"].to_pylist() == [None, None]
        assert one.failures == []
    assert calls == [2]


def test_an_image_on_which_a_function_fails_loses_only_its_own_value(
    stored: StoredImages,
) -> None:
    stored.write("a", [stored.row(number) for number in range(6)])
    (one,) = measured(stored, custom=[Measure("red", Redness([2]), batch_size=4)])
    values = one.table["red"].to_pylist()
    assert values == [None if at == 2 else redness(drawn(at)) for at in range(6)]
    (said,) = map(str, one.failures)
    assert said.startswith("row-0002, sample 0, red: RuntimeError: too red (")
    mended = Redness()
    (again,) = measured(stored, custom=[Measure("red", mended, batch_size=4)])
    assert (mended.batches, again.failures, again.table["red"].null_count) == ([1], [], 0)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ([1.0], "it returned 1 values for"),
        (["much"] * 20, "could not convert"),
        ([[]] * 20, "no numb"),
    ],
)
def test_a_function_that_fails_on_many_images_stops_the_run(
    stored: StoredImages, answer: list[Any], said: str
) -> None:
    stored.write("a", [stored.row(number) for number in range(20)])

    def broken(images: list[Image.Image]) -> list[Any]:
        return answer if len(images) > 1 or answer != [1.0] else []

    text = "'broken' failed on 10 images in a row; the last was row-0009, sample 0"
    with pytest.raises(ConfigError, match=text) as raised:
        measured(stored, custom=[Measure("broken", broken, batch_size=20)])
    assert raised.value.__cause__ is not None
    if answer != [1.0]:
        assert said in str(raised.value) or "values for 1 images" in str(raised.value)
    (one,) = measured(stored)
    assert one.read == 0, "what was measured before it stopped is kept"


def test_a_killed_run_resumes(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(40)])
    script = f"""
import os, signal
from krea_dagster.curation.measures import measure_partitions
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.engine.storage.storage import Storage
measure_partitions._WAIT_S = 0.0  # written at once
def slow(images):
    slow.calls += 1
    if slow.calls == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return [0.5] * len(images)
slow.calls = 0
list(measure_partitions.measure_partitions(Storage({stored.root!r}), ["a"],
    custom=[Measure("slow", slow, batch_size=5)]))
"""
    done = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ})
    assert done.returncode == -signal.SIGKILL
    assert stored.storage.size_bytes(measures_name("a")) is None
    rest: list[int] = []

    def quick(images: list[Image.Image]) -> list[float]:
        rest.append(len(images))
        return [1.0] * len(images)

    (one,) = measured(stored, custom=[Measure("slow", quick, batch_size=5)])
    assert sum(rest) == 20
    assert one.table["slow"].to_pylist() == [0.5] * 20 + [1.0] * 20


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"name": "sharpness"}, "is reserved for a built-in measure"),
        ({"name": "Width"}, "is reserved for a built-in measure"),
        ({"name": "my score"}, "cannot be a column"),
        ({"name": "score", "version": ""}, "an empty version"),
        ({"name": "score", "batch_size": 0}, "a batch_size of 0"),
    ],
)
def test_an_invalid_measure_is_rejected(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        Measure(function=Redness(), **options)


def test_two_measures_may_not_share_a_name(stored: StoredImages) -> None:
    with pytest.raises(ConfigError, match="two measures are named 'Red'"):
        measured(stored, custom=[Measure("red", Redness()), Measure("Red", Redness())])


def test_progress_is_reported_after_each_file(stored: StoredImages) -> None:
    stored.write("a", [stored.row(number) for number in range(3)])
    told: list[tuple[int, int]] = []
    measured(stored, on_progress=lambda read, of: told.append((read, of)))
    assert told == [(1, 3), (2, 3), (3, 3)]

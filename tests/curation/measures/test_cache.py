"""The cache of measures: durable, for concurrent writers, and never fatal for a run."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pyarrow as pa
import pytest

from krea_dagster.curation.measures.builtin import measure
from krea_dagster.curation.measures.cache import (
    KEY,
    MeasureCache,
    MeasureWriter,
    digests,
    measured_while_verified,
)
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import StorageError
from tests.curation.measures.stored_images import drawn


def sha(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def scores(storage: Storage, version: str = "1") -> MeasureCache:
    return MeasureCache.custom(storage, "score", version)


def found(cache: MeasureCache, numbers: range) -> dict[bytes, float | None]:
    """Return the cached values of these by hash, each once."""
    table = cache.find(digests(pa.array([sha(number) for number in numbers])))
    values = dict(zip(table[KEY].to_pylist(), table["value"].to_pylist(), strict=True))
    assert len(values) == len(table)
    return values


def write_scores(root: str, numbers: range) -> None:
    """Write a file with a value for each number."""
    cache = scores(Storage(root))
    for number in numbers:
        with MeasureWriter(cache) as writer:
            writer.add(sha(number), (float(number),))


@pytest.fixture(params=["folder", "store"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Storage]:
    if request.param == "folder":
        yield Storage(str(tmp_path / "krea"))
        return
    yield Storage(f"memory://{uuid.uuid4().hex}/krea")
    fsspec.filesystem("memory").store.clear()


def test_what_was_written_is_found_by_another_process_and_nothing_else_is(storage: Storage) -> None:
    with MeasureWriter(scores(storage)) as writer:
        for number in range(10):
            writer.add(sha(number), (float(number),))
    again = scores(storage)
    assert found(again, range(5, 20)) == {bytes.fromhex(sha(at)): float(at) for at in range(5, 10)}


def test_a_missing_value_is_cached(storage: Storage) -> None:
    with MeasureWriter(scores(storage)) as writer:
        writer.add(sha(1), (None,))
    assert found(scores(storage), range(3)) == {bytes.fromhex(sha(1)): None}


def test_another_version_knows_nothing_yet(storage: Storage) -> None:
    with MeasureWriter(scores(storage)) as writer:
        writer.add(sha(1), (0.5,))
    assert found(scores(storage, version="2"), range(3)) == {}


def test_small_files_are_merged_without_loss(storage: Storage) -> None:
    cache = scores(storage)
    for number in range(100):
        with MeasureWriter(cache) as writer:
            writer.add(sha(number), (float(number),))
    assert len(list(storage.names("measures/_cache"))) <= 33
    assert len(found(cache, range(100))) == 100


class NothingRemoved(Storage):
    """A store without permission to remove files."""

    def remove(self, name: str) -> None:
        raise PermissionError(f"{name} may not be removed")


def test_without_permission_to_remove_files_nothing_is_lost(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cache = scores(NothingRemoved(str(tmp_path)))
    for number in range(40):
        with MeasureWriter(cache) as writer:
            writer.add(sha(number), (float(number),))
    assert len(found(cache, range(40))) == 40
    assert len(list(tmp_path.rglob("*.parquet"))) == 41, "it was tried once"
    assert caplog.text.count("are not merged") == 1


def test_processes_that_write_and_merge_at_once_lose_nothing(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    root = str(tmp_path)
    parts = [range(start, start + 40) for start in (0, 30, 60)]  # some are written twice
    workers = [context.Process(target=write_scores, args=(root, part)) for part in parts]
    for one in workers:
        one.start()
    cache, known = scores(Storage(root)), 0
    while any(one.is_alive() for one in workers):
        seen = len(found(cache, range(100)))
        assert seen >= known, "a reader saw less than before"
        known = seen
    for one in workers:
        one.join()
        assert one.exitcode == 0
    values = found(cache, range(200))
    assert values == {bytes.fromhex(sha(at)): float(at) for at in range(100)}


def test_rows_are_written_after_a_time_or_when_there_are_many(tmp_path: Path) -> None:
    now_s = [0.0]
    cache = scores(Storage(str(tmp_path)))
    writer = MeasureWriter(cache, wait_s=60.0, clock=lambda: now_s[0])
    writer.add(sha(0), (0.0,))
    now_s[0] = 59.0
    writer.add(sha(1), (1.0,))
    assert found(cache, range(10)) == {}
    now_s[0] = 60.0
    writer.add(sha(2), (2.0,))
    assert len(found(cache, range(10))) == 3
    for number in range(3, 2003):
        writer.add(sha(number), (1.0,))
    assert len(found(cache, range(2003))) == 2003


def test_threads_may_add_rows_at_once(tmp_path: Path) -> None:
    cache = scores(Storage(str(tmp_path)))
    with MeasureWriter(cache, keep=True) as writer, ThreadPoolExecutor(4) as pool:
        for number in range(5000):
            pool.submit(writer.add, sha(number), (float(number),))
    assert len(found(cache, range(5000))) == 5000
    assert sum(len(table) for table in writer.written) == 5000


def test_a_run_measures_what_it_decodes(storage: Storage) -> None:
    with measured_while_verified(storage) as on_image:
        for number in range(3):
            on_image(sha(number), drawn(number))
    table = MeasureCache.builtin(storage).find(digests(pa.array([sha(2)])))
    (row,) = table.to_pylist()
    assert row.pop(KEY) == bytes.fromhex(sha(2))
    assert tuple(row.values()) == measure(drawn(2)).values()


def test_a_run_continues_where_measures_cannot_be_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "measures").write_text("in the way")
    storage = Storage(str(tmp_path))
    with (
        caplog.at_level(logging.ERROR),
        measured_while_verified(storage) as on_image,
    ):
        on_image(sha(1), drawn(1))
    assert "will be measured again" in caplog.text
    writer = MeasureWriter(MeasureCache.builtin(storage))
    writer.add(sha(1), measure(drawn(1)).values())
    with pytest.raises(StorageError, match="measures cannot be written to"):
        writer.close()


def test_a_large_cache_is_read_in_bulk(tmp_path: Path) -> None:
    cache = MeasureCache.builtin(Storage(str(tmp_path)))
    count = 100_000
    generator = np.random.default_rng(0)
    key = generator.bytes(32 * count)

    def binary(data: bytes) -> Any:
        return pa.Array.from_buffers(pa.binary(32), count, [None, pa.py_buffer(data)])

    figures = [pa.array(generator.random(count)) for _ in range(6)]
    quality = pa.array(generator.integers(0, 100, count), pa.int32())
    columns = [binary(key), binary(generator.bytes(32 * count)), quality, *figures]
    cache.add(pa.Table.from_arrays(columns, schema=cache.schema))
    assert len(cache.find(binary(key))) == count

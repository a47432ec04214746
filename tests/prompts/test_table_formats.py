"""Tables of Delta and Iceberg: rows that were deleted or replaced never count."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from fsspec.implementations.memory import MemoryFileSystem
from pyiceberg.catalog.sql import SqlCatalog
from pyiceberg.manifest import DataFileContent
from pyiceberg.table import Table

from krea_dagster.errors import ConfigError
from krea_dagster.prompts import PromptTable, parse_partition_by
from tests.prompts.reference import read_rows
from tests.prompts.table_writers import delete_in_delta, delete_in_iceberg

ROWS = pa.table(
    {
        "prompt_id": ["a", "b", "c", "d"],
        "prompt": ["a boat", "a gull", "a buoy", "a lamp"],
        "theme": ["sea", "sea", "coast", "coast"],
    }
)


def opened(source: Any, by: str = "column:theme") -> PromptTable:
    return PromptTable(source, parse_partition_by(by))


def prompts_of(table: PromptTable) -> dict[str | None, str | None]:
    return {row.prompt_id: row.prompt for row in read_rows(table).rows}


def refused(source: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(source, "hash:2").plan()
    return str(caught.value)


# -- Delta --------------------------------------------------------------------------------------


@pytest.fixture
def delta(tmp_path: Path) -> Path:
    write_deltalake(str(tmp_path / "table"), ROWS, partition_by=["theme"])
    return tmp_path / "table"


def test_a_delta_table_has_its_newest_version(delta: Path) -> None:
    table = opened(delta)
    assert len(prompts_of(table)) == 4
    assert table.partition_keys() == ["coast", "sea"]
    DeltaTable(str(delta)).delete("prompt_id = 'b'")
    DeltaTable(str(delta)).update({"prompt": "'a red buoy'"}, predicate="prompt_id = 'c'")
    assert len(list(delta.rglob("*.parquet"))) > 2, "files of earlier versions are still there"
    assert prompts_of(table) == {"a": "a boat", "c": "a red buoy", "d": "a lamp"}
    assert table.row_count() == 3


def test_rows_in_a_deletion_vector_do_not_count(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    write_deltalake(str(folder), ROWS)
    delete_in_delta(folder, [1, 3])
    assert prompts_of(opened(folder)) == {"a": "a boat", "c": "a buoy"}
    assert prompts_of(opened(DeltaTable(str(folder)))) == {"a": "a boat", "c": "a buoy"}


def test_the_mark_of_a_delta_table_is_its_version(delta: Path) -> None:
    table = opened(delta)
    first = table.mark()
    assert first == table.mark() != ""
    write_deltalake(str(delta), ROWS.slice(0, 1), mode="overwrite")
    assert table.mark() not in ("", first)
    # A table that replaced another one begins with the same numbers.
    shutil.rmtree(delta)
    write_deltalake(str(delta), ROWS)
    assert table.mark() not in ("", first)


def test_a_pinned_delta_table_stays_at_its_version(delta: Path) -> None:
    pinned = opened(delta).pinned()
    DeltaTable(str(delta)).delete("prompt_id = 'b'")
    assert len(prompts_of(pinned)) == 4


def test_a_version_is_copied_once(delta: Path) -> None:
    table = opened(delta)
    first, second = table.pinned().source.files()[0], table.pinned().source.files()[0]
    assert first.owner is second.owner
    DeltaTable(str(delta)).delete("prompt_id = 'b'")
    assert table.pinned().source.files()[0].owner is not first.owner


def test_without_its_library_a_delta_table_is_refused(
    delta: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    said = refused(delta)
    assert f"{delta} is a Delta table, and deltalake is not installed" in said
    assert "pip install 'krea-dagster[delta]'" in said


def test_a_delta_table_that_needs_more_than_the_library_can_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "table"
    write_deltalake(str(folder), ROWS)
    delete_in_delta(folder, [1])
    log = folder / "_delta_log" / f"{1:020}.json"
    log.write_text(log.read_text().replace("deletionVectors", "featureOfTomorrow"))
    assert "featureOfTomorrow" in refused(folder)


def test_parts_of_a_delta_table_are_refused(delta: Path) -> None:
    part = delta / "theme=sea"
    (file,) = part.glob("*.parquet")
    for source in (part, file):
        assert f"{source} is a part of {delta}, a Delta table" in refused(source)
    said = refused(delta.parent)
    assert f"{delta} is a Delta table" in said
    assert "rows that were deleted" in said


def test_a_delta_table_behind_a_url_is_not_read_as_parquet(delta: Path, memory: Any) -> None:
    memory.put(str(delta), "/lake/table", recursive=True)
    assert "memory://lake/table cannot be read as a Delta table" in refused("memory://lake/table")
    assert "is a part of /lake/table, a Delta table" in refused("memory://lake/table/theme=sea")
    assert "memory://lake/table is a Delta table" in refused("memory://lake")


def test_a_hudi_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "table" / ".hoodie").mkdir(parents=True)
    (tmp_path / "table" / ".hoodie" / "hoodie.properties").write_text("")
    pq.write_table(ROWS, tmp_path / "table" / "a.parquet")
    assert "is a Hudi table" in refused(tmp_path / "table")


# -- Iceberg ------------------------------------------------------------------------------------


@pytest.fixture
def iceberg(tmp_path: Path) -> Iterator[Table]:
    catalog = SqlCatalog(
        "test", uri=f"sqlite:///{tmp_path}/catalog.db", warehouse=f"file://{tmp_path}"
    )
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.prompts", schema=ROWS.schema)
    table.append(ROWS)
    yield table
    catalog.close()


def folder_of(table: Table) -> Path:
    return Path(table.location().removeprefix("file://"))


def test_a_function_gives_the_version_that_the_catalog_knows(iceberg: Table) -> None:
    def load() -> Table:
        return iceberg.refresh()

    table = opened(load)
    first = table.mark()
    assert len(prompts_of(table)) == 4
    assert first == table.mark() != ""
    iceberg.delete("prompt_id = 'b'")
    assert table.mark() not in ("", first)
    assert prompts_of(table) == {"a": "a boat", "c": "a buoy", "d": "a lamp"}
    assert prompts_of(opened(iceberg)) == prompts_of(table)


def test_a_folder_needs_a_version_hint_and_a_metadata_file_needs_none(iceberg: Table) -> None:
    iceberg.delete("prompt_id = 'b'")
    folder = folder_of(iceberg)
    said = refused(folder)
    assert "only its catalog knows which version is current" in said
    assert "iceberg://CATALOG/NAMESPACE.TABLE" in said
    metadata = Path(iceberg.metadata_location.removeprefix("file://"))
    assert len(prompts_of(opened(metadata))) == 3
    (folder / "metadata" / "version-hint.text").write_text(metadata.name)
    assert len(prompts_of(opened(folder))) == 3


def test_a_catalog_is_asked_by_its_name_also_from_the_command_line(
    iceberg: Table, tmp_path: Path
) -> None:
    """pyiceberg reads the catalog from its own variables or file."""
    iceberg.delete("prompt_id = 'b'")
    command = [sys.executable, "-m", "krea_dagster.cli", "quote", "--json"]
    environ = {
        **os.environ,
        "KREA_STORAGE": str(tmp_path / "krea"),
        "PYICEBERG_CATALOG__TEST__TYPE": "sql",
        "PYICEBERG_CATALOG__TEST__URI": f"sqlite:///{tmp_path}/catalog.db",
    }

    found = subprocess.run(
        [*command, "--prompts", "iceberg://test/shop.prompts"],
        env=environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["total"]["asked"] == 3


def test_a_catalog_that_is_not_known_is_named() -> None:
    said = refused("iceberg://nowhere/shop.ideas")
    assert "iceberg://nowhere/shop.ideas cannot be read as an Iceberg table" in said


def test_rows_in_a_position_delete_file_do_not_count(iceberg: Table) -> None:
    (data,) = (folder_of(iceberg) / "data").rglob("*.parquet")
    positions = pa.table({"file_path": [f"file://{data}"] * 2, "pos": [1, 3]})
    delete_in_iceberg(iceberg, positions, DataFileContent.POSITION_DELETES)
    assert prompts_of(opened(folder_of(iceberg))) == {"a": "a boat", "c": "a buoy"}


def test_equality_deletes_which_the_library_cannot_read_are_refused(iceberg: Table) -> None:
    keys = pa.table({"prompt_id": ["b"]})
    delete_in_iceberg(iceberg, keys, DataFileContent.EQUALITY_DELETES, equality_ids=[1])
    assert "does not yet support equality deletes" in refused(folder_of(iceberg))


def test_parts_of_an_iceberg_table_are_refused(iceberg: Table) -> None:
    folder = folder_of(iceberg)
    assert f"is a part of {folder}, an Iceberg table" in refused(folder / "data")
    assert f"{folder} is an Iceberg table" in refused(folder.parent)


def test_without_its_library_an_iceberg_table_is_refused(
    iceberg: Table, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyiceberg", None)
    assert "pip install 'krea-dagster[iceberg]'" in refused(folder_of(iceberg))


def test_an_iceberg_table_behind_a_url_is_read_as_its_url_is_opened(
    memory: Any, tmp_path: Path
) -> None:
    catalog = SqlCatalog(
        "test",
        **{
            "uri": f"sqlite:///{tmp_path}/catalog.db",
            "warehouse": "memory://lake",
            "py-io-impl": "tests.prompts.table_writers.InMemory",
        },
    )
    catalog.create_namespace("shop")
    table = catalog.create_table("shop.prompts", schema=ROWS.schema)
    table.append(ROWS)
    table.delete("prompt_id = 'b'")
    catalog.close()
    url, version = table.location(), table.metadata_location.rpartition("/")[2]
    memory.pipe_file(f"{url}/metadata/version-hint.text", version.encode())
    expected = {"a": "a boat", "c": "a buoy", "d": "a lamp"}
    assert prompts_of(opened(url)) == expected
    assert prompts_of(opened(table.metadata_location)) == expected
    assert ", an Iceberg table: name the table" in refused(f"{url}/data")
    assert "is an Iceberg table" in refused(url.rpartition("/")[0])


class Counting(MemoryFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Counts who asks whether a folder is a Delta table; the first waits a moment for a second."""

    protocol = "counting"
    store: ClassVar[dict[str, Any]] = {}
    asked: ClassVar[list[str]] = []
    second_asked: ClassVar[threading.Event] = threading.Event()

    def info(self, path: str, **options: Any) -> Any:
        if path.endswith("_delta_log"):
            self.asked.append(path)
            if len(self.asked) > 1:
                self.second_asked.set()
            self.second_asked.wait(0.2)
        return super().info(path, **options)


def test_two_readings_of_a_file_at_the_same_time_ask_once_what_is_around_it() -> None:
    """A run plans, and compares the table with the journal, at the same time."""
    fsspec.register_implementation("counting", Counting, clobber=True)
    with fsspec.open("counting://bucket/prompts.parquet", "wb") as file:
        pq.write_table(pa.table({"prompt": ["a boat"]}), file)
    table = PromptTable("counting://bucket/prompts.parquet", parse_partition_by("hash:2")).pinned()
    with ThreadPoolExecutor(2) as threads:
        rows = [threads.submit(table.row_count) for _ in range(2)]
        assert [one.result() for one in rows] == [1, 1]
    assert len(Counting.asked) == 1

"""Partial files of killed runs are removed; those of living ones are kept."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import BinaryIO

import pytest

from krea_dagster.engine.storage import temp_files
from krea_dagster.engine.storage.storage import Storage

ROOT = Path(__file__).parents[2]

_KILLED = """
import os, sys
from krea_dagster.engine.storage.storage import Storage
path, _ = Storage(sys.argv[1]).create_temporary()
path.write_bytes(b"half of an image")
print(path, flush=True)
{then}
"""


def begun_elsewhere(folder: Path, then: str) -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen(
        [sys.executable, "-c", _KILLED.format(then=then), str(folder)],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def store(folder: Path) -> None:
    def write(file: BinaryIO) -> None:
        file.write(b"x")

    Storage(str(folder)).write("a/b", write)


def test_files_of_a_killed_process_are_removed_by_the_next_one(tmp_path: Path) -> None:
    process, left = begun_elsewhere(tmp_path, "os._exit(9)")
    process.communicate()
    assert left.exists()
    store(tmp_path)
    assert not left.exists()


def test_files_of_a_living_process_are_kept(tmp_path: Path) -> None:
    process, written = begun_elsewhere(tmp_path, "input()")
    store(tmp_path)
    assert written.exists()
    process.kill()
    process.communicate()
    store(tmp_path)
    assert not written.exists()


@pytest.mark.parametrize("name", ["0123456789ab-1-1-0.part", "tmpx1y2.part", "of a person.txt"])
def test_files_of_unknown_processes_are_kept_for_a_day(tmp_path: Path, name: str) -> None:
    """Of another machine that shares the folder, or of an earlier version."""
    folder = tmp_path / temp_files.FOLDER
    folder.mkdir()
    (folder / name).write_bytes(b"x")
    store(tmp_path)
    assert (folder / name).exists()
    long_ago = time.time() - 25 * 3600
    os.utime(folder / name, (long_ago, long_ago))
    store(tmp_path)
    assert not (folder / name).exists()


def test_file_names_are_unique() -> None:
    assert len({temp_files.new_name() for _ in range(1000)}) == 1000

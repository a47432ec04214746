"""The planning benchmark's journal is one that a run can read."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from benchmarks.planning import forget, plan, write_done, write_table


def test_a_run_over_the_table_finds_every_image_stored(tmp_path: Path) -> None:
    options = Namespace(folder=tmp_path, rows=40)
    write_table(options)
    write_done(options)
    assert plan(options)["left"] == 0
    next((tmp_path / "krea" / "images").glob("*/*")).unlink()
    assert plan(options)["left"] == 1


def test_one_row_of_a_hundred_is_made_new(tmp_path: Path) -> None:
    options = Namespace(folder=tmp_path, rows=200)
    write_table(options)
    write_done(options)
    assert forget(options)["left"] == plan(options)["left"] == 2

"""The check of the files of images: their size, and the hashes of a sample."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from krea_dagster.plugin.checks import (
    build_files_check,
)
from tests.plugin.checks.stored_manifests import (
    ERROR,
    StoredManifests,
    named,
    number,
)

pytestmark = pytest.mark.filterwarnings("ignore::dagster.BetaWarning")  # backfill_policy is beta


def test_a_missing_a_short_and_a_changed_file_are_found(stored: StoredManifests) -> None:
    rows = [stored.row(n) for n in range(6)]
    stored.write([*rows, stored.failed(9), stored.row(7, image_path="/elsewhere/7.png")])
    path = [Path(row["image_path"]) for row in rows]
    path[1].unlink()
    path[2].write_bytes(b"cut")
    path[3].write_bytes(b"CONTENT 3")  # of the same size
    check = stored.check(functools.partial(build_files_check, sample=None))
    assert (check.passed, check.severity) == (False, ERROR)
    found = named(check)
    assert set(found) == {"row-0001", "row-0002", "row-0003", "row-0007"}
    assert "is missing" in found["row-0001"]
    assert "3 bytes instead of 9" in found["row-0002"]
    assert "other content" in found["row-0003"]
    assert "is not under" in found["row-0007"]
    assert (number(check, "rows_checked"), number(check, "files_hashed")) == (7, 4)
    # The sizes alone do not tell of the changed one.
    check = stored.check(functools.partial(build_files_check, sample=0))
    assert set(named(check)) == set(found) - {"row-0003"}


def test_the_sample_is_the_same_for_the_same_seed_and_its_seed_is_told(
    stored: StoredManifests,
) -> None:
    rows = [stored.row(n) for n in range(40)]
    stored.write(rows[:25])
    stored.write(rows[25:], "c")
    for row in rows:
        Path(row["image_path"]).write_bytes(b"x" * row["image_bytes"])
    found = []
    for seed in (1, 1, 2):
        check = stored.check(functools.partial(build_files_check, sample=8, seed=seed))
        assert (number(check, "files_hashed"), number(check, "findings_count")) == (8, 8)
        assert number(check, "sample_seed") == seed
        found.append(set(named(check)))
    assert found[0] == found[1] != found[2]
    drawn = [
        number(stored.check(functools.partial(build_files_check, sample=8)), "sample_seed")
        for _ in range(2)
    ]
    assert drawn[0] != drawn[1]  # from the run, so that in time all files have their turn


def test_files_behind_a_url_are_looked_at_there() -> None:
    stored = StoredManifests("memory://checks/krea")
    stored.write([stored.row(n, content=None if n == 3 else b"image") for n in range(5)])
    check = stored.check(functools.partial(build_files_check, sample=None))
    assert list(named(check)) == ["row-0003"]
    assert number(check, "files_hashed") == 4


def test_what_the_run_has_bought_is_not_hashed_again(stored: StoredManifests) -> None:
    rows = [stored.row(n, run_id="an earlier run") for n in range(3)]

    def buy(run_id: str) -> None:
        stored.write([*rows, *(stored.row(n, run_id=run_id) for n in range(3, 7))])

    check = stored.check(build_files_check, "a", before=buy)
    assert (number(check, "rows_checked"), number(check, "files_hashed")) == (7, 3)
    assert check.description == (
        "All 7 files exist in their full size; 3 hashes were compared, and 4 files were hashed as "
        "this run stored them."
    )
    every = functools.partial(build_files_check, sample=None)
    assert number(stored.check(every, "a", before=buy), "files_hashed") == 7


def test_files_of_a_root_that_was_moved_are_looked_for_where_they_are_now(
    stored: StoredManifests,
) -> None:
    rows = [stored.row(n) for n in range(3)]
    places = [Path(row["image_path"]) for row in rows]
    elsewhere = [f"/old/place/images/{path.parent.name}/{path.name}" for path in places]
    stored.write([{**row, "image_path": old} for row, old in zip(rows, elsewhere, strict=True)])
    assert stored.check(build_files_check).passed
    places[1].unlink()
    found = stored.check(build_files_check)
    assert set(named(found)) == {"row-0001"}

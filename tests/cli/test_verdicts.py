"""The commands ``verdicts export`` and ``verdicts import``: what they print."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from krea_dagster.application.krea import Krea
from krea_dagster.cli.main import main
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.errors import InputError
from tests.curation.review.review_harness import make_project, sha256


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which one image is kept."""
    folder = tmp_path_factory.mktemp("verdicts") / "krea"
    make_project(folder, rows=8, subjects=1, measured=False)
    with Krea.from_environment({"KREA_STORAGE": str(folder)}).open_journal() as journal:
        journal.verdicts.add(
            [Verdict("one", sha256(0), "keep", "ada", "key", "prompt-000000", 0, 0, "bucket-000")]
        )
    return folder


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["verdicts", *arguments])


def test_verdicts_go_out_and_in(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    done = run("export", str(file), "--storage", str(root))
    assert done.output == f"1 row in {file}\n"
    file.write_text(
        file.read_text() + f"{sha256(1)},,,,flag,,bob,,,\n{sha256(99)},,,,keep,,bob,,,\n"
    )
    done = run("import", str(file), "--storage", str(root))
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "rows           3",
        "added          1",
        "already here   1",
        "older          0, left out",
        "unknown        1 images, left out",
    ]
    assert done.stderr == f"This project has no such image: verdicts.csv row 3: {sha256(99)}\n"
    done = run("import", str(file), "--storage", str(root), "--json")
    assert json.loads(done.stdout) == {
        "rows": 3,
        "added": 0,
        "already_here": 2,
        "older": 0,
        "unknown_images": 1,
    }


def test_a_wrong_row_is_an_error(root: Path, tmp_path: Path) -> None:
    file = tmp_path / "verdicts.csv"
    file.write_text(f"image_sha256,verdict\n{sha256(1)},yes\n")
    done = run("import", str(file), "--storage", str(root))
    assert isinstance(done.exception, InputError)
    assert "row 1: verdict is 'yes'" in str(done.exception)

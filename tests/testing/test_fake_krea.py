"""The kit for users' tests: the page's code is a test file that passes, and users pay no import."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from krea_dagster.testing import SMALL_TABLE, FakeKrea, write_prompts

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "how-to" / "testing.md").read_text(encoding="utf-8")


def test_the_pages_code_is_a_conftest_and_a_test_file_that_passes(tmp_path: Path) -> None:
    conftest, *blocks = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    (tmp_path / "conftest.py").write_text(conftest)
    (tmp_path / "test_project.py").write_text("\n".join(blocks))
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-W", "error"]
    done = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{PAGE.count('def test_')} passed" in done.stdout


def test_each_storage_root_has_an_account_of_its_own(tmp_path: Path) -> None:
    one, other = (FakeKrea(storage=str(tmp_path / name)) for name in ("one", "other"))
    one.generate(["a boat"])
    assert (one.bought, one.credits_charged) == (["a boat"], 0.45)
    assert (other.bought, other.credits_charged) == ([], 0.0)
    one.close()
    other.close()


def test_a_budget_is_that_of_the_resource(tmp_path: Path) -> None:
    krea = FakeKrea(storage=str(tmp_path), run_credits=0.5)
    manifest = krea.generate(["a boat", "a gull"])
    assert sorted(manifest["status"].to_pylist()) == ["deferred", "stored"]
    krea.close()


def test_the_small_table_is_written_where_it_is_wanted(tmp_path: Path) -> None:
    path = write_prompts(tmp_path / "new")
    assert path == str(tmp_path / "new" / "prompts.parquet")
    assert pq.read_table(path).to_pydict() == dict(SMALL_TABLE)


def test_who_does_not_test_imports_neither_the_kit_nor_pytest() -> None:
    code = (
        "import sys, krea_dagster; krea_dagster.KreaResource\n"
        "assert not {'pytest', 'krea_dagster.testing', 'uvicorn'} & set(sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=False)
    assert done.returncode == 0

"""Several commands start at once without a root, journal or DAGSTER_HOME.

KREA_BEGINNERS=8 starts as many.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from krea_dagster.emulator import Emulator
from tests.dagster_bench import write_table
from tests.scenarios.conftest import KEY

ROOT: Final = Path(__file__).parents[2]
BEGINNERS: Final = int(os.environ.get("KREA_BEGINNERS", "4"))
ROWS: Final = 12


def begin_together(folder: Path, settings: dict[str, str]) -> list[tuple[int, str]]:
    """Run ``materialize`` in several processes; return exit codes and outputs."""
    command = [sys.executable, "-m", "tests.scenarios.commands_at_once"]
    done = subprocess.run(
        [*command, str(BEGINNERS), str(folder), "materialize"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, **settings},
        cwd=ROOT,
        check=True,
        timeout=300,
    )
    codes = json.loads(done.stdout)
    return [(code, (folder / f"{n}.txt").read_text()) for n, code in enumerate(codes)]


@pytest.mark.parametrize(
    ("partition_by", "home"), [("column:category", "home"), ("day:day", "beside what is made")]
)
def test_concurrent_first_runs_succeed_and_buy_each_image_once(
    tmp_path: Path, server: Emulator, journal_url: str, partition_by: str, home: str
) -> None:
    settings = {
        "EVOLINK_API_KEY": KEY,
        "EVOLINK_BASE_URL": server.url,
        "KREA_PROMPTS": write_table(
            tmp_path / "prompts.parquet",
            {
                "prompt": [f"boat {number}" for number in range(ROWS)],
                "category": [f"category {number % 4}" for number in range(ROWS)],
                "day": [f"2026-01-{1 + number % 4:02d}" for number in range(ROWS)],
            },
        ),
        "KREA_STORAGE": str(tmp_path / "krea"),
        "KREA_PARTITION_BY": partition_by,
    }
    if home == "home":
        settings["DAGSTER_HOME"] = str(tmp_path / "home")
    if not journal_url.startswith("sqlite"):
        settings["KREA_JOURNAL_URL"] = journal_url
    ended = begin_together(tmp_path, settings)
    assert [text for code, text in ended if code != 0] == []
    books = server.stats()
    assert (books["creates"], books["bodies_bought_more_than_once"]) == (ROWS, 0)

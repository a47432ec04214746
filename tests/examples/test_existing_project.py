"""The example of an existing project, with the testing kit instead of EvoLink."""

import runpy
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from krea_dagster.testing import FakeKrea
from tests.dagster_bench import QUIET, RANGE_END, RANGE_START

pytest_plugins = ["krea_dagster.testing.fixtures"]

ROOT = Path(__file__).parents[2]
FILE = ROOT / "examples" / "existing_project" / "definitions.py"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setenv("EXAMPLE_FOLDER", str(tmp_path))
    return runpy.run_path(str(FILE))


def test_one_job_writes_the_prompts_buys_the_images_and_lists_them(
    module: dict[str, Any], fake_krea: FakeKrea
) -> None:
    job = module["build"](fake_krea).resolve_job_def("everything")
    tags = {RANGE_START: "bucket-000", RANGE_END: "bucket-001"}
    result = job.execute_in_process(run_config=QUIET, tags=tags)
    steps = [event.step_key for event in result.all_events if event.is_step_start]
    assert steps.index("products") < steps.index("vases__images") < steps.index("catalog")
    files = result.output_for_node("catalog")
    assert len(files) == len(fake_krea.bought) == 3
    assert all(Path(file).is_file() for file in files)


def test_nothing_of_the_project_is_replaced(module: dict[str, Any], fake_krea: FakeKrea) -> None:
    defs = module["build"](fake_krea)
    dg.Definitions.validate_loadable(defs)
    assert type(defs.resources["krea"]).__name__ == "OwnResource"
    assert defs.resources["vases_krea"] == fake_krea
    assert defs.resolve_schedule_def("vases_krea_schedule").cron_schedule == "0 3 * * *"


def test_its_page_shows_this_file() -> None:
    _, code = FILE.read_text(encoding="utf-8").split('"""\n\n', 1)
    page = ROOT / "docs" / "how-to" / "existing-project.md"
    assert f"```python\n{code}```" in page.read_text(encoding="utf-8")

"""What a person sees of a project in which all went well: graph, asset, prompts, and run log."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import dagster as dg
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from playwright.sync_api import Page, expect

from krea_dagster.emulator import Emulator
from tests.browser.dagster_server import ROOT, keep, open_page, project_environment, serving
from tests.dagster_bench import RANGE_END, RANGE_START

pytestmark = pytest.mark.browser

#: Materializes all assets, those of the spend and of the curation too.
_ALL = f"""
import dagster as dg
from krea_dagster import definitions_from_environment

job = definitions_from_environment().resolve_implicit_global_asset_job_def()
tags = {{"{RANGE_START}": "bucket-000", "{RANGE_END}": "bucket-007"}}
with dg.DagsterInstance.get() as instance:
    assert job.execute_in_process(instance=instance, tags=tags).success
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a project whose prompts are all delivered, and whose assets all made."""
    folder = tmp_path_factory.mktemp("postcards", numbered=False)
    sample = pq.read_table(ROOT / "data" / "prompts.parquet")
    asks_for_a_fault = pc.match_substring(sample["prompt"], "[emulator:")
    pq.write_table(sample.filter(pc.invert(asks_for_a_fault)), folder / "prompts.parquet")
    # One task after the other takes over 30 seconds, so that the log has a line of progress.
    with Emulator(api_key="emulator", latency_s=0.6) as emulator:
        environment = project_environment(
            folder,
            EVOLINK_API_KEY="emulator",
            EVOLINK_BASE_URL=emulator.url,
            KREA_PROMPTS=str(folder / "prompts.parquet"),
            KREA_MAX_IN_FLIGHT="1",
        )
        for program in (["-m", "krea_dagster.cli", "materialize"], ["-c", _ALL]):
            command = [sys.executable, *program]
            subprocess.run(command, cwd=ROOT, env=environment, timeout=300, check=True)
        yield environment


@pytest.fixture(scope="module")
def ui(made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``dg dev`` over the project's instance."""
    with serving(made, tmp_path_factory.mktemp("ui")) as url:
        yield url


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a headless Chromium."""
    with open_page() as page:
        yield page


def test_the_whole_graph_is_green(page: Page, ui: str) -> None:
    page.goto(f"{ui}/asset-groups/")
    page.get_by_text("Hide navigation").click()
    page.reload()
    for name in ("prompts", "images", "image_manifest", "accepted_images", "spend_daily"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    keep(page, "asset-graph")


def test_an_asset_shows_its_thumbnails_first(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=partitions&partition=bucket-000")
    first = page.get_by_text("krea/thumbnails", exact=True).first
    expect(first).to_be_visible()
    bought = page.get_by_text("krea/images_bought", exact=True).first
    boxes = first.bounding_box(), bought.bounding_box()
    assert boxes[0] is not None
    assert boxes[1] is not None
    assert boxes[0]["y"] < boxes[1]["y"]
    keep(page, "asset-page")


def test_prompts_has_columns_and_the_prompts_of_a_partition(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/prompts?view=overview")
    expect(page.get_by_text("num_images").first).to_be_visible()
    keep(page, "prompts-page")


def test_the_log_of_a_run_says_what_it_bought_and_where_it_is(
    page: Page, ui: str, made: dict[str, str]
) -> None:
    with dg.DagsterInstance.from_config(made["DAGSTER_HOME"]) as instance:
        run_id = instance.get_run_ids()[-1]
    page.goto(f"{ui}/runs/{run_id}?levels=critical|error|info|warning")
    expect(page.get_by_text("stored already").first).to_be_visible()
    expect(page.get_by_text("to go: ").first).to_be_visible()
    expect(page.get_by_text("images ended").first).to_be_visible()
    keep(page, "run-log")

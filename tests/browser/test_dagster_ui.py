"""What a person sees in Dagster's UI after some runs, in a real browser against ``dg dev``.

``KREA_DOCS_IMAGES`` names a folder for screenshots (``make docs-images``).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pyarrow.compute as pc
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, Response, expect

from krea_dagster.application.manifest_summary import StoredFile
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import read_manifests
from krea_dagster.plugin.metadata import contact_sheet
from tests.browser.dagster_server import ROOT, keep, open_page, project_environment, serving

KEY = "sk-a-key-that-must-not-show"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a project that was materialized three times, with a key."""
    folder = tmp_path_factory.mktemp("project")
    with Emulator(api_key=KEY, latency_s=0.05) as emulator:
        environment = project_environment(
            folder,
            EVOLINK_API_KEY=KEY,
            EVOLINK_BASE_URL=emulator.url,
            KREA_PROMPTS=str(
                shutil.copy(ROOT / "data" / "prompts.parquet", folder / "prompts.parquet")
            ),
        )
        for again in ((), ("terrace-rice-01", "dune-shadow-01"), ("dune-shadow-01",)):
            wishes = [word for prompt_id in again for word in ("--again", prompt_id)]
            command = [sys.executable, "-m", "krea_dagster.cli", "materialize", *wishes]
            done = subprocess.run(command, cwd=ROOT, env=environment, timeout=180, check=False)
            assert done.returncode == 1, "two of the sample's rows are refused"
        if docs := os.environ.get("KREA_DOCS_IMAGES"):
            storage = Storage(environment["KREA_STORAGE"])
            keys = [f"bucket-{number:03d}" for number in range(8)]
            stored = read_manifests(storage, keys).filter(pc.field("image_path").is_valid())[:36]
            files = map(
                StoredFile,
                stored["image_path"].to_pylist(),
                stored["image_sha256"].to_pylist(),
            )
            sheet = contact_sheet([*files], storage, columns=9)
            assert sheet is not None
            Path(docs, "contact-sheet.jpg").write_bytes(sheet)
        yield environment


@pytest.fixture(scope="module")
def ui(made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``dg dev`` over the project's instance."""
    with serving(made, tmp_path_factory.mktemp("ui")) as url:
        yield url


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What the server has sent to the page, as texts."""
    return []


@pytest.fixture(scope="module")
def page(answers: list[str]) -> Iterator[Page]:
    """A page of a headless Chromium."""
    with open_page() as page:

        def note(response: Response) -> None:
            if "/graphql" in response.url:
                with suppress(PlaywrightError):  # the page was left before it came
                    answers.append(response.text())

        page.on("response", note)
        yield page


def test_a_partition_shows_its_figures_and_its_thumbnails(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=partitions&partition=bucket-000")
    expect(page.get_by_text("credits_charged").first).to_be_visible()
    page.get_by_text("Show Markdown").first.click()
    sheet = page.locator("img[src^='data:image/jpeg']").first
    expect(sheet).to_be_visible()
    assert sheet.evaluate("image => image.naturalWidth") > 100
    keep(page, "partition-thumbnails")
    page.keyboard.press("Escape")


def test_credits_and_counts_are_plotted_over_the_runs(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=overview")
    page.get_by_text("Plots", exact=True).first.click()
    page.get_by_role("button", name="Events").click()  # over time, not by partition
    expect(page.get_by_text("credits_spent_by_run").first).to_be_visible()
    keep(page, "plots")


def test_the_failed_check_names_the_rows_that_are_missing(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=checks")
    expect(page.get_by_text("all_rows_delivered").first).to_be_visible()
    expect(page.get_by_text("rows have no image").first).to_be_visible()
    keep(page, "failed-check")


def test_the_launchpad_shows_the_resources_fields(page: Page, ui: str) -> None:
    page.goto(f"{ui}/locations/definitions.py/jobs/krea_images/playground")
    expect(page.get_by_text("max_in_flight").first).to_be_visible()
    keep(page, "launchpad")


def test_no_page_and_no_answer_holds_a_secret(page: Page, ui: str, answers: list[str]) -> None:
    for path in ("locations/definitions.py/resources/krea", "runs", "overview/resources"):
        page.goto(f"{ui}/{path}", wait_until="networkidle")
        assert KEY not in page.content()
    assert sum(map(len, answers)) > 100_000, "the answers were looked at"
    assert any("EVOLINK_API_KEY" in answer for answer in answers), "it is shown by its name"
    assert not any(KEY in answer for answer in answers)

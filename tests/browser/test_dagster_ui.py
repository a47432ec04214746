"""What a person sees in Dagster's UI after some runs, in a real browser against ``dg dev``.

``KREA_DOCS_IMAGES`` names a folder for screenshots (``make docs-images``).
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import httpx
import pyarrow.compute as pc
import pytest
from playwright.sync_api import Error as PlaywrightError
from playwright.sync_api import Page, Response, expect

from krea_dagster.application.manifest_summary import StoredFile
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import read_manifests
from krea_dagster.plugin.metadata import contact_sheet
from tests.browser.pages import chromium
from tests.dagster_bench import end_group

ROOT = Path(__file__).parents[2]
START_S = 120.0
KEY = "sk-a-key-that-must-not-show"

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a project that was materialized three times, with a key."""
    folder = tmp_path_factory.mktemp("project")
    with Emulator(api_key=KEY, latency_s=0.05) as emulator:
        environment = {
            **os.environ,
            "KREA_STORAGE": str(folder / "krea"),
            "EVOLINK_API_KEY": KEY,
            "EVOLINK_BASE_URL": emulator.url,
            "DAGSTER_HOME": str(folder / "home"),
        }
        (folder / "home").mkdir()
        (folder / "home" / "dagster.yaml").write_text(
            "telemetry:\n  enabled: false\nnux:\n  enabled: false\n"
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
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dg = Path(sys.executable).with_name("dg")
    log_file = tmp_path_factory.mktemp("ui") / "dg-dev.log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(
            [dg, "dev", "-f", "definitions.py", "-h", "127.0.0.1", "-p", str(port)],
            cwd=ROOT,
            env=made,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, server)
            yield url
        finally:
            end_group(server)


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What the server has sent to the page, as texts."""
    return []


@pytest.fixture(scope="module")
def page(answers: list[str]) -> Iterator[Page]:
    """A page of a headless Chromium."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with chromium(*quiet) as browser:
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        page.set_default_timeout(45_000)

        def keep(response: Response) -> None:
            if "/graphql" in response.url:
                with suppress(PlaywrightError):  # the page was left before it came
                    answers.append(response.text())

        page.on("response", keep)
        yield page


def test_the_asset_graph_shows_prompts_images_and_manifest(page: Page, ui: str) -> None:
    page.goto(f"{ui}/asset-groups/")
    for name in ("prompts", "images", "image_manifest"):
        expect(page.get_by_text(name, exact=True).first).to_be_visible()
    page.wait_for_timeout(3000)
    _keep(page, "asset-graph")


def test_a_partition_shows_its_figures_and_its_thumbnails(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=partitions&partition=bucket-000")
    expect(page.get_by_text("credits_charged").first).to_be_visible()
    page.get_by_text("Show Markdown").first.click()
    sheet = page.locator("img[src^='data:image/jpeg']").first
    expect(sheet).to_be_visible()
    assert sheet.evaluate("image => image.naturalWidth") > 100
    page.wait_for_timeout(500)
    _keep(page, "partition-thumbnails")
    page.keyboard.press("Escape")


def test_credits_and_counts_are_plotted_over_the_runs(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=overview")
    page.get_by_text("Plots", exact=True).first.click()
    page.get_by_role("button", name="Events").click()  # over time, not by partition
    expect(page.get_by_text("credits_spent_by_run").first).to_be_visible()
    page.wait_for_timeout(1500)
    _keep(page, "plots")


def test_the_failed_check_names_the_rows_that_are_missing(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=checks")
    expect(page.get_by_text("all_rows_delivered").first).to_be_visible()
    expect(page.get_by_text("rows have no image").first).to_be_visible()
    page.wait_for_timeout(500)
    _keep(page, "failed-check")


def test_the_launchpad_shows_the_resources_fields(page: Page, ui: str) -> None:
    page.goto(f"{ui}/locations/definitions.py/jobs/krea_images/playground")
    expect(page.get_by_text("max_in_flight").first).to_be_visible()
    page.wait_for_timeout(500)
    _keep(page, "launchpad")


def test_no_page_and_no_answer_holds_a_secret(page: Page, ui: str, answers: list[str]) -> None:
    for path in ("locations/definitions.py/resources/krea", "runs", "overview/resources"):
        page.goto(f"{ui}/{path}")
        page.wait_for_timeout(1500)
        assert KEY not in page.content()
    assert sum(map(len, answers)) > 100_000, "the answers were looked at"
    assert any("EVOLINK_API_KEY" in answer for answer in answers), "it is shown by its name"
    assert not any(KEY in answer for answer in answers)


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the web server ended"
        try:
            if httpx.get(f"{url}/server_info", timeout=2.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    pytest.fail("the web server did not start")


def _keep(page: Page, name: str) -> None:
    if folder := os.environ.get("KREA_DOCS_IMAGES"):
        page.screenshot(path=str(Path(folder) / f"{name}.png"))

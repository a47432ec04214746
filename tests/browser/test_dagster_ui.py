"""What a person sees in Dagster's UI after the demo, in a real browser.

``KREA_DOCS_IMAGES`` names a folder for the screenshots, which is how docs/images is made.
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from krea_dagster.engine.storage import Storage
from krea_dagster.manifest import read_manifests
from krea_dagster.plugin.metadata import contact_sheet

ROOT = Path(__file__).parents[2]
START_S = 90.0

pytestmark = pytest.mark.browser


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a finished demo."""
    folder = tmp_path_factory.mktemp("demo")
    environment = {**os.environ, "KREA_STORAGE": str(folder / "krea")}
    environment.pop("DAGSTER_HOME", None)  # the demo's own, which greets nobody
    command = [sys.executable, "-m", "krea_dagster.cli", "demo"]
    subprocess.run(command, cwd=ROOT, env=environment, check=True, timeout=180)
    environment["DAGSTER_HOME"] = str(folder / "krea" / "dagster")
    if docs := os.environ.get("KREA_DOCS_IMAGES"):
        storage = Storage(environment["KREA_STORAGE"])
        keys = [f"bucket-{number:03d}" for number in range(8)]
        sheet = contact_sheet(read_manifests(storage, keys), storage, most=36, columns=9)
        assert sheet is not None
        Path(docs, "contact-sheet.jpg").write_bytes(sheet)
    return environment


@pytest.fixture(scope="module")
def ui(made: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a web server over the demo's instance."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    webserver = Path(sys.executable).with_name("dagster-webserver")
    log_file = tmp_path_factory.mktemp("ui") / "webserver.log"
    with log_file.open("wb") as log:
        server = subprocess.Popen(
            [webserver, "-f", "definitions.py", "-h", "127.0.0.1", "-p", str(port)],
            cwd=ROOT,
            env=made,
            stdout=log,
            stderr=log,
        )
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_for(url, server)
            yield url
        finally:
            server.terminate()
            server.wait(timeout=30)


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """A page of a headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("make browser-test needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium,
            args=[
                "--no-sandbox",
                "--disable-gpu",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--no-first-run",
            ],
        )
        page = browser.new_page(viewport={"width": 1440, "height": 960})
        page.set_default_timeout(45_000)
        yield page
        browser.close()


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
    assert sheet.evaluate("picture => picture.naturalWidth") > 100
    page.wait_for_timeout(500)
    _keep(page, "partition-thumbnails")
    page.keyboard.press("Escape")


def test_the_failed_check_names_the_rows_that_are_missing(page: Page, ui: str) -> None:
    page.goto(f"{ui}/assets/images?view=checks")
    expect(page.get_by_text("all_rows_delivered").first).to_be_visible()
    expect(page.get_by_text("rows have no image").first).to_be_visible()
    _keep(page, "failed-check")


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

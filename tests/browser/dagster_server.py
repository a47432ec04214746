"""``dg dev`` over a project, and a page that looks at it."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import Page

from tests.browser.pages import PATIENCE_MS, chromium
from tests.dagster_bench import end_group

ROOT = Path(__file__).parents[2]
_START_S = 120.0
_REST_MS = 3_000


def project_environment(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of a project in a folder, with a Dagster home without greetings."""
    home = folder / "home"
    home.mkdir()
    (home / "dagster.yaml").write_text("telemetry:\n  enabled: false\nnux:\n  enabled: false\n")
    return {
        **os.environ,
        "KREA_STORAGE": str(folder / "krea"),
        "DAGSTER_HOME": str(home),
        **more,
    }


@contextmanager
def serving(
    environment: Mapping[str, str], folder: Path, file: Path = ROOT / "definitions.py"
) -> Iterator[str]:
    """Yield the address of ``dg dev`` over a file, by default the repository's; logs to folder."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    dg = Path(sys.executable).with_name("dg")
    with (folder / "dg-dev.log").open("wb") as log:
        server = subprocess.Popen(
            [dg, "dev", "-f", file.name, "-h", "127.0.0.1", "-p", str(port)],
            cwd=file.parent,
            env=environment,
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


@contextmanager
def open_page(height: int = 960) -> Iterator[Page]:
    """Yield a page of a headless Chromium."""
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync")
    with chromium(*quiet) as browser:
        page = browser.new_page(viewport={"width": 1440, "height": height})
        page.set_default_timeout(PATIENCE_MS)
        yield page


def keep(page: Page, name: str) -> None:
    """Take a screenshot where KREA_DOCS_IMAGES names a folder, when the page has come to rest."""
    if folder := os.environ.get("KREA_DOCS_IMAGES"):
        page.wait_for_timeout(_REST_MS)
        page.screenshot(path=str(Path(folder) / f"{name}.png"))


def _wait_for(url: str, server: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + _START_S
    while time.monotonic() < deadline_s:
        assert server.poll() is None, "the web server ended"
        try:
            if httpx.get(f"{url}/server_info", timeout=2.0).is_success:
                return
        except httpx.HTTPError:
            time.sleep(0.3)
    pytest.fail("the web server did not start")

"""Makes the screenshots in docs/images: ``python -m tests.browser.make_images FOLDER``.

``… FOLDER tests/browser/test_whole_project_ui.py`` makes only those of this test.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from playwright.sync_api import Browser

from tests.browser.pages import (
    DESK,
    PHONE,
    FileVisit,
    Scheme,
    chromium,
    make_gallery,
    make_spend_report,
    tables_to_december,
)
from tests.browser.test_review import visiting
from tests.curation.review.review_harness import Server, make_project

#: Tests of Dagster's UI, which take screenshots where KREA_DOCS_IMAGES names a folder.
_UI_TESTS = (
    "tests/browser/test_dagster_ui.py",
    "tests/browser/test_review_lineage_ui.py",
    "tests/browser/test_whole_project_ui.py",
)
#: Verdicts of the review that is shown, as keys.
_VERDICTS = "kkfkrkkkrkkfkkkkrkkk"
#: The folder of the projects that are shown with their paths; pytest empties it first.
_PROJECTS = Path(tempfile.gettempdir(), "my-projects")


def main() -> int:
    """Make all screenshots, and return pytest's exit code for those of Dagster's UI."""
    folder = Path(sys.argv[1]).absolute()
    if len(sys.argv) == 2:
        with TemporaryDirectory() as name, chromium() as browser:
            _show_gallery(browser, Path(name), folder)
            _show_spend_report(browser, Path(name), folder)
            _show_review(browser, Path(name), folder)
    command = [
        *(sys.executable, "-m", "pytest", "-q", "-m", "browser", f"--basetemp={_PROJECTS}"),
        *(_UI_TESTS if len(sys.argv) == 2 else sys.argv[2:]),
    ]
    environment = {**os.environ, "KREA_DOCS_IMAGES": str(folder)}
    return subprocess.run(command, env=environment, check=False).returncode


def _show_gallery(browser: Browser, scratch: Path, folder: Path) -> None:
    page = make_gallery(scratch)
    for width, name in ((DESK, "gallery"), (PHONE, "gallery-phone")):
        _shoot(browser, page, (width, 1320), folder / f"{name}.png")


def _show_spend_report(browser: Browser, scratch: Path, folder: Path) -> None:
    page = make_spend_report(tables_to_december(), scratch / "spend.html")
    for size, name in (((DESK, 1900), "spend-report"), ((PHONE, 1500), "spend-report-phone")):
        _shoot(browser, page, size, folder / f"{name}.png")


def _shoot(browser: Browser, path: Path, size: tuple[int, int], target: Path) -> None:
    visit = FileVisit(browser, path, size[0], "light")
    visit.page.set_viewport_size({"width": size[0], "height": size[1]})
    visit.page.wait_for_load_state("networkidle")
    visit.page.screenshot(path=target)
    visit.context.close()


def _show_review(browser: Browser, scratch: Path, folder: Path) -> None:
    server = Server(make_project(scratch / "harvest" / "krea", rows=4000))
    views: tuple[tuple[str, tuple[int, int], Scheme], ...] = (
        ("review", (DESK, 900), "dark"),
        ("review-light", (DESK, 900), "light"),
        ("review-selected", (DESK, 900), "light"),
        ("review-phone", (PHONE, 844), "dark"),
    )
    for name, size, scheme in views:
        with visiting(browser, server.url, size=size, scheme=scheme) as visit:
            for key in _VERDICTS if name == "review" else "":
                visit.press(*(("r", "4") if key == "r" else (key,)))
            visit.press(*["Home", *["ArrowRight"] * (7 if size[0] == DESK else 4)])
            _settle(visit)
            visit.page.screenshot(path=folder / f"{name}.png")
            if name == "review-selected":
                _select_and_tag(visit)
                visit.page.screenshot(path=folder / f"{name}.png")
            if name == "review":
                visit.press("Enter")
                _settle(visit)
                visit.page.screenshot(path=folder / "review-compare.png")
    server.stop()


def _select_and_tag(visit: Any) -> None:
    visit.press("t")
    visit.page.keyboard.type("left hand, night")
    visit.press("Enter", "e")
    visit.page.keyboard.type("The moon is cut off.")
    visit.press("Enter", "x", "Shift+ArrowRight", "Shift+ArrowDown", "t")
    visit.page.keyboard.type("harbour")
    visit.press("Enter")
    visit.wait("document.getElementById('notice').textContent.startsWith('Tagged')")
    _settle(visit)


def _settle(visit: Any) -> None:
    visit.wait("[...document.images].every(one => !one.hasAttribute('src') || one.complete)")
    visit.page.wait_for_timeout(900)


if __name__ == "__main__":
    sys.exit(main())

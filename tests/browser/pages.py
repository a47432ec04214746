"""Chromium, and the pages that the browser tests open and docs/images shows."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import pyarrow.compute as pc
from playwright.sync_api import Browser, Page, expect, sync_playwright

from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
from krea_dagster.curation.gallery.page import write_gallery
from krea_dagster.engine.budget import Budget
from krea_dagster.engine.verdict import Verdict
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.tables.views import SpendTables
from tests.curation.gallery.gallery_harness import HOSTILE, PROMPTS, GalleryProject, judged
from tests.spend.simulated_tables import simulated_year

DESK, PHONE = 1440, 390
#: Playwright waits 5 seconds for what is expected: too short for a first page on a busy machine.
PATIENCE_MS = 60_000
Scheme = Literal["light", "dark"]

LONG_PROMPT = " ".join(f"{PROMPTS[number % 4].lower()}," for number in range(8))
_SHAPES = [("1:1", (512, 512)), ("16:9", (640, 360)), ("3:4", (384, 512)), ("2:1", (640, 320))]
_GALLERY_AT = datetime(2026, 11, 22, 14, 20, tzinfo=timezone.utc)

REPORT_AT = datetime(2025, 12, 19, 14, 20, tzinfo=timezone.utc)
_SUBJECTS = (
    "A lighthouse on a basalt coast at blue hour, long exposure, the lamp's beam in the mist",
    "Rice terraces after rain, seen from a drone, early light, mirrored clouds",
    "Portrait of an old cellist in a workshop, window light, shallow depth of field",
    "A red kite over wet slate roofs, <b>harbor</b> at dawn",
)


@contextmanager
def chromium(*further: str) -> Iterator[Browser]:
    """Start a headless Chromium."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        raise RuntimeError("this needs Chromium: apt-get install chromium")
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-gpu", "--no-first-run", *further]
        )
        yield browser
        browser.close()


class FileVisit:
    """An HTML file in the browser, its console messages and its requests."""

    def __init__(self, browser: Browser, path: Path, width: int, scheme: Scheme) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        # axe is a script of the test, which the page's policy refuses.
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
        )
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.as_uri())


def make_gallery(root: Path) -> Path:
    """Write a gallery: several shapes and scripts, a long and a hostile prompt, and failures."""
    project = GalleryProject(root / "krea")
    verdicts: dict[str, Verdict] = {}
    for number in range(16):
        size, pixels = _SHAPES[number % 4 if number >= 8 else 0]
        row = project.add_image(
            f"coast-{number:03d}",
            PROMPTS[number % 8 if number < 8 else 2 + number % 8],
            partition="bucket-000" if number < 8 else "bucket-001",
            pixels=pixels,
            size=size,
            seed=48_211 + 977 * number,
            sample=number % 2,
        )
        if number % 3 == 0:
            verdict = ("keep", "keep", "reject", "flag")[number // 3 % 4]
            reason = "too dark at the left edge" if verdict == "reject" else None
            verdicts |= judged(row, verdict, reason=reason, tags=("coast",), note="for the cover")
    project.add_image("long", LONG_PROMPT, partition="bucket-001")
    project.add_image("hostile", HOSTILE, partition="bucket-001")
    project.path_of(project.add_image("gone", PROMPTS[1], partition="bucket-001")).unlink()
    project.add_failed("refused", PROMPTS[2], partition="bucket-001")
    chosen = select_rows(project.write(), GalleryFilter(statuses=()), verdicts)
    path = root / "gallery.html"
    with path.open("wb") as file:
        write_gallery(project.storage, chosen, file, title="Coasts and terraces", now=_GALLERY_AT)
    return path


def tables_to_december() -> SpendTables:
    """Return the spend tables of a simulated year, up to a day in December."""
    year = simulated_year(purchases=40_000)
    parts = (year.ledger, year.daily, year.failures)
    return SpendTables(
        *(part.filter(pc.less_equal(part["day"], REPORT_AT.date())) for part in parts)
    )


def make_spend_report(tables: SpendTables, path: Path) -> Path:
    """Write the report on a year's spend tables."""
    write_report(
        tables,
        path,
        now=REPORT_AT,
        caps=[Budget.parse(text) for text in ("day=250", "month=2600")],
        by=["campaign"],
        prompts=lambda ids: {one: _SUBJECTS[place % 4] for place, one in enumerate(ids)},
    )
    return path

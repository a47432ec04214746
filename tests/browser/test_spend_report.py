"""The spend report in a real browser: at a desk and on a phone, by day and by night, by keyboard.

``KREA_DOCS_IMAGES`` names a folder for the screenshots, which is how docs/images is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal

import pyarrow.compute as pc
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import Browser, Page, expect, sync_playwright

from krea_dagster.engine.budget import Budget
from krea_dagster.spend.report.report import write_report
from krea_dagster.spend.report.sparkline import spend_picture
from tests.spend.simulated_tables import Tables, simulated_year

pytestmark = pytest.mark.browser

NOW = datetime(2025, 12, 19, 14, 20, tzinfo=timezone.utc)
DESK, TABLET, PHONE = 1440, 820, 390
Scheme = Literal["light", "dark"]
VIEWS: list[tuple[int, Scheme]] = [
    (width, scheme) for width in (DESK, TABLET, PHONE) for scheme in ("light", "dark")
]

SUBJECTS = (
    "A lighthouse on a basalt coast at blue hour, long exposure, the lamp's beam in the mist",
    "Rice terraces after rain, seen from a drone, early light, mirrored clouds",
    "Portrait of an old cellist in a workshop, window light, shallow depth of field",
    "A red kite over wet slate roofs, <b>harbor</b> at dawn",
)


@pytest.fixture(scope="module")
def tables() -> Tables:
    """A year's tables up to a day in December."""
    year = simulated_year(purchases=40_000)
    parts = (year.ledger, year.daily, year.failures)
    return Tables(*(part.filter(pc.less_equal(part["day"], NOW.date())) for part in parts))


@pytest.fixture(scope="module")
def report(tables: Tables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report on them."""
    path = tmp_path_factory.mktemp("report") / "spend.html"
    write_report(
        tables.ledger,
        tables.daily,
        tables.failures,
        path,
        now=NOW,
        caps=[Budget.parse(text) for text in ("day=250", "month=2600")],
        by=["campaign"],
        prompts=lambda ids: {one: SUBJECTS[place % 4] for place, one in enumerate(ids)},
    )
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """A headless Chromium."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        pytest.fail("make browser-test needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-gpu", "--no-first-run"]
        )
        yield browser
        browser.close()


class Visit:
    """A page with the report, and what it said and asked for."""

    def __init__(self, browser: Browser, report: Path, width: int, scheme: Scheme) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        # axe is a script that the test brings along, which the page's policy rightly refuses.
        self.context = browser.new_context(
            viewport={"width": width, "height": 900}, color_scheme=scheme, bypass_csp=True
        )
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(report.as_uri())


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def visit(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[Visit]:
    """The report at each width, light and dark."""
    width, scheme = request.param
    visit = Visit(browser, report, width, scheme)
    yield visit
    visit.context.close()


def test_it_opens_without_an_error_and_without_asking_for_anything(
    visit: Visit, report: Path
) -> None:
    expect(visit.page.get_by_role("heading", name="What the images cost")).to_be_visible()
    visit.page.wait_for_load_state("networkidle")
    assert visit.said == []
    assert visit.asked == [report.as_uri()]


def test_it_fits_its_width_and_shows_each_chart_once(visit: Visit) -> None:
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.locator("svg.chart:visible").count() == 3
    for box in page.locator("svg.chart:visible").evaluate_all(
        "all => all.map(one => [...one.querySelectorAll('text')].map(text => "
        "[text.textContent, text.getBoundingClientRect().toJSON()]))"
    ):
        _apart(box)
    smallest = page.locator("svg.chart:visible text").evaluate_all(
        "all => Math.min(...all.map(text => text.getBoundingClientRect().height))"
    )
    assert smallest >= 12, "letters of a chart shrink with it"


def _apart(texts: list[tuple[str, dict[str, float]]]) -> None:
    """No two words of a chart lie upon each other."""
    for number, (words, one) in enumerate(texts):
        for others, other in texts[number + 1 :]:
            beside = one["right"] <= other["left"] + 1 or other["right"] <= one["left"] + 1
            above = one["bottom"] <= other["top"] + 4 or other["bottom"] <= one["top"] + 4
            assert beside or above, f"{words!r} and {others!r}"


def test_axe_finds_nothing_to_object_to(visit: Visit) -> None:
    for details in visit.page.locator("details").all():
        details.locator("summary").click()
    results = Axe().run(visit.page)
    assert results.violations_count == 0, results.generate_report()


def test_the_paper_is_light_or_dark_as_the_reader_s_system_is(visit: Visit) -> None:
    dark = visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 22, 26)" if dark else "rgb(252, 251, 248)")


def test_the_keyboard_reaches_every_control(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, PHONE, "light")
    page = visit.page
    query = "a, summary, [tabindex='0']"
    controls: int = page.evaluate(
        "query => [...document.querySelectorAll(query)]"
        ".filter(one => one.checkVisibility()).length",
        query,
    )
    assert controls > 15
    reached: list[Any] = []
    for _ in range(controls):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate(
                "query => [...document.querySelectorAll(query)].indexOf(document.activeElement)",
                query,
            )
        )
        width = page.evaluate("parseFloat(getComputedStyle(document.activeElement).outlineWidth)")
        assert width >= 2, "where the focus is can be seen"
    assert len(set(reached)) == controls
    assert reached == sorted(reached), "in the order of the page"
    assert -1 not in reached
    visit.context.close()


def test_the_table_behind_a_chart_opens_by_keyboard(browser: Browser, report: Path) -> None:
    visit = Visit(browser, report, DESK, "light")
    page = visit.page
    table = page.get_by_role("table", name="All days, in UTC")
    expect(table).to_be_hidden()
    page.locator("summary").first.focus()
    page.keyboard.press("Enter")
    expect(table).to_be_visible()
    expect(table.get_by_role("row").nth(1)).to_contain_text("1 Jan 2025")
    visit.context.close()


def test_the_page_s_own_policy_lets_no_script_run(browser: Browser, report: Path) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(report.as_uri())
    page.evaluate(
        "() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1';"
        " document.body.append(one); }"
    )
    assert page.evaluate("window.ran") is None
    context.close()


def test_the_small_picture_is_drawn_as_an_image(
    browser: Browser, tables: Tables, tmp_path: Path
) -> None:
    (tmp_path / "spend.svg").write_bytes(spend_picture(tables.daily))
    (tmp_path / "page.html").write_text("<img src='spend.svg' alt='spend'>")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("img").evaluate("one => one.naturalWidth") == 480
    page.close()


@pytest.mark.parametrize(
    ("width", "height", "name"), [(DESK, 1900, "spend-report"), (PHONE, 1500, "spend-report-phone")]
)
def test_its_screenshot_is_kept(
    browser: Browser, report: Path, width: int, height: int, name: str
) -> None:
    docs = os.environ.get("KREA_DOCS_IMAGES")
    if not docs:
        pytest.skip("KREA_DOCS_IMAGES names no folder")
    visit = Visit(browser, report, width, "light")
    visit.page.set_viewport_size({"width": width, "height": height})
    visit.page.screenshot(path=Path(docs) / f"{name}.png")
    visit.context.close()

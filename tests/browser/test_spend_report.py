"""The spend report in a browser: at a desk and on a phone, by day and by night, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import Browser, expect

from krea_dagster.spend.report.sparkline import days_of, spend_sparkline
from krea_dagster.spend.tables.views import SpendTables
from tests.browser.pages import (
    DESK,
    PHONE,
    FileVisit,
    Scheme,
    make_spend_report,
    tables_to_december,
)

pytestmark = pytest.mark.browser

TABLET = 820
VIEWS: list[tuple[int, Scheme]] = [
    (width, scheme) for width in (DESK, TABLET, PHONE) for scheme in ("light", "dark")
]


@pytest.fixture(scope="module")
def tables() -> SpendTables:
    return tables_to_december()


@pytest.fixture(scope="module")
def report(tables: SpendTables, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_spend_report(tables, tmp_path_factory.mktemp("report") / "spend.html")


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def visit(request: pytest.FixtureRequest, browser: Browser, report: Path) -> Iterator[FileVisit]:
    """The report at each width, light and dark."""
    width, scheme = request.param
    visit = FileVisit(browser, report, width, scheme)
    yield visit
    visit.context.close()


def test_it_opens_without_an_error_and_without_asking_for_anything(
    visit: FileVisit, report: Path
) -> None:
    expect(visit.page.get_by_role("heading", name="What the images cost")).to_be_visible()
    visit.page.wait_for_load_state("networkidle")
    assert visit.said == []
    assert visit.asked == [report.as_uri()]


def test_it_fits_its_width_and_shows_each_chart_once(visit: FileVisit) -> None:
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


def test_axe_finds_nothing_to_object_to(visit: FileVisit) -> None:
    for details in visit.page.locator("details").all():
        details.locator("summary").click()
    results = Axe().run(visit.page)
    assert results.violations_count == 0, results.generate_report()


def test_the_paper_is_light_or_dark_as_the_reader_s_system_is(visit: FileVisit) -> None:
    dark = visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 22, 26)" if dark else "rgb(252, 251, 248)")


def test_the_keyboard_reaches_every_control(browser: Browser, report: Path) -> None:
    visit = FileVisit(browser, report, PHONE, "light")
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
    visit = FileVisit(browser, report, DESK, "light")
    page = visit.page
    table = page.get_by_role("table", name="By day")
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
    browser: Browser, tables: SpendTables, tmp_path: Path
) -> None:
    with closing(tables.open()) as duck:
        (tmp_path / "spend.svg").write_bytes(spend_sparkline(days_of(duck)))
    (tmp_path / "page.html").write_text("<img src='spend.svg' alt='spend'>")
    page = browser.new_page()
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("img").evaluate("one => one.naturalWidth") == 480
    page.close()

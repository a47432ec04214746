"""The gallery in a real browser: at a desk and on a phone, by day and by night, by keyboard.

``KREA_DOCS_IMAGES`` names a folder for the screenshot, which is how docs/images is made.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Literal

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import Browser, Page, expect, sync_playwright

from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
from krea_dagster.curation.gallery.page import write_gallery
from tests.curation.gallery.gallery_harness import HOSTILE, PROMPTS, Walls

pytestmark = pytest.mark.browser

NOW = datetime(2026, 11, 22, 14, 20, tzinfo=timezone.utc)
DESK, PHONE = 1440, 390
Scheme = Literal["light", "dark"]
VIEWS: list[tuple[int, Scheme]] = [
    (width, scheme) for width in (DESK, PHONE) for scheme in ("light", "dark")
]
LONG = " ".join(f"{PROMPTS[number % 4].lower()}," for number in range(8))
SHAPES = [("1:1", (512, 512)), ("16:9", (640, 360)), ("3:4", (384, 512)), ("2:1", (640, 320))]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A gallery of two partitions: shapes, scripts, a long and a hostile prompt, and failures."""
    root = tmp_path_factory.mktemp("gallery")
    walls = Walls(root / "krea")
    verdicts: dict[str, str] = {}
    for number in range(16):
        size, pixels = SHAPES[number % 4 if number >= 8 else 0]
        row = walls.hang(
            f"coast-{number:03d}",
            PROMPTS[number % 8 if number < 8 else 2 + number % 8],
            partition="bucket-000" if number < 8 else "bucket-001",
            pixels=pixels,
            size=size,
            seed=48_211 + 977 * number,
            sample=number % 2,
        )
        if number % 3 == 0:
            verdicts[row["image_sha256"]] = ("keep", "keep", "reject", "flag")[number // 3 % 4]
    walls.hang("long", LONG, partition="bucket-001")
    walls.hang("hostile", HOSTILE, partition="bucket-001")
    walls.path_of(walls.hang("gone", PROMPTS[1], partition="bucket-001")).unlink()
    walls.fail("refused", PROMPTS[2], partition="bucket-001")
    filtered = GalleryFilter(statuses=())
    chosen = select_rows(walls.write(), filtered, verdicts)
    path = root / "gallery.html"
    with path.open("wb") as file:
        write_gallery(walls.storage, chosen, file, title="Coasts and terraces", now=NOW)
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
    """A page with the gallery, and what it said and asked for."""

    def __init__(self, browser: Browser, path: Path, width: int, scheme: Scheme) -> None:
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
        self.page.goto(path.as_uri())


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def visit(request: pytest.FixtureRequest, browser: Browser, gallery: Path) -> Iterator[Visit]:
    """The gallery at each width, light and dark."""
    width, scheme = request.param
    visit = Visit(browser, gallery, width, scheme)
    yield visit
    visit.context.close()


def test_it_shows_its_pictures_without_asking_for_anything(visit: Visit, gallery: Path) -> None:
    page = visit.page
    expect(page.get_by_role("heading", name="Coasts and terraces")).to_be_visible()
    pictures = page.locator("figure img")
    assert pictures.count() == 18
    for picture in pictures.all():
        picture.scroll_into_view_if_needed()
        assert picture.evaluate("one => one.decode().then(() => one.naturalWidth)") > 100
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [gallery.as_uri()]


def test_it_fits_its_width_and_no_two_cards_overlap(visit: Visit) -> None:
    page = visit.page
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    boxes = page.locator("figure.card").evaluate_all(
        "all => all.map(one => { const box = one.getBoundingClientRect();"
        " return [box.left, box.top, box.right, box.bottom]; })"
    )
    for number, (left, top, right, bottom) in enumerate(boxes):
        assert right - left >= 240
        for other_left, other_top, other_right, other_bottom in boxes[number + 1 :]:
            beside = right <= other_left + 1 or other_right <= left + 1
            above = bottom <= other_top + 1 or other_bottom <= top + 1
            assert beside or above


def test_pictures_of_every_shape_lie_within_a_square(visit: Visit) -> None:
    shapes = visit.page.locator(".frame").evaluate_all(
        "all => all.map(one => [one.clientWidth, one.clientHeight])"
    )
    assert all(abs(width - height) <= 1 for width, height in shapes)


def test_axe_finds_nothing_to_object_to(visit: Visit) -> None:
    # Also in what is not near the window, which the browser else leaves out.
    visit.page.add_style_tag(content=".card { content-visibility: visible !important; }")
    for details in visit.page.locator("details").all():
        details.locator("summary").click()
    results = Axe().run(visit.page)
    assert results.violations_count == 0, results.generate_report()


def test_the_paper_is_light_or_dark_as_the_reader_s_system_is(visit: Visit) -> None:
    dark = visit.page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    paper = visit.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 22, 26)" if dark else "rgb(252, 251, 248)")


def test_a_prompt_is_text_whatever_it_holds(browser: Browser, gallery: Path) -> None:
    """Without the test's own leave to run scripts."""
    context = browser.new_context()
    page = context.new_page()
    page.goto(gallery.as_uri())
    card = page.locator("figure", has_text="hostile")
    expect(card.locator(".prompt").first).to_contain_text("<script>window.ran = 1</script>")
    assert page.evaluate("window.ran") is None
    assert page.locator("figure p img").count() == 0
    context.close()


def test_its_own_policy_lets_the_style_apply_and_no_script_run(
    browser: Browser, gallery: Path
) -> None:
    context = browser.new_context()
    page = context.new_page()
    page.goto(gallery.as_uri())
    page.evaluate(
        "() => { const one = document.createElement('script'); one.textContent = 'window.ran = 1';"
        " document.body.append(one); }"
    )
    assert page.evaluate("window.ran") is None
    assert page.evaluate("getComputedStyle(document.querySelector('.grid')).display") == "grid"
    context.close()


def test_the_keyboard_reaches_every_control_and_opens_a_long_prompt(
    browser: Browser, gallery: Path
) -> None:
    visit = Visit(browser, gallery, PHONE, "light")
    page = visit.page
    query = "a, summary, [tabindex='0']"
    controls: int = page.locator(query).count()
    reached: list[int] = []
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
    assert reached == list(range(controls))
    details = page.locator("details", has_text=LONG)
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(details.locator("p.prompt")).to_be_visible()
    expect(details.locator("p.prompt")).to_have_text(LONG)
    visit.context.close()


def test_each_picture_has_words_for_those_who_do_not_see_it(
    browser: Browser, gallery: Path
) -> None:
    visit = Visit(browser, gallery, DESK, "light")
    words = visit.page.locator("img").evaluate_all("all => all.map(one => one.alt)")
    assert all(text.startswith("Image for the prompt: ") for text in words)
    visit.context.close()


@pytest.mark.parametrize(("width", "name"), [(DESK, "gallery"), (PHONE, "gallery-phone")])
def test_its_screenshot_is_kept(browser: Browser, gallery: Path, width: int, name: str) -> None:
    docs = os.environ.get("KREA_DOCS_IMAGES")
    if not docs:
        pytest.skip("KREA_DOCS_IMAGES names no folder")
    visit = Visit(browser, gallery, width, "light")
    visit.page.set_viewport_size({"width": width, "height": 1320})
    visit.page.locator("img").first.evaluate("one => one.decode()")
    visit.page.screenshot(path=Path(docs) / f"{name}.png")
    visit.context.close()

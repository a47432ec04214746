"""The gallery in a real browser: at a desk and on a phone, by day and by night, by keyboard."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import Browser, expect

from tests.browser.pages import DESK, LONG_PROMPT, PHONE, FileVisit, Scheme, make_gallery

pytestmark = pytest.mark.browser

VIEWS: list[tuple[int, Scheme]] = [
    (width, scheme) for width in (DESK, PHONE) for scheme in ("light", "dark")
]


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gallery(tmp_path_factory.mktemp("gallery"))


@pytest.fixture(params=VIEWS, ids=lambda view: f"{view[0]}-{view[1]}")
def visit(request: pytest.FixtureRequest, browser: Browser, gallery: Path) -> Iterator[FileVisit]:
    """The gallery at each width, light and dark."""
    width, scheme = request.param
    visit = FileVisit(browser, gallery, width, scheme)
    yield visit
    visit.context.close()


def test_it_shows_its_images_without_a_request(visit: FileVisit, gallery: Path) -> None:
    page = visit.page
    expect(page.get_by_role("heading", name="Coasts and terraces")).to_be_visible()
    images = page.locator("figure img")
    assert images.count() == 18
    for image in images.all():
        image.scroll_into_view_if_needed()
        assert image.evaluate("one => one.decode().then(() => one.naturalWidth)") > 100
    assert visit.said == []
    assert [url for url in visit.asked if not url.startswith("data:")] == [gallery.as_uri()]


def test_it_fits_its_width_and_no_two_cards_overlap(visit: FileVisit) -> None:
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


def test_images_of_every_shape_fit_into_a_square(visit: FileVisit) -> None:
    shapes = visit.page.locator(".frame").evaluate_all(
        "all => all.map(one => [one.clientWidth, one.clientHeight])"
    )
    assert all(abs(width - height) <= 1 for width, height in shapes)


def test_axe_finds_nothing_to_object_to(visit: FileVisit) -> None:
    # Also in what is not near the window, which the browser else leaves out.
    visit.page.add_style_tag(content=".card { content-visibility: visible !important; }")
    for details in visit.page.locator("details").all():
        details.locator("summary").click()
    results = Axe().run(visit.page)
    assert results.violations_count == 0, results.generate_report()


def test_the_paper_is_light_or_dark_as_the_reader_s_system_is(visit: FileVisit) -> None:
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
    visit = FileVisit(browser, gallery, PHONE, "light")
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
    details = page.locator("details", has_text=LONG_PROMPT)
    details.locator("summary").focus()
    page.keyboard.press("Enter")
    expect(details.locator("p.prompt")).to_be_visible()
    expect(details.locator("p.prompt")).to_have_text(LONG_PROMPT)
    visit.context.close()


def test_each_image_has_an_alternative_text(browser: Browser, gallery: Path) -> None:
    visit = FileVisit(browser, gallery, DESK, "light")
    words = visit.page.locator("img").evaluate_all("all => all.map(one => one.alt)")
    assert all(text.startswith("Image for the prompt: ") for text in words)
    visit.context.close()

"""The review in a real browser: 100,000 rows, by keyboard, two people at once, a killed server.

Times are printed (``pytest -s``) and not asserted: the machine may be busy.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import pytest
from axe_playwright_python.sync_playwright import Axe  # type: ignore[import-untyped]  # has none
from playwright.sync_api import Browser, Page, expect

from krea_dagster.curation.review.app import REASONS
from krea_dagster.curation.review.index import ReviewIndex, build_index
from krea_dagster.curation.review.selection import ReviewSelection, empty_code, rows_of
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.manifest import read_manifests, write_manifest
from tests.curation.review.review_harness import PARTITIONS, ReviewProject, Server, make_project
from tests.spend.project_harness import ProjectHarness

pytestmark = pytest.mark.browser

ROWS = 100_000
DESK, PHONE = (1440, 900), (390, 844)
Scheme = Literal["light", "dark"]
VIEWS: list[tuple[tuple[int, int], Scheme]] = [
    (DESK, "dark"),
    (DESK, "light"),
    (PHONE, "dark"),
    (PHONE, "light"),
]
STORED = '{"where": [["status", "is", "stored"], ["earlier", "is", "false"]]}'

#: Frames between one call and the next of the browser's clock, milliseconds.
FRAMES = """
async ([seconds, step]) => {
    const grid = document.getElementById("grid"), times = [];
    let last = performance.now();
    const end = last + 1000 * seconds;
    while (last < end) {
        const now = await new Promise(requestAnimationFrame);
        times.push(now - last);
        last = now;
        grid.scrollTop += step;
    }
    return times;
}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ReviewProject:
    """A storage root with 100,000 rows."""
    return make_project(tmp_path_factory.mktemp("review") / "krea", rows=ROWS)


@pytest.fixture(scope="module")
def server(project: ReviewProject) -> Iterator[Server]:
    """The command, reviewing it."""
    running = Server(project)
    yield running
    assert running.stop()[0] == 0


class Visit:
    """A page with the review, and what it said and asked for."""

    def __init__(
        self,
        browser: Browser,
        url: str,
        *,
        size: tuple[int, int] = DESK,
        scheme: Scheme = "dark",
        bypass_csp: bool = False,
        touch: bool = False,
    ) -> None:
        self.said: list[str] = []
        self.asked: list[str] = []
        self.context = browser.new_context(
            viewport={"width": size[0], "height": size[1]},
            color_scheme=scheme,
            bypass_csp=bypass_csp,
            has_touch=touch,
        )
        self.page: Page = self.context.new_page()
        self.page.on("console", lambda message: self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        began = time.perf_counter()
        self.page.goto(url)
        self.wait("document.querySelector('.cell img[src]')?.naturalWidth > 0")
        self.first_image_s = time.perf_counter() - began
        # Everything of the first window has come, so that keys are not waited for.
        self.wait(
            "!document.querySelector('.cell:not([hidden]).blank') && "
            "document.getElementById('progress-text').textContent !== '…'"
        )

    def wait(self, true: str) -> None:
        """Wait until an expression is true. Playwright's own way needs eval, which is forbidden."""
        until(lambda: bool(self.page.evaluate(true)), true)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.page.keyboard.press(key)

    def chosen(self) -> Any:
        """The place that is chosen, from 0."""
        return self.page.evaluate("+document.querySelector('.cell.chosen').id.slice(6)")


def hold_clock(page: Page) -> None:
    """Stop a page's time, after the poll that it had planned by the real one."""
    with page.expect_response("**/api/since*"):
        page.clock.install()
        page.clock.pause_at(datetime.now(timezone.utc) + timedelta(seconds=1))


@contextmanager
def visiting(browser: Browser, url: str, **further: Any) -> Iterator[Visit]:
    visit = Visit(browser, url, **further)
    yield visit
    visit.context.close()


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[ReviewProject, Server]]:
    """A few rows of one's own, in the journal of which nothing stands yet."""
    project = make_project(tmp_path / "krea", rows=400, subjects=3)
    server = Server(project)
    yield project, server
    server.stop()


def index_of(project: ReviewProject) -> ReviewIndex:
    with closing(Journal(project.journal_url)) as journal:
        return build_index(Storage(str(project.folder)), journal)


def order_of(index: ReviewIndex, selection: str = STORED) -> list[str]:
    """The images of a list, by their places."""
    codes = np.full(len(index), empty_code(), np.int8)
    rows = rows_of(index.table, ReviewSelection.parse(selection), codes)
    return [str(one) for one in index.table["image_sha256"].take(rows).to_pylist()]


def history_of(project: ReviewProject) -> list[Verdict]:
    with closing(Journal(project.journal_url)) as journal:
        return journal.verdicts.history()


def until(true: Callable[[], bool], what: str, within_s: float = 30.0) -> None:
    """Look again and again, until something is so."""
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


# -- quick with 100,000 rows ------------------------------------------------------------------


def test_the_first_of_100_000_images_is_shown_at_once(server: Server, browser: Browser) -> None:
    with visiting(browser, server.url) as visit:
        print(f"\nfirst image of {ROWS:,} rows after {visit.first_image_s:.2f} s")
        expect(visit.page.get_by_role("heading", name="Review")).to_be_visible()
        visit.page.wait_for_load_state("networkidle")
        assert visit.said == []
        assert {url.split("/")[2] for url in visit.asked} == {f"127.0.0.1:{server.port}"}


def test_scrolling_draws_what_can_be_seen_and_no_more(server: Server, browser: Browser) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        height = page.evaluate("document.getElementById('grid').scrollHeight")
        assert height > 3_000_000
        for words, step in (("slowly", 12), ("quickly", 900), ("headlong", 20_000)):
            times = page.evaluate(FRAMES, [4, step])
            long = sum(1 for one in times if one > 50)
            print(
                f"\nscrolled {words} ({step} px a frame): {len(times)} frames, median "
                f"{np.median(times):.1f} ms, 99th {np.percentile(times, 99):.1f} ms, longest "
                f"{max(times):.0f} ms, {long} over 50 ms"
            )
            assert page.locator(".cell").count() < 120, "only what is near the window is there"
        visit.press("End")
        visit.wait("document.querySelector('.cell.chosen img')?.naturalWidth > 0")
        last = page.locator(".cell.chosen")
        expect(last).to_have_attribute("id", f"place-{len_of_list() - 1}")
        expect(last).to_have_attribute("aria-selected", "true")
        assert visit.said == []


def test_a_list_that_is_higher_than_browsers_scroll_is_seen_to_its_end(
    server: Server, browser: Browser
) -> None:
    """Large cells make 100,000 rows 18 million pixels high."""
    with visiting(browser, server.url) as visit:
        visit.press("+", "+")
        columns = int(visit.page.locator("#grid").get_attribute("aria-colcount") or 0)
        lines = int(visit.page.locator("#grid").get_attribute("aria-rowcount") or 0)
        side = visit.page.locator(".cell.chosen").evaluate("one => one.offsetWidth")
        assert lines * side > 16_000_000
        inside = (
            "(() => { const one = document.querySelector('.cell.chosen')?.getBoundingClientRect(), "
            "all = document.getElementById('grid').getBoundingClientRect(); "
            "return one && one.top >= all.top && one.bottom <= all.bottom })()"
        )
        visit.press("End")
        for place in (len_of_list() - 1, len_of_list() - 1 - columns):
            visit.wait(inside)
            visit.wait("document.querySelector('.cell.chosen img')?.naturalWidth > 0")
            assert visit.chosen() == place
            visit.press("ArrowUp")
        for _ in range(30):
            visit.press("PageUp")
            assert visit.page.evaluate(inside)
        visit.press("Home")
        visit.wait(inside)
        assert visit.chosen() == 0
        assert visit.page.evaluate("document.getElementById('grid').scrollTop") == 0


def test_verdicts_do_not_stutter(server: Server, browser: Browser) -> None:
    with visiting(browser, server.url) as visit:
        visit.press("ArrowDown")
        visit.page.evaluate(
            "() => { window.times = []; let last = performance.now(); const tick = (now) => { "
            "times.push(now - last); last = now; requestAnimationFrame(tick) }; tick(last) }"
        )
        began = time.perf_counter()
        visit.press(*"kkfk" * 50)
        passed_s = time.perf_counter() - began
        times = visit.page.evaluate("times")
        print(
            f"\n200 verdicts by keyboard in {passed_s:.1f} s: {len(times)} frames, median "
            f"{np.median(times):.1f} ms, 99th {np.percentile(times, 99):.1f} ms, longest "
            f"{max(times):.0f} ms, {sum(1 for one in times if one > 50)} over 50 ms"
        )
        assert np.median(times) < 200
        visit.wait("Object.keys(localStorage).length === 0")
        assert visit.said == []


def len_of_list() -> int:
    """The rows that have an image."""
    return ROWS - ROWS // 211


# -- by keyboard, two at once, and a kill in between ------------------------------------------


def test_no_verdict_is_lost_and_none_is_double_when_the_server_is_killed(
    project: ReviewProject, browser: Browser
) -> None:
    """400 verdicts of two people by keyboard, while the server dies twice under their hands."""
    server = Server(project)
    port = server.port
    backwards = STORED[:-1] + ', "down": true}'
    with (
        visiting(browser, f"{server.url}?reviewer=Ada#{STORED}") as ada,
        visiting(browser, f"{server.url}?reviewer=Grace#{backwards}") as grace,
    ):
        began = {one.verdict_id for one in history_of(project)}
        cycle = [("keep", ["k"]), ("reject", ["r", "3"]), ("flag", ["f"]), ("keep", ["k"])]
        times: list[float] = []
        for number in range(200):
            if number in (60, 140):
                server.kill()
            if number in (90, 150):
                server = Server(project, port=port)
            for visit in (ada, grace):
                at = time.perf_counter()
                visit.press(*cycle[number % 4][1])
                times.append(time.perf_counter() - at)
        for visit in (ada, grace):
            visit.wait("Object.keys(localStorage).length === 0")
            expect(visit.page.locator("#saved")).to_have_text("All saved")
            expect(visit.page.locator("#trouble")).to_be_hidden()
            assert visit.chosen() == 200
        print(f"\n400 verdicts, {1000 * float(np.median(times)):.0f} ms each (median, one key)")
        index = index_of(project)
        given = [one for one in history_of(project) if one.verdict_id not in began]
        for name, selection in (("Ada", STORED), ("Grace", backwards)):
            wanted = [
                (sha256, cycle[at % 4][0], REASONS[2] if at % 4 == 1 else None)
                for at, sha256 in enumerate(order_of(index, selection)[:200])
            ]
            found = [
                (one.image_sha256, one.verdict, one.reason) for one in given if one.reviewer == name
            ]
            assert found == wanted, "each once, and in the order of the keys"
        assert len(given) == 400
    assert server.stop()[0] == 0


def test_a_page_that_is_closed_leaves_its_verdicts_to_the_next(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        server.kill()
        visit.press("k", "f")
        expect(visit.page.locator("#saved")).to_have_text("2 not saved")
        expect(visit.page.locator("#trouble")).to_contain_text("wait in this browser")
        visit.page.close(run_before_unload=False)
        assert history_of(project) == []
        again = Server(project, port=server.port)
        page = visit.context.new_page()
        page.goto(again.url)
        until(lambda: len(history_of(project)) == 2, "what was left is sent")
        assert [one.verdict for one in history_of(project)] == ["keep", "flag"]
        again.stop()


def test_of_several_pages_that_were_closed_the_last_verdict_counts(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    """Pages that cannot post, one after the other: each leaves what it has to the next."""
    project, server = small
    with visiting(browser, server.url) as visit:
        visit.context.route("**/api/verdicts", lambda route: route.abort())
        for keys, waiting in (("fff", 3), ("k", 4)):
            visit.press("Home", *itertools.chain.from_iterable((key, "ArrowLeft") for key in keys))
            expect(visit.page.locator("#saved")).to_have_text(f"{waiting} not saved")
            visit.page.close(run_before_unload=False)
            visit.page = visit.context.new_page()
            visit.page.goto(server.url)
            visit.wait("document.querySelector('.cell img[src]')?.naturalWidth > 0")
        visit.context.unroute("**/api/verdicts")
        until(lambda: len(history_of(project)) == 4, "what was left is sent")
        assert [one.verdict for one in history_of(project)] == ["flag", "flag", "flag", "keep"]


def test_verdicts_with_long_names_are_posted_in_parts(tmp_path: Path, browser: Browser) -> None:
    """A prompt_id may be of any length, and what waits may be more than the server reads."""
    project = make_project(tmp_path / "krea", rows=60, subjects=1, measured=False)
    storage = Storage(str(project.folder))
    for key in (f"bucket-{number:03d}" for number in range(PARTITIONS)):
        table = read_manifests(storage, [key])
        ids = pc.binary_join_element_wise(table["prompt_id"], "長い" * 3000, "")
        at = table.column_names.index("prompt_id")
        write_manifest(storage, key, table.set_column(at, "prompt_id", ids))
    server = Server(project)
    with visiting(browser, server.url) as visit:
        visit.context.route("**/api/verdicts", lambda route: route.abort())
        visit.press(*["k"] * 40)
        expect(visit.page.locator("#saved")).to_have_text("40 not saved")
        visit.context.unroute("**/api/verdicts")
        until(lambda: len(history_of(project)) == 40, "all are kept")
        expect(visit.page.locator("#saved")).to_have_text("All saved")
    server.stop()


def test_people_see_each_other_s_verdicts_within_seconds(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with (
        visiting(browser, f"{server.url}?reviewer=Ada") as ada,
        visiting(browser, f"{server.url}?reviewer=Grace") as grace,
    ):
        hold_clock(grace.page)
        ada.press("r")
        ada.page.keyboard.type("six fingers")
        ada.press("Enter")
        until(lambda: len(history_of(project)) == 1, "it is kept")
        expect(grace.page.locator("#place-0")).to_have_attribute("data-verdict", "none")
        grace.page.clock.run_for(2_000)
        expect(grace.page.locator("#place-0")).to_have_attribute("data-verdict", "reject")
        grace.page.clock.resume()
        expect(grace.page.locator(".present")).to_have_text("✕ Rejected: six fingers · Ada")
        grace.press("k")  # another opinion: the last counts, and the first stays
        expect(ada.page.locator("#place-0")).to_have_attribute("data-verdict", "keep")
        expect(grace.page.locator("#progress-text")).to_have_text("1 of 399 reviewed")
        assert [(one.verdict, one.reviewer, one.reason) for one in history_of(project)] == [
            ("reject", "Ada", "six fingers"),
            ("keep", "Grace", None),
        ]


def test_undo_restores_the_verdict_before(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        visit.press("k", "k", "ArrowLeft", "f", "u", "u", "u", "u")
        assert visit.chosen() == 0
        expect(visit.page.locator("#place-0")).to_have_attribute("data-verdict", "none")
        expect(visit.page.locator("#place-1")).to_have_attribute("data-verdict", "none")
        until(lambda: len(history_of(project)) == 6, "three verdicts and three undone")
        assert [one.verdict for one in history_of(project)] == [
            "keep", "keep", "flag", "keep", "none", "none",
        ]  # fmt: skip


def test_undo_keeps_a_later_verdict_of_somebody_else(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with (
        visiting(browser, f"{server.url}?reviewer=Ada") as ada,
        visiting(browser, f"{server.url}?reviewer=Grace") as grace,
    ):
        ada.press("f")
        expect(grace.page.locator("#place-0")).to_have_attribute("data-verdict", "flag")
        grace.press("k")
        expect(ada.page.locator("#place-0")).to_have_attribute("data-verdict", "keep")
        ada.press("u")
        expect(ada.page.locator("[aria-live=polite]").first).to_contain_text(
            "Not undone: Grace has given a later verdict"
        )
        assert [one.verdict for one in history_of(project)] == ["flag", "keep"]


def test_a_key_held_down_judges_one_image(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        for _ in range(6):  # the browser repeats a key that is down
            visit.page.keyboard.down("k")
        visit.page.keyboard.up("k")
        visit.press("f")
        until(lambda: len(history_of(project)) == 2, "one for each key")
        assert [one.verdict for one in history_of(project)] == ["keep", "flag"]
        assert visit.chosen() == 2


def test_the_verdicts_of_one_root_never_go_to_another(
    small: tuple[ReviewProject, Server], browser: Browser, tmp_path: Path
) -> None:
    """The command was started for another root, with the same port and token."""
    project, server = small
    other = make_project(tmp_path / "other", rows=400, subjects=3)
    with visiting(browser, server.url) as visit:
        server.kill()
        visit.press("k")
        swapped = Server(other, port=server.port)
        expect(visit.page.locator("#trouble")).to_contain_text("Another storage root")
        expect(visit.page.locator("#saved")).to_have_text("1 not saved")
        swapped.stop()
        again = Server(project, port=server.port)
        until(lambda: len(history_of(project)) == 1, "it is sent to its own")
        assert history_of(other) == []
        again.stop()


def test_n_goes_to_the_next_image_without_a_verdict(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    _, server = small
    with visiting(browser, server.url) as visit:
        visit.press("k", "k", "k", "Home", "n")
        assert visit.chosen() == 3
        visit.press("End", "k")  # the last of all stays chosen
        visit.press("n")
        visit.wait("document.querySelector('.cell.chosen').id === 'place-3'")


# -- tags, notes and many images at once -------------------------------------------------------


def test_tags_and_a_note_are_given_by_keyboard_and_stay_with_the_verdict(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        page = visit.page
        visit.press("t")
        page.keyboard.type("night, left hand")  # at once: no letter may reach the grid
        visit.press("Enter", "e")
        page.keyboard.type("see the eyes")
        visit.press("Enter", "k", "ArrowLeft")
        panel = page.locator(".about")
        expect(panel.locator(".tags li")).to_contain_text(["left hand", "night"])
        expect(panel.locator(".note")).to_have_text("see the eyes")
        expect(page.locator("#place-0")).to_have_attribute("data-verdict", "keep")
        expect(page.locator("#place-0")).to_have_attribute(
            "aria-label", re.compile("Kept. Tags: left hand, night. Has a note. 1 of 399$")
        )
        until(lambda: len(history_of(project)) == 3, "each is in the journal")
        last = history_of(project)[-1]
        assert (last.verdict, last.tags, last.note) == (
            "keep", ("left hand", "night"), "see the eyes",
        )  # fmt: skip
        panel.get_by_role("button", name="Remove the tag night").click()
        expect(panel.locator(".tags li")).to_have_count(1)
        visit.press("u")
        expect(panel.locator(".tags li")).to_have_count(2)
        visit.press("ArrowRight", "t", "1", "Enter")  # the most frequent tags have the keys 1 to 9
        expect(panel.locator(".tags li")).to_contain_text(["left hand"])
        assert visit.said == []


def test_images_are_filtered_by_tag(small: tuple[ReviewProject, Server], browser: Browser) -> None:
    _, server = small
    with visiting(browser, server.url) as visit:
        page = visit.page
        visit.press("x", "Shift+ArrowRight", "Shift+ArrowRight", "t")
        page.keyboard.type("harbour")
        visit.press("Enter")
        expect(page.locator("#notice")).to_have_text("Tagged harbour: 3 images. U undoes it.")
        visit.press("/")
        page.get_by_role("button", name="Add a condition").click()
        line = page.get_by_role("group", name="Condition").last
        line.get_by_label("Column").select_option("tags")
        expect(line.get_by_label("Condition", exact=True)).to_have_value("has")
        line.get_by_label("Value").select_option("harbour")
        expect(line.get_by_label("Value")).to_contain_text("harbour (3)")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.locator("#filter-text")).to_have_text("tags has harbour")
        expect(page.locator("#live")).to_contain_text("3 images")


def test_many_images_are_selected_by_mouse_and_judged_and_undone_in_one_go(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        page = visit.page
        page.locator("#place-1").click()
        page.locator("#place-3").click(modifiers=["Shift"])
        page.locator("#place-6").click(modifiers=["ControlOrMeta"])
        page.locator("#place-2").click(modifiers=["ControlOrMeta"])
        expect(page.locator("#picked-text")).to_have_text("3 selected")
        selected = page.locator(".cell[aria-selected=true]")
        assert selected.evaluate_all("all => all.map(one => one.id)") == [
            "place-1", "place-3", "place-6",
        ]  # fmt: skip
        visit.press("r", "4")
        for place in (1, 3, 6):
            expect(page.locator(f"#place-{place}")).to_have_attribute("data-verdict", "reject")
        expect(page.locator("#place-2")).to_have_attribute("data-verdict", "none")
        expect(page.locator("#progress-text")).to_have_text("3 of 399 reviewed")
        expect(page.locator("#picked")).to_be_hidden()
        given = history_of(project)
        assert {(one.verdict, one.reason, one.at) for one in given} == {
            ("reject", REASONS[3], given[0].at)
        }, "one commit"
        visit.press("u")
        expect(page.locator("#place-6")).to_have_attribute("data-verdict", "none")
        expect(page.locator("#notice")).to_have_text("Undone: 3 images.")
        expect(page.locator("#progress-text")).to_have_text("0 of 399 reviewed")


def test_all_images_of_a_filter_are_kept_by_two_keys_and_others_see_it(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with (
        visiting(browser, f"{server.url}?reviewer=Ada") as ada,
        visiting(browser, f"{server.url}?reviewer=Grace") as grace,
    ):
        ada.press("a")
        expect(ada.page.locator("#picked-text")).to_have_text("399 selected")
        ada.press("Escape")
        expect(ada.page.locator("#picked")).to_be_hidden()
        ada.press("a", "k")
        expect(ada.page.locator("#progress-text")).to_have_text("399 of 399 reviewed")
        expect(grace.page.locator("#place-4")).to_have_attribute("data-verdict", "keep")
        assert len(history_of(project)) == 399


def test_selected_images_are_compared(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    _, server = small
    with visiting(browser, server.url) as visit:
        visit.press(" ", "ArrowDown", "x", "Enter")
        expect(visit.page.get_by_role("heading", name="Selected images")).to_be_visible()
        expect(visit.page.get_by_role("option")).to_have_count(2)
        visit.press("Escape")
        expect(visit.page.locator("#picked-text")).to_have_text("2 selected")


def test_counts_follow_each_key(small: tuple[ReviewProject, Server], browser: Browser) -> None:
    """The number does not wait until the reviewer pauses, nor for the server."""
    _, server = small
    with visiting(browser, server.url) as visit:
        visit.context.route("**/api/verdicts", lambda route: route.abort())
        for number in range(1, 6):
            visit.press("k")
            expect(visit.page.locator("#progress-text")).to_have_text(f"{number} of 399 reviewed")
        visit.press("r")
        expect(visit.page.locator("#progress-text")).to_have_text("5 of 399 reviewed")
        visit.press("Escape", "u", "u")
        expect(visit.page.locator("#progress-text")).to_have_text("3 of 399 reviewed")
        visit.context.unroute("**/api/verdicts")


def test_similar_images_say_where_colours_differ_or_that_none_is_known(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    _, server = small
    with visiting(browser, server.url) as visit:
        visit.press("d")
        title = "Images that are nearly the same (colour is not compared)"
        expect(visit.page.get_by_role("heading", name=title)).to_be_visible()
        expect(visit.page.get_by_role("option").nth(1)).to_contain_text("other colours")
        expect(visit.page.get_by_role("option").nth(0)).not_to_contain_text("other colours")
        visit.press("Escape", "ArrowRight", "ArrowRight", "d")
        expect(visit.page.locator("#notice")).to_have_text(
            "Not compared yet: this image was not measured. Run krea-dagster curate."
        )


def test_a_finger_selects_many(small: tuple[ReviewProject, Server], browser: Browser) -> None:
    project, server = small
    with visiting(browser, server.url, size=PHONE, touch=True) as visit:
        page = visit.page
        page.locator("#place-1").tap()
        page.get_by_role("button", name="Select", exact=True).tap()
        page.locator("#place-4").tap()
        page.locator("#place-5").tap()
        page.locator("#place-4").tap()
        expect(page.locator("#picked-text")).to_have_text("2 selected")
        sizes = page.locator("button:visible").evaluate_all(
            "all => all.map(one => one.getBoundingClientRect().height)"
        )
        assert min(sizes) >= 44
        page.get_by_role("button", name="Flag").tap()
        expect(page.locator("#place-5")).to_have_attribute("data-verdict", "flag")
        assert len(history_of(project)) == 2


# -- what is shown ----------------------------------------------------------------------------


def test_filters_sort_and_find_nothing_and_survive_a_reload(
    server: Server, browser: Browser
) -> None:
    with visiting(browser, server.url) as visit:
        page = visit.page
        visit.press("/")
        page.get_by_role("button", name="Add a condition").click()
        line = page.get_by_role("group", name="Condition").last
        expect(line.get_by_label("Column")).to_have_value("sharpness")
        line.get_by_label("Condition", exact=True).select_option("at least")
        line.get_by_label("Value").fill("many")
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.get_by_role("alert").last).to_contain_text("'many' is not a value of type")
        line.get_by_label("Value").fill("900")
        page.get_by_label("Order").select_option("sharpness")
        page.get_by_label("Largest first").check()
        page.get_by_role("button", name="Show", exact=True).click()
        expect(page.get_by_role("dialog")).to_have_count(0)
        text = "sharpness at least 900 · by sharpness ↓"
        expect(page.locator("#filter-text")).to_have_text(text)
        page.reload()
        expect(page.locator("#filter-text")).to_have_text(text)
        visit.press("/")
        page.get_by_label("Words of the prompt").fill("no prompt says this")
        page.keyboard.press("Enter")
        expect(page.get_by_text("No image matches this filter.")).to_be_visible()
        page.get_by_role("button", name="Show all images").click()
        expect(page.locator("#place-0")).to_be_visible()
        assert visit.said == [
            "Failed to load resource: the server responded with a status of 400 (Bad Request)"
        ]


def test_comparing_shows_the_samples_at_full_size_and_judges_them(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url) as visit:
        page = visit.page
        visit.press("Enter")
        panes = page.get_by_role("option")
        expect(panes).to_have_count(4)
        visit.wait(
            "[...document.querySelectorAll('.pane img')].every(one => one.naturalWidth >= 768)"
        )
        visit.press("ArrowRight", "ArrowRight", "k", "z")
        large = page.locator(".pane img").evaluate_all("all => all.map(one => one.style.transform)")
        assert len(set(large)) == 1, "all are enlarged together"
        assert "scale" in large[0]
        expect(panes.nth(2)).to_have_attribute("data-verdict", "keep")
        expect(panes.nth(3)).to_have_attribute("aria-selected", "true")
        visit.press("r")
        page.keyboard.type("a reason that is much longer than there is room for below an image")
        visit.press("Enter")
        expect(panes.nth(3)).to_have_attribute("data-verdict", "reject")
        wide = page.locator(".pane img").evaluate_all("all => all.map(one => one.clientWidth)")
        assert len(set(wide)) == 1, "all keep one size"
        visit.press("Escape")
        expect(page.get_by_role("grid")).to_be_focused()
        expect(page.locator("#place-2")).to_have_attribute("data-verdict", "keep")
        until(lambda: len(history_of(project)) == 2, "the verdicts are in the journal")
        visit.press("d")
        expect(page.get_by_role("option")).to_have_count(2)  # the images of one cluster


def test_earlier_images_are_shown_with_their_successors(
    tmp_path: Path, emulator: Emulator, open_account: Callable[..., str], browser: Browser
) -> None:
    """The size of one row was changed, and another row was removed."""
    shop = ProjectHarness(tmp_path, emulator, open_account())
    with ThreadPoolExecutor(1) as pool:  # this thread has the browser's event loop
        pool.submit(shop.with_rows("boat", "kite", "tree", "drum").buy).result()
        changed = shop.with_rows("tree", "drum").with_rows("boat", size="1:1")
        pool.submit(changed.buy, "run-2").result()
    server = Server(ReviewProject(tmp_path / "krea", 5))
    with visiting(browser, server.url) as visit:
        page = visit.page
        expect(page.locator("#live")).to_contain_text("3 images")
        expect(page.locator(".cell:not([hidden]) .marks:not(:empty)")).to_have_count(0)
        visit.press(
            *["ArrowRight"]
            * page.locator(".cell[aria-label^=boat]").evaluate("one => +one.id.slice(6)"),
            "Enter",
        )
        panes = page.get_by_role("option")
        expect(panes).to_have_count(2)
        expect(panes.first).to_contain_text("1:2 1K · replaced")
        expect(panes.last).not_to_contain_text("replaced")
        visit.press("Escape")
    with visiting(browser, f'{server.url}#{{"where": [["earlier", "is", "true"]]}}') as visit:
        page = visit.page
        expect(page.locator(".cell:not([hidden])")).to_have_count(2)
        expect(page.locator(".cell:not([hidden]) .marks")).to_have_text(["earlier"] * 2)
        expect(page.locator("#filter-text")).to_have_text("earlier is true")
        visit.press(
            *["ArrowRight"]
            * page.locator(".cell[aria-label^=kite]").evaluate("one => +one.id.slice(6)")
        )
        expect(page.locator(".about")).to_contain_text("its row is gone")
        visit.press("f")
        expect(page.locator(".cell[data-verdict=flag]")).to_have_count(1)
        assert visit.said == []
    server.stop()


def test_a_prompt_is_always_shown_as_text(tmp_path: Path, browser: Browser) -> None:
    project = make_project(tmp_path / "krea", rows=32, subjects=1)
    storage = Storage(str(project.folder))
    table = read_manifests(storage, ["bucket-000"])
    bad = "<img src=x onerror=document.title='taken'><script>document.title='taken'</script>"
    column = table.schema.get_field_index("prompt")
    table = table.set_column(column, "prompt", [[bad] * table.num_rows])
    write_manifest(storage, "bucket-000", table)
    server = Server(project)
    with visiting(browser, server.url) as visit:
        expect(visit.page.locator(".about .prompt")).to_have_text(bad)
        visit.press("Enter")
        expect(visit.page.locator(".compare .prompt")).to_have_text(bad)
        assert "taken" not in visit.page.title()
        assert visit.said == []
    server.stop()


def test_the_page_s_own_policy_lets_no_other_script_run(server: Server, browser: Browser) -> None:
    with visiting(browser, server.url) as visit:
        ran = visit.page.evaluate(
            "() => { const one = document.createElement('div'); try { one.innerHTML = '<b>'; "
            "return 'markup' } catch (error) { return error.name } }"
        )
        assert ran == "TypeError"
        visit.page.evaluate(
            "() => { const one = document.createElement('img'); "
            "one.src = 'http://127.0.0.1:9/other.png'; document.body.append(one) }"
        )
        assert "Content Security Policy" in " ".join(visit.said)


# -- for everybody ----------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "scheme"), VIEWS, ids=lambda one: str(one).replace(", ", "x"))
def test_axe_finds_nothing_to_object_to(
    server: Server, browser: Browser, size: tuple[int, int], scheme: Scheme
) -> None:
    # axe is a script that the test brings along, which the page's policy rightly refuses.
    with visiting(browser, server.url, size=size, scheme=scheme, bypass_csp=True) as visit:
        page = visit.page
        visit.press("k", "f", "r", "1")
        page.wait_for_timeout(400)
        visit.press("t")
        page.keyboard.type("axe, night")
        visit.press("Enter", "e")
        page.keyboard.type("a note")
        visit.press("Enter")
        for key in ("", "/", "?", "p", "r", "t", "e", "Enter", "d", "x", "t"):
            page.locator("#grid").focus()
            if key == "d":
                visit.press("Home")  # the first image has a near-duplicate
            if key:
                visit.press(key)
            if key not in ("", "x"):
                expect(page.get_by_role("dialog")).to_be_visible()
            results = Axe().run(page)
            assert results.violations_count == 0, f"{key}: {results.generate_report()}"
            assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
            if key not in ("", "x"):
                visit.press("Escape")
                expect(page.get_by_role("dialog")).to_have_count(0)
                expect(page.get_by_role("grid")).to_be_focused()
        visit.press("u", "u", "u", "u", "u")  # other tests count what stands there
        expect(page.locator("#saved")).to_have_text("All saved")


def test_a_screen_reader_is_told_where_it_is_and_what_was_done(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    _, server = small
    with visiting(browser, server.url) as visit:
        page = visit.page
        grid = page.get_by_role("grid", name="Images")
        expect(grid).to_be_focused()
        columns = int(grid.get_attribute("aria-colcount") or 0)
        assert int(grid.get_attribute("aria-rowcount") or 0) == -(-399 // columns)
        visit.press("ArrowDown")
        expect(grid).to_have_attribute("aria-activedescendant", f"place-{columns}")
        cell = page.locator(f"#place-{columns}")
        expect(cell).to_have_attribute("aria-colindex", "1")
        assert cell.evaluate("one => one.parentElement.getAttribute('aria-rowindex')") == "2"
        visit.press("k")
        expect(page.locator("#live")).to_contain_text("Kept.")
        expect(cell).to_have_attribute("aria-label", f"{label(cell)}. Kept. {columns + 1} of 399")
        expect(grid).to_be_focused()


def label(cell: Any) -> str:
    """The words of a cell before its verdict."""
    return str(cell.get_attribute("aria-label")).rsplit(". ", 2)[0]


def test_everything_can_be_done_by_touch(
    small: tuple[ReviewProject, Server], browser: Browser
) -> None:
    project, server = small
    with visiting(browser, server.url, size=PHONE, touch=True) as visit:
        page = visit.page
        sizes = page.locator("button:visible").evaluate_all(
            "all => all.map(one => { const box = one.getBoundingClientRect(); "
            "return Math.min(box.width, box.height) })"
        )
        assert min(sizes) >= 44
        page.locator("#place-4").tap()
        page.get_by_role("button", name="Reject").tap()
        page.get_by_role("button", name="Blurred").tap()
        expect(page.locator("#place-4")).to_have_attribute("data-verdict", "reject")
        page.get_by_role("button", name="Compare").tap()
        expect(page.get_by_role("option").first).to_be_visible()
        until(lambda: len(history_of(project)) == 1, "the verdict is in the journal")
        assert history_of(project)[0].reason == "Blurred"

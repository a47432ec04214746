"""The gallery: one page that holds all it shows, only of verified files, and prompts as text."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from krea_dagster.curation.gallery.command import gallery_command
from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
from krea_dagster.curation.gallery.page import GallerySummary, estimate_bytes, write_gallery
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.errors import ConfigError
from tests.curation.gallery.gallery_harness import HOSTILE, PROMPTS, Walls


@pytest.fixture
def walls(tmp_path: Path) -> Walls:
    return Walls(tmp_path / "krea")


class Page(HTMLParser):
    """What a page holds: its elements with their attributes, and its text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.html = html
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self._silent = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._silent = tag == "style"

    def handle_data(self, data: str) -> None:
        self.text += "" if self._silent else data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for one, attributes in self.elements if one == tag]

    def pictures(self) -> list[Image.Image]:
        """The pictures, decoded."""
        sources = [one["src"] or "" for one in self.all("img")]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        data = [base64.b64decode(source.partition(",")[2]) for source in sources]
        return [Image.open(io.BytesIO(one)) for one in data]


def page_of(
    walls: Walls, wanted: GalleryFilter | None = None, **options: Any
) -> tuple[Page, GallerySummary]:
    storage = walls.write()
    verdicts = options.pop("verdicts", {})
    chosen = select_rows(storage, wanted or GalleryFilter(), verdicts)
    target = io.BytesIO()
    written = write_gallery(storage, chosen, target, **options)
    assert written.size_bytes == len(target.getvalue())
    return Page(target.getvalue().decode()), written


# -- what it shows --------------------------------------------------------------------------------


def test_each_row_has_its_picture_prompt_seed_size_credits_and_ids(walls: Walls) -> None:
    row = walls.hang(
        "heron", PROMPTS[0], pixels=(512, 256), size="2:1", seed=41, credits_charged=0.9
    )
    page, written = page_of(walls)
    (picture,) = page.pictures()
    assert (picture.format, picture.size) == ("WEBP", (320, 160))
    for text in (
        PROMPTS[0], "heron", "41", "2:1 1K", "512 × 256", "0.9", row["request_key"][:16],
        row["image_sha256"][:16], "1 image, 0.9 credits.",
    ):  # fmt: skip
        assert text in page.text, text
    (image,) = page.all("img")
    assert image["alt"] == f"Image for the prompt: {PROMPTS[0]}"
    assert (image["width"], image["height"]) == ("320", "160")
    assert (written.shown, written.missing, written.left_out) == (1, 0, 0)


def test_the_page_asks_for_nothing_and_allows_only_its_own_style(walls: Walls) -> None:
    walls.hang("a", HOSTILE)
    page, _ = page_of(walls)
    policies = [one["content"] or "" for one in page.all("meta") if "http-equiv" in one]
    assert len(policies) == 1
    assert policies[0].startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.findall(r"<style>(.*?)</style>", page.html, re.DOTALL)[0]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policies[0]
    assert "unsafe" not in policies[0]
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "link", "iframe", "object", "form", "base"}
    assert {one["href"][:1] for one in page.all("a") if one["href"]} == {"#"}
    assert not [one for _, one in page.elements if {"style", "onerror", "srcset"} & set(one)]


@pytest.mark.parametrize("place", ["prompt", "prompt_id", "partition", "title", "where", "error"])
def test_a_text_is_shown_as_text_wherever_it_comes_from(walls: Walls, place: str) -> None:
    plain = "a heron"
    name = HOSTILE if place == "prompt_id" else "heron"
    partition = HOSTILE[:40] if place == "partition" else "a"
    walls.hang(
        name,
        HOSTILE if place == "prompt" else plain,
        partition=partition,
        further={"mood": HOSTILE},
    )
    if place == "error":
        walls.fail("refused", plain)
        walls.rows["a"][-1]["error_message"] = HOSTILE
    filtered = GalleryFilter(statuses=(), where=[("mood", HOSTILE)] if place == "where" else [])
    page, _ = page_of(
        walls, filtered, title=HOSTILE if place == "title" else "x", filtered=filtered.words()
    )
    assert not page.all("script")
    assert all((one["src"] or "").startswith("data:") for one in page.all("img"))
    assert "</p><script>window.ran = 1</script>"[:40] in page.text
    assert "\x00" not in page.html


def test_a_long_prompt_is_there_in_full_behind_its_beginning(walls: Walls) -> None:
    prompt = " ".join(f"word{number}" for number in range(400))
    walls.hang("long", prompt)
    page, _ = page_of(walls)
    assert len(page.all("details")) == 1
    assert prompt in page.text
    assert len(page.all("img")[0]["alt"] or "") < 200


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("I;16", "PNG")],
)
def test_pictures_of_every_kind_are_shown(walls: Walls, mode: str, file_format: str) -> None:
    picture = Image.linear_gradient("L").resize((400, 400))
    if mode != "I;16":
        picture = picture.convert("RGB").convert(mode)
    walls.hang("one", "a heron", picture=picture, file_format=file_format)
    page, _ = page_of(walls)
    (shown,) = page.pictures()
    assert shown.size == (320, 320)


def test_rows_that_share_a_purchase_are_paid_for_once(walls: Walls) -> None:
    row = walls.hang("one", PROMPTS[3])
    walls.hang("twin", PROMPTS[3], request_key=row["request_key"])
    assert "2 images, 0.45 credits." in page_of(walls)[0].text


def test_partitions_have_a_heading_each_and_a_list_of_them(walls: Walls) -> None:
    for partition in ("b", "a", "c/1"):
        walls.hang("one", PROMPTS[3], partition=partition)
    page, _ = page_of(walls)
    assert [one["href"] for one in page.all("a")] == ["#main", "#part-1", "#part-2", "#part-3"]
    assert len(page.all("section")) == 3


def test_a_verdict_is_shown(walls: Walls) -> None:
    row = walls.hang("one", PROMPTS[3])
    page, _ = page_of(walls, verdicts={row["image_sha256"]: "reject"})
    assert "verdict v-reject" in page.html


# -- only what is verified ------------------------------------------------------------------------


def test_a_file_that_is_missing_or_changed_is_said_and_not_shown(walls: Walls) -> None:
    walls.hang("whole", PROMPTS[0])
    walls.path_of(walls.hang("gone", PROMPTS[1])).unlink()
    other = walls.path_of(walls.rows["a"][0]).read_bytes()
    walls.path_of(walls.hang("other", PROMPTS[2])).write_bytes(other)
    page, written = page_of(walls)
    assert len(page.all("img")) == 1
    assert "The file is missing." in page.text
    assert "The file is not the one that was verified." in page.text
    assert "2 stored images are not shown" in page.text
    assert (written.shown, written.missing) == (1, 2)


def test_a_file_that_was_never_a_picture_is_said(walls: Walls) -> None:
    row = walls.hang("text", PROMPTS[0])
    walls.path_of(row).write_bytes(b"not a picture")
    row["image_sha256"] = hashlib.sha256(b"not a picture").hexdigest()
    page, written = page_of(walls)
    assert "The file cannot be decoded." in page.text
    assert written.missing == 1


def test_a_row_that_failed_says_why_where_it_is_asked_for(walls: Walls) -> None:
    walls.hang("one", PROMPTS[0])
    walls.fail("refused", PROMPTS[1])
    assert len(page_of(walls)[0].all("figure")) == 1
    page, written = page_of(walls, GalleryFilter(statuses=()))
    assert "failed: content_policy_violation: refused <b>it</b>" in page.text
    assert "1 image of 2 rows" in page.text
    assert (written.shown, written.missing) == (1, 0)


# -- which rows -----------------------------------------------------------------------------------


def chosen(walls: Walls, judged: dict[str, str] | None = None, **filtered: Any) -> list[str]:
    found = select_rows(walls.write(), GalleryFilter(**filtered), judged or {})
    return [row["prompt_id"] for row in found.rows]


@pytest.fixture
def mixed(walls: Walls) -> Walls:
    """Four rows in two partitions, the second of which has no column ``mood``."""
    small = (32, 32)
    walls.hang(
        "one", "a", pixels=small, seed=7, further={"mood": "calm", "score": 0.5, "new": True}
    )
    walls.hang(
        "two", "b", pixels=small, seed=8, further={"mood": "wild", "score": 2.0, "new": False}
    )
    walls.hang(
        "three", "c", pixels=small, seed=7, further={"mood": None, "score": None, "new": None}
    )
    walls.hang("four", "d", pixels=small, seed=9, partition="b")
    return walls


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        ([("mood", "calm")], ["one"]),
        ([("mood", "calm"), ("mood", "wild")], ["one", "two"]),
        ([("mood", "")], ["three", "four"]),
        ([("seed", "7")], ["one", "three"]),
        ([("seed", "7"), ("mood", "calm")], ["one"]),
        ([("score", "0.50")], ["one"]),
        ([("score", "")], ["three", "four"]),
        ([("new", "true")], ["one"]),
        ([("prompt", "d")], ["four"]),
        ([("mood", "nobody's")], []),
    ],
)
def test_rows_are_chosen_by_any_column(
    mixed: Walls, where: list[tuple[str, str]], expected: list[str]
) -> None:
    assert chosen(mixed, where=where) == expected


def test_rows_are_chosen_by_partition_verdict_and_number(mixed: Walls) -> None:
    shas = {row["prompt_id"]: row["image_sha256"] for rows in mixed.rows.values() for row in rows}
    verdicts = {shas["one"]: "keep", shas["four"]: "reject"}
    assert chosen(mixed, partitions=["b"]) == ["four"]
    assert chosen(mixed, partitions=["b", "a"]) == ["four", "one", "two", "three"]
    assert chosen(mixed, verdicts, verdicts=["keep", "reject"]) == ["one", "four"]
    assert chosen(mixed, verdicts, verdicts=["none"]) == ["two", "three"]
    found = select_rows(mixed.storage, GalleryFilter(limit=2), {})
    assert (len(found.rows), found.matched) == (2, 4)


@pytest.mark.parametrize(
    ("filtered", "said"),
    [
        ({"where": [("moood", "calm")]}, "no column 'moood'; it has prompt_id"),
        ({"where": [("seed", "seven")]}, "column 'seed' holds int32, which 'seven' is not"),
        ({"partitions": ["nowhere"]}, "no manifest of partition 'nowhere'"),
        ({"statuses": ["done"]}, "no status 'done'"),
        ({"verdicts": ["nice"]}, "no verdict 'nice'"),
        ({"limit": 0}, "at least one row"),
    ],
)
def test_a_filter_that_cannot_be_met_says_why(
    mixed: Walls, filtered: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen(mixed, **filtered)


def test_without_a_manifest_there_is_no_gallery(walls: Walls) -> None:
    with pytest.raises(ConfigError, match="no manifest under"):
        select_rows(walls.storage, GalleryFilter(), {})


def test_the_filter_is_said_in_words() -> None:
    filtered = GalleryFilter(
        partitions=["a", "b"],
        where=[("mood", "calm"), ("mood", "wild"), ("tag", "")],
        verdicts=["keep"],
    )
    assert (
        filtered.words() == "partition a or b, mood is calm or wild, tag is nothing, verdict keep"
    )
    assert GalleryFilter().words() == ""


# -- its size -------------------------------------------------------------------------------------


def test_the_page_stays_below_its_size_and_says_what_is_left_out(walls: Walls) -> None:
    for number in range(30):
        walls.hang(f"row {number}", PROMPTS[number % 4])
    whole, all_of_it = page_of(walls)
    page, written = page_of(walls, most_bytes=150_000)
    assert written.size_bytes <= 150_000
    assert 0 < written.shown < 30
    assert written.left_out == 30 - written.shown
    assert f"{written.left_out} more rows are left out" in page.text
    about = estimate_bytes(walls.storage, select_rows(walls.storage, GalleryFilter(), {}).rows)
    assert 0.6 < about / all_of_it.size_bytes < 1.6
    assert len(whole.all("img")) == 30


def test_so_does_one_of_prompts_that_markup_makes_longer(walls: Walls) -> None:
    for number in range(12):
        walls.hang(f"row {number}", '"<&>"' * 1000)
    _, written = page_of(walls, most_bytes=300_000)
    assert written.size_bytes <= 300_000
    assert 0 < written.shown < 12


def test_a_page_with_no_room_for_one_picture_is_refused(walls: Walls) -> None:
    walls.hang("one", PROMPTS[0])
    with pytest.raises(ConfigError, match="no room for one picture"):
        page_of(walls, most_bytes=8_000)


# -- the command ----------------------------------------------------------------------------------


def command(walls: Walls, *arguments: str) -> Result:
    options = ["--storage", str(walls.root), "-o", str(walls.root.parent / "page.html")]
    return CliRunner().invoke(gallery_command, [*options, *arguments])


def test_the_command_writes_the_page_and_says_its_size_before_and_after(mixed: Walls) -> None:
    mixed.write()
    result = command(mixed, "--where", "seed=7", "--title", "Herons")
    assert result.exit_code == 0, result.output
    assert re.search(r"^2 of 2 rows, about 0\.\d MB$", result.stderr, re.MULTILINE)
    assert re.search(r"page\.html: 2 images, 0\.\d MB$", result.stdout.strip())
    page = Page((mixed.root.parent / "page.html").read_text())
    assert len(page.all("img")) == 2
    assert "Seed is 7." in page.text
    assert "<h1>Herons</h1>" in page.html


def test_the_command_s_figures_are_json_and_a_missing_file_is_its_exit_code(mixed: Walls) -> None:
    mixed.path_of(mixed.rows["a"][0]).unlink()
    mixed.write()
    result = command(mixed, "--json", "--limit", "2")
    figures = json.loads(result.stdout)
    size = (mixed.root.parent / "page.html").stat().st_size
    assert figures == {
        "path": str(mixed.root.parent / "page.html"),
        "images": 1,
        "files_missing": 1,
        "rows_left_out": 2,
        "bytes": size,
    }
    assert result.exit_code == 1


def test_the_command_takes_verdicts_from_the_journal(mixed: Walls) -> None:
    mixed.write()
    row = mixed.rows["a"][1]
    with_journal = Journal(f"sqlite:///{mixed.root / 'journal.db'}")
    with_journal.verdicts.add(
        [
            Verdict(
                verdict_id="1",
                verdict="keep",
                reviewer="ada",
                **{
                    name: row[name]
                    for name in (
                        "image_sha256", "request_key", "prompt_id", "sample", "attempt",
                        "partition_key",
                    )
                },
            )
        ]
    )  # fmt: skip
    with_journal.close()
    result = command(mixed, "--verdict", "keep", "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["images"] == 1


def test_the_command_says_when_there_is_nothing_to_show_or_no_journal(mixed: Walls) -> None:
    mixed.write()
    for arguments, said in (
        (["--where", "mood=nobody"], "there is nothing to show"),
        (["--verdict", "keep"], "no journal to read verdicts from"),
    ):
        result = command(mixed, *arguments)
        assert isinstance(result.exception, ConfigError)
        assert said in str(result.exception)
    assert command(mixed, "--where", "mood").exit_code == 2

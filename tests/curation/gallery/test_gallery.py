"""The gallery: one self-contained page of verified files, with escaped prompts."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
from collections.abc import Mapping, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner, Result
from PIL import Image

from krea_dagster.cli.gallery import gallery_command
from krea_dagster.curation.column_filter import parse_filters
from krea_dagster.curation.gallery.filter import GalleryFilter, select_rows
from krea_dagster.curation.gallery.page import GallerySummary, estimate, write_gallery
from krea_dagster.curation.thumbnails import Thumbnails
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import Verdict
from krea_dagster.errors import ConfigError
from tests.curation.gallery.gallery_harness import HOSTILE, PROMPTS, GalleryProject, judged


@pytest.fixture
def project(tmp_path: Path) -> GalleryProject:
    return GalleryProject(tmp_path / "krea")


class Page(HTMLParser):
    """A parsed page: its elements with their attributes, and its text."""

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

    def images(self) -> list[Image.Image]:
        """Return the decoded images."""
        sources = [one["src"] or "" for one in self.all("img")]
        assert all(source.startswith("data:image/webp;base64,") for source in sources)
        data = [base64.b64decode(source.partition(",")[2]) for source in sources]
        return [Image.open(io.BytesIO(one)) for one in data]


def page_of(
    project: GalleryProject, wanted: GalleryFilter | None = None, **options: Any
) -> tuple[Page, GallerySummary]:
    storage = project.write()
    verdicts = options.pop("verdicts", {})
    chosen = select_rows(storage, wanted or GalleryFilter(), verdicts)
    target = io.BytesIO()
    written = write_gallery(storage, chosen, target, **options)
    assert written.size_bytes == len(target.getvalue())
    return Page(target.getvalue().decode()), written


# -- what it shows --------------------------------------------------------------------------------


def test_each_row_has_its_image_prompt_seed_size_credits_and_ids(project: GalleryProject) -> None:
    row = project.add_image(
        "heron", PROMPTS[0], pixels=(512, 256), size="2:1", seed=41, credits_charged=0.9
    )
    page, written = page_of(project)
    (shown,) = page.images()
    assert (shown.format, shown.size) == ("WEBP", (320, 160))
    for text in (
        PROMPTS[0], "heron", "41", "2:1 1K", "512 × 256", "0.9", row["request_key"][:16],
        row["image_sha256"][:16], "1 image, 0.9 credits.",
    ):  # fmt: skip
        assert text in page.text, text
    (image,) = page.all("img")
    assert image["alt"] == f"Image for the prompt: {PROMPTS[0]}"
    assert (image["width"], image["height"]) == ("320", "160")
    assert (written.shown, written.missing, written.left_out) == (1, 0, 0)


def test_the_page_loads_nothing_and_allows_only_its_own_style(project: GalleryProject) -> None:
    project.add_image("a", HOSTILE)
    page, _ = page_of(project)
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
def test_every_text_is_escaped(project: GalleryProject, place: str) -> None:
    plain = "a heron"
    name = HOSTILE if place == "prompt_id" else "heron"
    partition = HOSTILE[:40] if place == "partition" else "a"
    project.add_image(
        name,
        HOSTILE if place == "prompt" else plain,
        partition=partition,
        further={"mood": HOSTILE},
    )
    if place == "error":
        project.add_failed("refused", plain)
        project.rows["a"][-1]["error_message"] = HOSTILE
    wanted = GalleryFilter(
        statuses=(), where=parse_filters([f"mood={HOSTILE}"] if place == "where" else [])
    )
    page, _ = page_of(
        project, wanted, title=HOSTILE if place == "title" else "x", filter_text=wanted.words()
    )
    assert not page.all("script")
    assert all((one["src"] or "").startswith("data:") for one in page.all("img"))
    assert "</p><script>window.ran = 1</script>"[:40] in page.text
    assert "\x00" not in page.html


def test_a_long_prompt_can_be_expanded(project: GalleryProject) -> None:
    prompt = " ".join(f"word{number}" for number in range(400))
    project.add_image("long", prompt)
    page, _ = page_of(project)
    assert len(page.all("details")) == 1
    assert prompt in page.text
    assert len(page.all("img")[0]["alt"] or "") < 200


@pytest.mark.parametrize(
    ("mode", "file_format"),
    [("RGB", "JPEG"), ("RGBA", "PNG"), ("P", "PNG"), ("L", "PNG"), ("I;16", "PNG")],
)
def test_images_of_every_mode_are_shown(
    project: GalleryProject, mode: str, file_format: str
) -> None:
    image = Image.linear_gradient("L").resize((400, 400))
    if mode != "I;16":
        image = image.convert("RGB").convert(mode)
    project.add_image("one", "a heron", image=image, file_format=file_format)
    page, _ = page_of(project)
    (shown,) = page.images()
    assert shown.size == (320, 320)


@pytest.mark.parametrize(("side", "expected"), [(320, "kept"), (200, "kept"), (512, "file")])
def test_a_kept_thumbnail_is_shown_if_it_is_large_enough(
    project: GalleryProject, side: int, expected: str
) -> None:
    row = project.add_image("one", PROMPTS[0], image=Image.new("RGB", (1024, 1024), "red"))
    project.write()
    Thumbnails(project.storage).add(row["image_sha256"], Image.new("RGB", (1024, 1024), "blue"))
    page, _ = page_of(project, side=side)
    (shown,) = page.images()
    assert shown.size == (side, side)
    red, _, blue = cast("tuple[int, int, int]", shown.getpixel((9, 9)))
    assert ("kept" if blue > red else "file") == expected


def test_a_thumbnail_that_is_missing_or_damaged_is_made_again(project: GalleryProject) -> None:
    row = project.add_image("one", PROMPTS[0], image=Image.new("RGB", (1024, 1024), "red"))
    first, _ = page_of(project)
    made = Thumbnails(project.storage).find(row["image_sha256"])
    assert made is not None
    (kept,) = Path(project.storage.locate("thumbnails")).rglob("*.jpg")
    for damage in (made[:900], made[:2] + bytes(900) + made[-2:]):
        kept.write_bytes(damage)
        page, _ = page_of(project)
        assert page.images()[0].tobytes() == first.images()[0].tobytes()
        assert kept.read_bytes() == made


def test_a_purchase_that_rows_share_is_counted_once(project: GalleryProject) -> None:
    row = project.add_image("one", PROMPTS[3])
    project.add_image("twin", PROMPTS[3], request_key=row["request_key"])
    assert "2 images, 0.45 credits." in page_of(project)[0].text


def test_partitions_have_a_heading_each_and_a_list_of_them(project: GalleryProject) -> None:
    for partition in ("b", "a", "c/1"):
        project.add_image("one", PROMPTS[3], partition=partition)
    page, _ = page_of(project)
    assert [one["href"] for one in page.all("a")] == ["#main", "#part-1", "#part-2", "#part-3"]
    assert len(page.all("section")) == 3


def test_a_verdict_is_shown(project: GalleryProject) -> None:
    row = project.add_image("one", PROMPTS[3])
    page, _ = page_of(project, verdicts=judged(row, "reject"))
    assert "verdict v-reject" in page.html


def test_reason_tags_and_note_are_shown_with_the_verdict_and_without_one(
    project: GalleryProject,
) -> None:
    said: dict[str, Any] = {"tags": ("dusk", "wide"), "note": "crop <b>left</b>"}
    hands = project.add_image("one", PROMPTS[3])
    tagged = project.add_image("two", PROMPTS[4])
    page, _ = page_of(
        project,
        verdicts={
            **judged(hands, "reject", reason="six fingers"),
            **judged(tagged, "none", **said),
        },
    )
    for text in ("six fingers", "dusk, wide", "crop <b>left</b>"):
        assert text in page.text
    assert "v-none" not in page.html, "it was not judged"


@pytest.mark.parametrize(
    ("column", "values", "heads"),
    [
        ("sample", {}, ["0"]),
        ("new", {"new": False}, ["False"]),
        ("score", {"score": 0.0}, ["0.0"]),
        ("mood", {"mood": ""}, ["(none)"]),
    ],
)
def test_a_section_of_zero_or_false_is_named_by_its_value(
    project: GalleryProject, column: str, values: dict[str, Any], heads: list[str]
) -> None:
    project.add_image("a", "a day", further=values)
    page, _ = page_of(project, GalleryFilter(by=column))
    assert re.findall(r"<h2[^>]*>([^<]*)<", page.html) == heads


def test_a_column_divides_the_page_into_sections(project: GalleryProject) -> None:
    for name, mood in (("a", "calm"), ("b", "wild"), ("c", None), ("d", "calm")):
        project.add_image(name, f"a {name} day", further={"mood": mood})
    page, _ = page_of(project, GalleryFilter(by="mood"))
    heads = re.findall(r"<h2[^>]*>([^<]*)<span[^>]*>([^<]*)", page.html)
    assert heads == [("calm", "2 rows"), ("wild", "1 row"), ("(none)", "1 row")]
    with pytest.raises(ConfigError, match="'moods'"):
        page_of(project, GalleryFilter(by="moods"))


# -- only what is verified ------------------------------------------------------------------------


def test_a_file_that_is_missing_or_changed_is_reported_and_not_shown(
    project: GalleryProject,
) -> None:
    project.add_image("whole", PROMPTS[0])
    project.path_of(project.add_image("gone", PROMPTS[1])).unlink()
    other = project.path_of(project.rows["a"][0]).read_bytes()
    project.path_of(project.add_image("other", PROMPTS[2])).write_bytes(other)
    page, written = page_of(project)
    assert len(page.all("img")) == 1
    assert "The file is missing." in page.text
    assert "The file is not the one that was verified." in page.text
    assert "2 stored images are not shown" in page.text
    assert (written.shown, written.missing) == (1, 2)


def test_a_file_that_was_never_an_image_is_reported(project: GalleryProject) -> None:
    row = project.add_image("text", PROMPTS[0])
    project.path_of(row).write_bytes(b"not an image")
    row["image_sha256"] = hashlib.sha256(b"not an image").hexdigest()
    page, written = page_of(project)
    assert "The file cannot be decoded." in page.text
    assert written.missing == 1


def test_a_row_that_failed_shows_its_error_when_its_status_is_selected(
    project: GalleryProject,
) -> None:
    project.add_image("one", PROMPTS[0])
    project.add_failed("refused", PROMPTS[1])
    assert len(page_of(project)[0].all("figure")) == 1
    page, written = page_of(project, GalleryFilter(statuses=()))
    assert "failed: content_policy_violation: refused <b>it</b>" in page.text
    assert "1 image of 2 rows" in page.text
    assert (written.shown, written.missing) == (1, 0)


# -- which rows -----------------------------------------------------------------------------------


def chosen(
    project: GalleryProject,
    verdicts_by_image: Mapping[str, Verdict] | None = None,
    where: Sequence[str] = (),
    **wanted: Any,
) -> list[str]:
    found = select_rows(
        project.write(),
        GalleryFilter(where=parse_filters(where), **wanted),
        verdicts_by_image or {},
    )
    return [row["prompt_id"] for row in found.rows]


@pytest.fixture
def mixed(project: GalleryProject) -> GalleryProject:
    """Add four rows in two partitions; the second has no column ``mood``."""
    small = (32, 32)
    project.add_image(
        "one", "a", pixels=small, seed=7, further={"mood": "calm", "score": 0.5, "new": True}
    )
    project.add_image(
        "two", "b", pixels=small, seed=8, further={"mood": "wild", "score": 2.0, "new": False}
    )
    project.add_image(
        "three", "c", pixels=small, seed=7, further={"mood": None, "score": None, "new": None}
    )
    project.add_image("four", "d", pixels=small, seed=9, partition="b")
    return project


@pytest.mark.parametrize(
    ("where", "expected"),
    [
        (["mood=calm"], ["one"]),
        (["mood=calm", "mood=wild"], ["one", "two"]),
        (["mood="], ["three", "four"]),
        (["seed=7"], ["one", "three"]),
        (["seed=7", "mood=calm"], ["one"]),
        (["score=0.50"], ["one"]),
        (["score="], ["three", "four"]),
        (["new=true"], ["one"]),
        (["prompt=d"], ["four"]),
        (["mood=none's"], []),
    ],
)
def test_rows_are_chosen_by_any_column(
    mixed: GalleryProject, where: list[str], expected: list[str]
) -> None:
    assert chosen(mixed, where=where) == expected


def test_rows_are_chosen_by_partition_verdict_and_number(mixed: GalleryProject) -> None:
    row_of = {row["prompt_id"]: row for rows in mixed.rows.values() for row in rows}
    verdicts = {**judged(row_of["one"], "keep"), **judged(row_of["four"], "reject")}
    assert chosen(mixed, partitions=["b"]) == ["four"]
    assert chosen(mixed, partitions=["b", "a"]) == ["four", "one", "two", "three"]
    assert chosen(mixed, verdicts, verdicts=["keep", "reject"]) == ["one", "four"]
    assert chosen(mixed, verdicts, verdicts=["none"]) == ["two", "three"]
    found = select_rows(mixed.storage, GalleryFilter(limit=2), {})
    assert (len(found.rows), found.matched) == (2, 4)


@pytest.mark.parametrize(
    ("wanted", "said"),
    [
        ({"where": ["moood=calm"]}, "no column 'moood'; it has prompt_id"),
        ({"where": ["seed=seven"]}, "column 'seed' has the type int32, which 'seven' is not"),
        ({"partitions": ["nowhere"]}, "no manifest of partition 'nowhere'"),
        ({"statuses": ["done"]}, "unknown status 'done'"),
        ({"verdicts": ["nice"]}, "unknown verdict 'nice'"),
        ({"limit": 0}, "must be 1 or more, not 0"),
    ],
)
def test_an_invalid_filter_is_rejected_with_the_reason(
    mixed: GalleryProject, wanted: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        chosen(mixed, **wanted)


def test_without_a_manifest_there_is_no_gallery(project: GalleryProject) -> None:
    with pytest.raises(ConfigError, match="no manifest under"):
        select_rows(project.storage, GalleryFilter(), {})


def test_the_filter_is_described_in_words() -> None:
    wanted = GalleryFilter(
        partitions=["a", "b"],
        where=parse_filters(["mood=calm", "mood=wild", "tag="]),
        verdicts=["keep"],
    )
    assert wanted.words() == "partition a or b, mood is calm or wild, tag is nothing, verdict keep"
    assert GalleryFilter().words() == ""


# -- its size -------------------------------------------------------------------------------------


def test_the_page_stays_below_its_size_and_says_what_is_left_out(project: GalleryProject) -> None:
    for number in range(30):
        project.add_image(f"row {number}", PROMPTS[number % 4])
    whole, all_of_it = page_of(project)
    page, written = page_of(project, most_bytes=150_000)
    assert written.size_bytes <= 150_000
    assert 0 < written.shown < 30
    assert written.left_out == 30 - written.shown
    assert f"{written.left_out} more rows are left out" in page.text
    about = estimate(project.storage, select_rows(project.storage, GalleryFilter(), {}).rows)
    assert 0.6 < about.size_bytes / all_of_it.size_bytes < 1.6
    assert len(whole.all("img")) == 30


def test_prompts_that_grow_when_escaped_are_counted_at_their_escaped_size(
    project: GalleryProject,
) -> None:
    for number in range(12):
        project.add_image(f"row {number}", '"<&>"' * 1000)
    _, written = page_of(project, most_bytes=300_000)
    assert written.size_bytes <= 300_000
    assert 0 < written.shown < 12


def test_a_size_too_small_for_one_image_is_rejected(project: GalleryProject) -> None:
    project.add_image("one", PROMPTS[0])
    with pytest.raises(ConfigError, match="too small for one image"):
        page_of(project, most_bytes=8_000)


# -- the command ----------------------------------------------------------------------------------


def command(project: GalleryProject, *arguments: str) -> Result:
    options = ["--storage", str(project.root), "-o", str(project.root.parent / "page.html")]
    return CliRunner().invoke(gallery_command, [*options, *arguments])


def test_the_command_writes_the_page_and_says_its_size_before_and_after(
    mixed: GalleryProject,
) -> None:
    mixed.write()
    result = command(mixed, "--where", "seed=7", "--title", "Herons")
    assert result.exit_code == 0, result.output
    assert re.search(r"^2 of 2 rows, about 0\.\d MB$", result.stderr, re.MULTILINE)
    assert re.search(r"page\.html: 2 images, 0\.\d MB$", result.stdout.strip())
    page = Page((mixed.root.parent / "page.html").read_text())
    assert len(page.all("img")) == 2
    assert "Seed is 7." in page.text
    assert "<h1>Herons</h1>" in page.html


def test_the_command_prints_json_and_exits_with_1_for_a_missing_file(mixed: GalleryProject) -> None:
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


def test_the_command_takes_verdicts_from_the_journal(mixed: GalleryProject) -> None:
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


def test_the_command_says_when_there_is_nothing_to_show_or_no_journal(
    mixed: GalleryProject,
) -> None:
    mixed.write()
    for arguments, said in (
        (["--where", "mood=none"], "no row matches the filter"),
        (["--verdict", "keep"], "no journal to read verdicts from"),
    ):
        result = command(mixed, *arguments)
        assert isinstance(result.exception, ConfigError)
        assert said in str(result.exception)
    assert isinstance(command(mixed, "--where", "mood").exception, ConfigError)

"""The prompt on an image is written in every script that prompts use, without boxes."""

from __future__ import annotations

from importlib.resources import files
from io import BytesIO

import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageChops, ImageDraw

from krea_dagster.emulator.letters import PlainPen, pen_for, prepared
from krea_dagster.emulator.render import render_png
from krea_dagster.emulator.scripts import joined, visual

SCRIPTS = {
    "latin": "Straße, crème brûlée, œuvre, Łódź, Ångström",
    "cyrillic": "Лиса в снегу, ёлка",
    "greek": "Μια αλεπού στο χιόνι",
    "chinese": "远山层层叠叠，留白很多",
    "japanese": "雨の午後、窓辺で眠る三毛猫",
    "korean": "눈 속의 여우",
    "arabic": "ثعلب في الثلج",
    "hebrew": "שועל בשלג",
    "hindi": "बर्फ़ में लोमड़ी",
    "thai": "สุนัขจิ้งจอกในหิมะ",
    "emoji": "🦊🎉🌊",
}


def drawn(text: str) -> Image.Image:
    """The line as it is written, white on black."""
    image = Image.new("RGB", (600, 60))
    pen_for(text, 40).draw(ImageDraw.Draw(image), (4, 4), text, (255, 255, 255))
    return image


@pytest.mark.parametrize("text", SCRIPTS.values(), ids=SCRIPTS)
def test_each_letter_of_a_script_is_drawn_in_a_form_of_its_own(text: str) -> None:
    letters = {letter for letter in text if letter.isalpha()}
    images = {drawn(letter).tobytes() for letter in letters}
    assert len(images) == len(letters), "two letters look the same: they may be boxes"
    assert drawn(" ").tobytes() not in images
    assert "U+" not in prepared(text)


def test_the_prompts_of_the_sample_are_written_out() -> None:
    sample = files("krea_dagster.cli").joinpath("sample_prompts.parquet")
    prompts = pq.read_table(str(sample))["prompt"].to_pylist()
    assert not [prompt for prompt in prompts if "U+" in prepared(prompt)]


def test_a_letter_that_no_font_has_is_written_as_its_code_point() -> None:
    assert prepared("a 𠮷 and a fox") == "a U+20BB7 and a fox"


def test_a_text_of_pillow_s_own_letters_is_written_in_its_own_font() -> None:
    assert isinstance(pen_for("A quay at dawn – “quiet”…"[:14], 20), PlainPen)


def test_marks_are_drawn_over_their_letter_and_composed_where_unicode_can() -> None:
    assert prepared("cre\u0300me") == "crème"
    alone, marked = drawn("\u0e2a"), drawn("\u0e2a\u0e38")
    assert ImageChops.difference(alone, marked).getbbox() is not None
    assert pen_for("\u0e2a\u0e38", 40).length("\u0e2a\u0e38") == pen_for("\u0e2a", 40).length(
        "\u0e2a"
    )


def test_a_prompt_in_another_script_gives_the_same_image_each_time() -> None:
    first = render_png(SCRIPTS["japanese"], 7, 256, 256)
    assert render_png(SCRIPTS["japanese"], 7, 256, 256) == first
    with Image.open(BytesIO(first)) as image:
        assert image.size == (256, 256)


# -- right to left, and joined --------------------------------------------------------------------


def test_hebrew_is_written_from_the_right_and_numbers_in_it_from_the_left() -> None:
    assert "".join(visual("אב 12 (גד)")) == "(דג) 12 בא"
    assert "".join(visual("fox אב, ok")) == "fox בא, ok"
    assert visual("plain") == list("plain")


def test_marks_stay_with_their_letter_when_the_order_turns() -> None:
    assert visual("א\u05b8ב") == ["ב", "א\u05b8"]


def test_arabic_letters_have_the_forms_of_their_places() -> None:
    assert joined("بيت") == "\ufe91\ufef4\ufe96", "initial, medial, final"
    assert joined("دار") == "\ufea9\ufe8d\ufead", "none of these joins to the next"
    assert joined("لا") == "\ufefb", "lam and alef are one"
    assert joined("سلام") == "\ufeb3\ufefc\ufee1"
    assert joined("بَيت") == "\ufe91\u064e\ufef4\ufe96", "a vowel sign does not part the letters"
    assert joined("fox") == "fox"

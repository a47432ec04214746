"""The images: always the same for the same request, of exactly its size, and never flat."""

from __future__ import annotations

import io

import pytest
from PIL import Image, ImageChops

from krea_dagster.emulator.contract import PIXELS, QUALITIES
from krea_dagster.emulator.images import ImageFiles, bomb
from krea_dagster.emulator.render import readable, render, render_png

SIZES = [(size, quality) for size in PIXELS for quality in QUALITIES]


def opened(png: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def test_the_table_of_sizes_is_the_published_one() -> None:
    assert len(SIZES) == 22
    assert PIXELS["4:3"] == ((1152, 896), (2304, 1728))
    assert PIXELS["5:4"] == ((1152, 896), (2240, 1792))
    assert PIXELS["9:16"] == ((768, 1344), (1472, 2688))
    for size, pixels in PIXELS.items():
        turned = ":".join(reversed(size.split(":")))
        assert tuple((height, width) for width, height in PIXELS[turned]) == pixels


@pytest.mark.parametrize(("size", "quality"), SIZES)
def test_an_image_has_exactly_its_pixels_and_is_not_flat(size: str, quality: str) -> None:
    width, height = PIXELS[size][QUALITIES.index(quality)]
    image = opened(render_png("a red fox", 7, width, height))
    assert (image.format, image.mode, image.size) == ("PNG", "RGB", (width, height))
    for band in image.split():
        shades = [shade for shade, count in enumerate(band.histogram()) if count]
        assert shades[-1] - shades[0] > 60


def test_the_file_contains_what_was_drawn() -> None:
    drawn = render("a red fox", 7, 1024, 1024)
    assert (
        ImageChops.difference(opened(render_png("a red fox", 7, 1024, 1024)), drawn).getbbox()
        is None
    )


def test_the_same_request_gives_the_same_bytes_and_another_seed_different_ones() -> None:
    first = render_png("a red fox", 7, 1024, 1024)
    assert render_png("a red fox", 7, 1024, 1024) == first
    assert render_png("a red fox", 8, 1024, 1024) != first
    assert render_png("a red fos", 7, 1024, 1024) != first


def test_another_seed_gives_a_visibly_different_image() -> None:
    thumbnails = []
    for seed in (1, 2):
        image = render("a red fox", seed, 1024, 1024)
        thumbnails.append(image.resize((16, 16), Image.Resampling.BOX).tobytes())
    differences = [abs(a - b) for a, b in zip(*thumbnails, strict=True)]
    assert sum(differences) / len(differences) > 10


def test_the_prompt_is_large_enough_to_be_read_on_a_thumbnail() -> None:
    """Only the letters of the prompt are pure white in the image."""

    def white_rows(prompt: str) -> int:
        lightest = render(prompt, 7, 1024, 1024).convert("L").point(lambda shade: shade == 255)
        box = lightest.getbbox()
        return 0 if box is None else box[3] - box[1]

    assert white_rows("RED FOX") * 256 // 1024 >= 16
    assert white_rows(" \n\t ") == 0


@pytest.mark.parametrize(
    "prompt",
    [
        "",
        "\n\n\n",
        "\ud800 lone \udfff surrogates",
        "\x00\x01\x1b[31m controls \x7f\x9f\u202e\u2028",
        "فتاة تقرأ كتابا بجانب النافذة",
        "猫が窓辺で眠る、柔らかい光、油絵のような質感",
        "👩‍🚀🏳️‍🌈 emoji",
        "x" * 10_000,
        "word " * 2_000,
        "e\u0301" * 500,
        "[emulator: black]",
    ],
)
def test_any_prompt_can_be_drawn(prompt: str) -> None:
    assert opened(render_png(prompt, 7, 704, 1472)).size == (704, 1472)


def test_the_written_prompt_has_no_control_characters_and_is_shortened() -> None:
    assert readable("a\x00\x1b[0m b\u202ec\n\n d") == "a [0m b c d"
    assert len(readable("x" * 10_000)) == 600


def test_images_are_cached_up_to_a_limit_and_drawn_again_above_it() -> None:
    images = ImageFiles(keep_bytes=1)
    first = images.png(("a red fox", 7, 704, 1472))
    again = images.png(("a red fox", 7, 704, 1472))
    assert first == again
    assert first is not again
    images = ImageFiles()
    key = ("a red fox", 7, 704, 1472)
    assert images.png(key) is images.png(key)


def test_pillow_detects_the_decompression_bomb() -> None:
    with pytest.raises(Image.DecompressionBombError):
        Image.open(io.BytesIO(bomb()))

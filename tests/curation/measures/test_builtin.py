"""The built-in measures, on images whose measures are known."""

from __future__ import annotations

import io

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageFilter, ImageOps

from krea_dagster.curation.measures.builtin import NAMES, measure, to_grey_or_rgb
from krea_dagster.curation.measures.pdq import LEAST_QUALITY, NEAR_BITS, perceptual_hash

Pixels = npt.NDArray[np.uint8]


def noise(side: int = 256, seed: int = 0) -> Image.Image:
    """Draw noise with uniformly distributed levels."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (side, side, 3), np.uint8))


def gradient() -> Image.Image:
    """Draw 256 columns from black to white."""
    return Image.fromarray(np.tile(np.arange(256, dtype=np.uint8), (256, 1)))


def checkerboard(square: int, side: int = 256) -> Image.Image:
    rows, columns = np.indices((side, side)) // square
    return Image.fromarray(((rows + columns) % 2 * 255).astype(np.uint8))


def waves(width: int, height: int, kind: int = 0) -> Image.Image:
    """Draw a smooth image of integers, the same on every machine."""
    y, x = np.indices((height, width), dtype=np.int64)
    x, y = x * 1024 // width, y * 1024 // height
    red = (x * x // 700 + y * (3 + kind)) % 512
    green = (x * y // 900 + y * y // (500 + 100 * kind)) % 512
    blue = (x * 2 + (x - 512) * (y - 300) // 400) % 512
    folded = [np.where(one > 255, 511 - one, one) for one in (red, green, blue)]
    return Image.fromarray(np.stack(folded, axis=2).astype(np.uint8))


def framed(share: float) -> Image.Image:
    """Draw noise of 200×200 pixels in a white frame that takes this share of the area."""
    side = round(200 / (1 - share) ** 0.5 / 2) * 2
    image = Image.new("RGB", (side, side), "white")
    image.paste(noise(200), ((side - 200) // 2, (side - 200) // 2))
    return image


def bits(one: bytes, other: bytes) -> int:
    """Return the number of bits in which two hashes differ."""
    return (int.from_bytes(one, "big") ^ int.from_bytes(other, "big")).bit_count()


# -- images with known measures --------------------------------------------------------------


def test_one_flat_colour_has_no_structure_at_all() -> None:
    found = measure(Image.new("RGB", (64, 48), (51, 51, 51)))
    assert found.brightness == pytest.approx(0.2)
    assert found.contrast == pytest.approx(0.0, abs=1e-9)
    assert (found.sharpness, found.entropy) == (0.0, 0.0)
    assert (found.main_colour_share, found.border_share) == (1.0, 1.0)
    assert found.perceptual_hash_quality == 0


def test_noise_is_sharp_and_has_no_main_colour_and_no_border() -> None:
    found = measure(noise().convert("L"))
    # Of n independent pixels of variance v the Laplacian has (4² + 4) v.
    variance = float(np.var(np.asarray(noise().convert("L"), float)))
    assert found.sharpness == pytest.approx(20 * variance, rel=0.02)
    assert found.border_share == 0.0
    assert measure(noise()).main_colour_share < 0.005


def test_a_gradient_holds_every_level_of_grey_once() -> None:
    found = measure(gradient())
    assert found.entropy == pytest.approx(8.0)
    assert found.brightness == pytest.approx(0.5)
    assert found.contrast == pytest.approx(np.sqrt((256**2 - 1) / 12) / 255)
    assert found.sharpness == 0.0  # it rises evenly
    assert found.main_colour_share == pytest.approx(32 / 256, abs=0.01)


@pytest.mark.parametrize("square", [1, 2, 8, 32])
def test_a_checkerboard_of_any_size_is_half_of_each_colour(square: int) -> None:
    found = measure(checkerboard(square))
    assert found.brightness == pytest.approx(0.5)
    assert found.contrast == pytest.approx(0.5)
    assert found.entropy == pytest.approx(1.0)
    assert found.main_colour_share == pytest.approx(0.5, abs=0.02)


def test_smaller_squares_are_sharper() -> None:
    found = [measure(checkerboard(square)).sharpness for square in (1, 2, 4, 8, 16, 32)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx((8 * 255 / 2) ** 2)  # each pixel unlike its four neighbours


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6])
def test_a_frame_counts_by_the_area_it_takes(share: float) -> None:
    image = framed(share)
    taken = 1 - 200 * 200 / (image.width * image.height)
    assert measure(image).border_share == pytest.approx(taken)


def test_bars_may_be_of_two_colours_and_on_one_side_only() -> None:
    image = Image.new("RGB", (200, 300), "black")
    image.paste((250, 250, 250), (0, 0, 200, 30))
    image.paste(noise(200), (0, 30))
    assert measure(image).border_share == pytest.approx(100 / 300)
    two = Image.new("L", (100, 100), 0)
    two.paste(255, (0, 0, 100, 50))
    assert measure(two).border_share == 1.0


def test_a_frame_survives_jpeg() -> None:
    file = io.BytesIO()
    framed(0.3).save(file, "JPEG", quality=85)
    with Image.open(file) as again:
        assert measure(again).border_share == pytest.approx(0.3, abs=0.05)


def test_a_colour_at_the_edge_of_two_ranges_is_not_cut_in_two() -> None:
    around = np.random.default_rng(0).integers(124, 132, (200, 200, 3), dtype=np.uint8)
    assert measure(Image.fromarray(around)).main_colour_share == 1.0


def test_the_main_colour_is_one_of_red_green_and_blue_together() -> None:
    halves = Image.new("RGB", (200, 200), (200, 0, 0))
    halves.paste((0, 102, 0), (0, 0, 200, 60))  # as bright as the red
    assert measure(halves).main_colour_share == pytest.approx(0.7, abs=0.01)


# -- how they move ----------------------------------------------------------------------------


@settings(max_examples=15)
@given(seed=st.integers(0, 1000), radius=st.floats(0.5, 3.0))
def test_blur_lowers_sharpness(seed: int, radius: float) -> None:
    sharp = Image.blend(waves(128, 96), noise(128, seed).crop((0, 0, 128, 96)), 0.3)
    less = sharp.filter(ImageFilter.GaussianBlur(radius))
    least = sharp.filter(ImageFilter.GaussianBlur(2 * radius))
    found = [measure(one).sharpness for one in (sharp, less, least)]
    assert found[0] > found[1] > found[2]


@settings(max_examples=15)
@given(width=st.integers(1, 150), height=st.integers(1, 150), seed=st.integers(0, 1000))
def test_any_size_gives_measures_within_their_ranges(width: int, height: int, seed: int) -> None:
    shape = (height, width, 3)
    found = measure(Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, np.uint8)))
    assert len(found.perceptual_hash) == 32
    assert 0 <= found.perceptual_hash_quality <= 100
    assert found.sharpness >= 0
    assert 0 <= found.brightness <= 1
    assert 0 <= found.contrast <= 0.5
    assert 0 <= found.entropy <= 8
    assert 0 < found.main_colour_share <= 1
    assert 0 <= found.border_share <= 1
    assert len(found.values()) == len(NAMES)


def test_sharpness_is_the_variance_of_the_laplacian() -> None:
    grey = np.asarray(waves(333, 217).convert("L"), np.int64)
    around = grey[:-2, 1:-1] + grey[2:, 1:-1] + grey[1:-1, :-2] + grey[1:-1, 2:]
    expected = np.var(around - 4 * grey[1:-1, 1:-1])
    assert measure(waves(333, 217)).sharpness == pytest.approx(expected, rel=1e-5)


def test_a_negative_keeps_contrast_and_sharpness() -> None:
    image = waves(200, 200).convert("L")
    found, negative = measure(image), measure(ImageOps.invert(image))
    assert negative.brightness == pytest.approx(1 - found.brightness)
    assert negative.contrast == pytest.approx(found.contrast)
    assert negative.sharpness == pytest.approx(found.sharpness)


# -- modes -----------------------------------------------------------------------------------


def test_transparency_is_laid_on_white() -> None:
    clear = Image.new("RGBA", (64, 64), (0, 0, 0, 0))
    assert measure(clear).brightness == 1.0
    clear.paste((0, 0, 0, 255), (0, 0, 64, 32))
    assert measure(clear).brightness == pytest.approx(0.5)


@pytest.mark.parametrize("mode", ["1", "P", "LA", "CMYK", "YCbCr", "RGBA", "RGB"])
def test_an_image_of_any_mode_has_about_the_measures_of_its_rgb(mode: str) -> None:
    image = checkerboard(16).convert("RGB")
    found = measure(image.convert(mode))
    assert found.brightness == pytest.approx(0.5, abs=0.01)
    assert bits(found.perceptual_hash, measure(image).perceptual_hash) <= NEAR_BITS


def test_grey_of_16_bits_counts_from_black_to_white() -> None:
    deep = Image.fromarray(np.asarray(gradient()).astype(np.uint16) * 257)
    assert deep.mode.startswith("I")
    assert measure(deep) == measure(gradient())


def test_an_rgb_image_is_not_copied() -> None:
    image = noise(16)
    assert to_grey_or_rgb(image) is image


# -- the perceptual hash ----------------------------------------------------------------------

#: Hash and quality of these images by pdqhash 0.2.8, which wraps the reference.
REFERENCE = {
    (1024, 1024, 0): (
        "aaa5fe985542569c55b0a9635ff6ad744001a9435577ad477ff685e079e08960",
        100,
    ),
    (1024, 1024, 1): (
        "5538a965ffe9ad720a8daf710006ff7c5548a951000faf575fae85f068a89d70",
        100,
    ),
    (1344, 768, 2): (
        "aaadad5aaaa5ad7a1556ab2d7ff201067ffca9010013a9477ffe81e43cf08920",
        100,
    ),
    (704, 1472, 3): (
        "bf15a92f5552aa2d5552a8253ff9a142555cff710003af577ffe85f028a88960",
        100,
    ),
    (2048, 2048, 0): (
        "aaa5fe985542569c55b0a9635ff6ad744001a9435577ad477ff685e07da08960",
        100,
    ),
    (300, 200, 1): (
        "55b8a965efa8ad720a8dbf710006fd7c5548a9510007ff770beed1f03ca8cd70",
        100,
    ),
}


@pytest.mark.parametrize(("width", "height", "kind"), REFERENCE)
def test_the_hash_is_the_one_of_the_reference_library(width: int, height: int, kind: int) -> None:
    expected, quality = REFERENCE[width, height, kind]
    found = measure(waves(width, height, kind))
    assert (found.perceptual_hash.hex(), found.perceptual_hash_quality) == (expected, quality)


def test_a_resized_or_recompressed_image_keeps_its_hash() -> None:
    image = waves(512, 512)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=30)
    own = measure(image).perceptual_hash
    with Image.open(file) as again:
        assert bits(own, measure(again).perceptual_hash) <= NEAR_BITS
    smaller = image.resize((300, 300), Image.Resampling.LANCZOS)
    assert bits(own, measure(smaller).perceptual_hash) <= NEAR_BITS


def test_other_images_have_other_hashes() -> None:
    own = measure(waves(256, 256)).perceptual_hash
    for other in (waves(256, 256, 1), noise(256), checkerboard(32)):
        assert bits(own, measure(other).perceptual_hash) > 2 * NEAR_BITS


def test_an_image_with_little_structure_has_a_low_quality() -> None:
    plain_ = np.full((256, 256), 200, np.uint8)
    plain_[100:120, 100:120] = 190
    assert perceptual_hash(plain_)[1] < LEAST_QUALITY
    assert perceptual_hash(np.zeros((4, 400), np.uint8)) == (bytes(32), 0)

"""A JPEG is decoded once, strictly, with the result of Pillow's decoder."""

from __future__ import annotations

import io
import random

import pytest
import simplejpeg
from PIL import Image

from krea_dagster.engine.storage.verify import DECODE_ERRORS, verify_image
from krea_dagster.engine.storage.verify_jpeg import decoded_jpeg, end_of_jpeg
from krea_dagster.errors import NoUsableBody
from tests.engine.storage.image_files import SMALL, detailed

FILES = {
    "baseline": detailed("JPEG", quality=90),
    "grey": detailed("JPEG", mode="L"),
    "all colours": detailed("JPEG", subsampling=0),
    "half the colours": detailed("JPEG", subsampling=1, quality=60),
    "progressive": detailed("JPEG", progressive=True),
    "restart marks": detailed("JPEG", restart_marker_rows=2),
    "inks": detailed("JPEG", mode="CMYK"),
    "with a comment": detailed("JPEG", comment="a lighthouse", dpi=(300, 300)),
}


def decoded_by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=["JPEG"])
    image.load()
    return image


@pytest.mark.parametrize("name", FILES)
def test_pixels_and_information_are_those_of_pillow(name: str) -> None:
    ours: list[Image.Image] = []
    verify_image(FILES[name], SMALL, on_decoded=ours.append)
    theirs = decoded_by_pillow(FILES[name])
    assert (ours[0].mode, ours[0].tobytes()) == (theirs.mode, theirs.tobytes())
    assert ours[0].info == theirs.info


@pytest.mark.parametrize("name", FILES)
def test_only_the_usual_modes_are_decoded_here(name: str) -> None:
    mode = decoded_by_pillow(FILES[name]).mode
    assert (decoded_jpeg(FILES[name], mode) is None) == (name == "inks")


def damaged(body: bytes, seed: int) -> bytes:
    """Bits that were flipped, bytes that were lost, and bytes that came twice."""
    source = random.Random(seed)
    place = source.randrange(2, len(body))
    length = source.randrange(1, 40)
    match source.randrange(4):
        case 0:
            return body[:place] + source.randbytes(1) + body[place + 1 :]
        case 1:
            return body[:place] + body[place + length :]
        case 2:
            return body[: place + length] + body[place:]
        case _:
            return body[:place] + b"\xff\xd9"


def verdict(body: bytes) -> str | bytes:
    found: list[Image.Image] = []
    try:
        verify_image(body, SMALL, on_decoded=found.append)
    except NoUsableBody:
        return "damaged"
    except Exception as error:  # noqa: BLE001 - any other verdict is compared too
        return type(error).__name__
    return found[0].tobytes()


def verdict_in_two_steps(body: bytes) -> str | bytes:
    """What a strict reading of the data, and then Pillow, say."""
    try:
        image = Image.open(io.BytesIO(body), formats=["JPEG"])
        if image.size != SMALL:
            return "ImageRejected"
        coded = memoryview(body)[: end_of_jpeg(body)]
        try:
            simplejpeg.decode_jpeg(coded, "GRAY", min_height=1, min_width=1, min_factor=8)
        except (KeyError, ValueError) as error:
            unknown = isinstance(error, KeyError) or "determine subsampling" in str(error)
            if not unknown:
                return "damaged"
        image.load()
    except (*DECODE_ERRORS, NoUsableBody, Image.DecompressionBombError):
        return "damaged"
    return image.tobytes()


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gets_the_verdict_of_a_strict_reading_and_of_pillow(name: str) -> None:
    verdicts = []
    for seed in range(60):
        body = damaged(FILES[name], seed)
        verdicts.append(verdict(body))
        assert verdicts[-1] == verdict_in_two_steps(body), f"seed {seed}"
    assert "damaged" in verdicts
    assert any(isinstance(one, bytes) for one in verdicts)

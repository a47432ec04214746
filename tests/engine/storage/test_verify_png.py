"""A PNG is decompressed once, by another library than Pillow's, with the same result."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from krea_dagster.engine.storage.verify import DECODE_ERRORS, verify_image
from krea_dagster.engine.storage.verify_png import check_png, whole_png
from krea_dagster.errors import NoUsableBody
from tests.engine.storage.image_files import SMALL, chunk, detailed, draw_image


def decoded_by_pillow(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=["PNG"])
    image.load()
    return image


def sixteen_bits() -> bytes:
    target = io.BytesIO()
    grey = np.asarray(draw_image(SMALL, "L"), np.uint16) * 257
    Image.fromarray(grey).save(target, "PNG")
    return target.getvalue()


def saved(mode: str, **options: object) -> bytes:
    target = io.BytesIO()
    draw_image(SMALL, mode).save(target, "PNG", **options)
    return target.getvalue()


def annotated() -> bytes:
    """A file with chunks before and after its pixels."""
    texts = PngImagePlugin.PngInfo()
    texts.add_text("prompt", "a lighthouse")
    texts.add_text("seed", "7", zip=True)
    body = saved("RGB", pnginfo=texts, dpi=(300, 300))
    end = body.rindex(b"\0\0\0\0IEND")
    return body[:end] + chunk(b"tEXt", b"after\0the pixels") + body[end:]


FILES = {
    **{mode: saved(mode) for mode in ("1", "L", "LA", "P", "RGB", "RGBA")},
    "16 bits": sixteen_bits(),
    "transparent colour": saved("RGB", transparency=(200, 180, 90)),
    "annotated": annotated(),
    "detailed": detailed("PNG"),
    "several chunks": detailed("PNG", compress_level=0),
}


@pytest.mark.parametrize("name", FILES)
def test_pixels_and_information_are_those_of_the_file(name: str) -> None:
    ours: list[Image.Image] = []
    verify_image(FILES[name], SMALL, on_decoded=ours.append)
    theirs = decoded_by_pillow(FILES[name])
    assert (ours[0].mode, ours[0].tobytes()) == (theirs.mode, theirs.tobytes())
    assert ours[0].getpalette() == theirs.getpalette()
    assert ours[0].info == theirs.info


@pytest.mark.parametrize("name", FILES)
def test_pillow_gets_a_valid_file_that_needs_no_decompression(name: str) -> None:
    whole = whole_png(FILES[name])
    check_png(whole)
    Image.open(io.BytesIO(whole)).verify()
    decoded_by_pillow(whole)
    pixels = b"".join(content for kind, content in chunks_of(whole) if kind == b"IDAT")
    assert len(pixels) > len(zlib.decompress(pixels))


def chunks_of(body: bytes) -> list[tuple[bytes, bytes]]:
    found, place = [], 8
    while place < len(body):
        (length,) = struct.unpack_from(">I", body, place)
        found.append((body[place + 4 : place + 8], body[place + 8 : place + 8 + length]))
        place += 12 + length
    return found


def damaged(body: bytes, seed: int) -> bytes:
    """Damage that a copy, a proxy or a bad encoder could do, with right checksums half the time."""
    source = random.Random(seed)
    chunks = chunks_of(body)
    at = source.randrange(len(chunks))
    kind, content = chunks[at]
    match source.randrange(5):
        case 0 if content:
            place = source.randrange(len(content))
            chunks[at] = kind, content[:place] + source.randbytes(1) + content[place + 1 :]
        case 1:
            chunks[at] = kind, content[: source.randrange(len(content) + 1)]
        case 2:
            chunks[at] = kind, content + source.randbytes(source.randrange(1, 9))
        case 3:
            other = source.randrange(len(chunks))
            chunks[at], chunks[other] = chunks[other], chunks[at]
        case _:
            half = len(content) // 2
            chunks[at : at + 1] = [
                (kind, content[:half]),
                (b"tEXt", b"a\0b"),
                (kind, content[half:]),
            ]
    whole = body[:8] + b"".join(chunk(kind, content) for kind, content in chunks)
    if source.random() < 0.5:
        return whole
    place = source.randrange(8, len(whole))
    return whole[:place] + source.randbytes(1) + whole[place + 1 :]


def verdict(body: bytes, checked: Callable[[bytes], bytes]) -> str | bytes:
    """The pixels of an accepted file."""
    try:
        if Image.open(io.BytesIO(body), formats=["PNG"]).size != SMALL:
            return "another size"
        return decoded_by_pillow(checked(body)).tobytes()
    except (*DECODE_ERRORS, NoUsableBody, Image.DecompressionBombError):
        return "damaged"


def as_it_is(body: bytes) -> bytes:
    check_png(body)
    return body


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_gets_the_verdict_of_pillow_and_the_checks(name: str) -> None:
    verdicts = []
    for seed in range(60):
        body = damaged(FILES[name], seed)
        verdicts.append(verdict(body, whole_png))
        assert verdicts[-1] == verdict(body, as_it_is), f"seed {seed}"
    assert "damaged" in verdicts
    assert any(isinstance(one, bytes) for one in verdicts)


def test_a_file_of_very_many_chunks_is_decoded_as_it_is() -> None:
    packed = zlib.compress(bytes(SMALL[1] * (1 + 3 * SMALL[0])))
    header = struct.pack(">IIBBBBB", *SMALL, 8, 2, 0, 0, 0)
    parts = [chunk(b"IHDR", header), chunk(b"IDAT", packed), chunk(b"IDAT", b"") * 300_000]
    body = b"".join([b"\x89PNG\r\n\x1a\n", *parts, chunk(b"IEND", b"")])
    assert whole_png(body) is body

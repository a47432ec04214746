"""Image files for tests."""

from __future__ import annotations

import io
import struct
import zlib
from functools import cache

from PIL import Image, ImageDraw, ImageFilter

from tests.engine.harness import make_request

#: Width and height of the requested image.
PIXELS = make_request().pixels

#: The size of an image that is quick to make and to decode.
SMALL = (200, 168)


def draw_image(pixels: tuple[int, int] = PIXELS, mode: str = "RGB") -> Image.Image:
    """Draw an image that is not flat."""
    image = Image.new("RGB", pixels, (200, 180, 90))
    draw = ImageDraw.Draw(image)
    draw.ellipse((10, 10, pixels[0] - 50, pixels[1] - 90), fill=(20, 90, 160))
    return image.convert(mode)


@cache
def encoded(file_format: str, pixels: tuple[int, int] = PIXELS, mode: str = "RGB") -> bytes:
    target = io.BytesIO()
    options = {"compress_level": 1} if file_format == "PNG" else {}
    draw_image(pixels, mode).save(target, file_format, **options)
    return target.getvalue()


@cache
def detailed(file_format: str, mode: str = "RGB", **options: object) -> bytes:
    """A small image with detail everywhere: each part of its file holds a part of it."""
    image = Image.merge("RGB", [Image.effect_noise(SMALL, 60) for _ in range(3)])
    target = io.BytesIO()
    image.filter(ImageFilter.GaussianBlur(1)).convert(mode).save(target, file_format, **options)
    return target.getvalue()


def chunk(kind: bytes, data: bytes) -> bytes:
    body = kind + data
    return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))


def png(header: bytes, rows: bytes, *, between: bytes = b"") -> bytes:
    """A PNG of these parts, with all its checksums right."""
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + between
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )

"""Draws image files of a given size in bytes, and marks each task's file."""

from __future__ import annotations

import io
import zlib
from typing import Final

from PIL import Image, ImageChops

#: Width and height by size, for 1K and 2K: the table of EvoLink's documentation.
PIXELS: Final[dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "1:1": ((1024, 1024), (2048, 2048)),
    "4:3": ((1152, 896), (2304, 1728)),
    "3:4": ((896, 1152), (1728, 2304)),
    "5:4": ((1152, 896), (2240, 1792)),
    "4:5": ((896, 1152), (1792, 2240)),
    "2:3": ((832, 1280), (1664, 2496)),
    "3:2": ((1280, 832), (2496, 1664)),
    "9:16": ((768, 1344), (1472, 2688)),
    "16:9": ((1344, 768), (2688, 1472)),
    "1:2": ((704, 1472), (1408, 2816)),
    "2:1": ((1472, 704), (2816, 1408)),
}
QUALITIES: Final = ("1K", "2K")
FORMATS: Final = ("jpeg", "png")

#: Bytes of the mark that names a file's task.
MARK_BYTES: Final = {"jpeg": 20, "png": 28}

_JPEG_COMMENT_MOST: Final = 65_533
_STEPS: Final = 7
_LEAST_NOISE: Final = 0.7


def pixels_of(size: str, quality: str) -> tuple[int, int]:
    """Return the width and height of an image."""
    return PIXELS[size][QUALITIES.index(quality)]


def draw(pixels: tuple[int, int], file_bytes: int, kind: str) -> bytes:
    """Return an image file: a gradient with as much noise as the size allows.

    With its mark it has exactly ``file_bytes``; a comment fills the rest. If even the gradient is
    too large, the image is a grey gradient of the least size: 13 KB for a JPEG of 1K.
    """
    room = file_bytes - MARK_BYTES[kind]
    file = _encode(pixels, 0.0, kind)
    if len(file) > room:
        return _padded(_grey(pixels, kind), room, kind)
    # The noise is searched on a sixteenth of the image, because encoding is slow.
    small = (pixels[0] // 4, pixels[1] // 4)
    low, high = 0.0, 80.0
    for _ in range(_STEPS):
        noise = (low + high) / 2
        if 16 * len(_encode(small, noise, kind)) <= room:
            low = noise
        else:
            high = noise
    while low > _LEAST_NOISE:
        noisy = _encode(pixels, low, kind)
        if len(noisy) <= room:
            return _padded(noisy, room, kind)
        low *= 0.95
    return _padded(file, room, kind)


def marked(file: bytes, kind: str, number: int) -> tuple[bytes, bytes]:
    """Return a file in two pieces. The first names a task, so that no two files are equal."""
    text = b"task %011d" % number
    if kind == "jpeg":
        return b"\xff\xd8" + _jpeg_comment(text), file[2:]
    # After the signature of 8 bytes and IHDR of 25.
    return file[:33] + _png_chunk(b"tEXt", text), file[33:]


def _encode(pixels: tuple[int, int], noise: float, kind: str) -> bytes:
    bands = [
        Image.linear_gradient("L").rotate(turn).resize(pixels).point(lambda value: 32 + value // 2)
        for turn in (0, 90, 180)
    ]
    if noise:
        grain = Image.effect_noise(pixels, noise)
        bands = [ImageChops.add(band, grain, offset=-128) for band in bands]
    file = io.BytesIO()
    if kind == "jpeg":
        Image.merge("RGB", bands).save(file, "JPEG", quality=80)
    else:
        Image.merge("RGB", bands).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _grey(pixels: tuple[int, int], kind: str) -> bytes:
    file = io.BytesIO()
    image = Image.linear_gradient("L").resize(pixels)
    image.save(file, kind.upper(), **({"quality": 20} if kind == "jpeg" else {}))
    return file.getvalue()


def _padded(file: bytes, size: int, kind: str) -> bytes:
    missing = size - len(file)
    if kind == "png":
        return (
            file
            if missing < 12
            else file[:33] + _png_chunk(b"tEXt", b" " * (missing - 12)) + (file[33:])
        )
    pieces = []
    while missing >= 4:
        text = b" " * min(missing - 4, _JPEG_COMMENT_MOST)
        if 0 < missing - 4 - len(text) < 4:
            text = text[:-4]  # leave room for another comment
        pieces.append(_jpeg_comment(text))
        missing -= len(pieces[-1])
    return file[:2] + b"".join(pieces) + file[2:]


def _jpeg_comment(text: bytes) -> bytes:
    return b"\xff\xfe" + (len(text) + 2).to_bytes(2, "big") + text


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    checksum = zlib.crc32(kind + data)
    return len(data).to_bytes(4, "big") + kind + data + checksum.to_bytes(4, "big")

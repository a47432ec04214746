"""Knows pictures of other formats than those that are taken: a whole one was paid for."""

from __future__ import annotations

import io
import struct
from typing import Final

from PIL import Image, UnidentifiedImageError

from krea_dagster.errors import NoUsableBody

#: What Pillow decodes by itself, and with bounded memory once the dimensions are known. Not among
#: them: ICO, which is decoded as it is opened, and what has no signature.
OTHERS: Final = ("GIF", "BMP", "TIFF", "JPEG2000", "PPM")

#: What else begins in a way of its own, and cannot be decoded here.
_BEGINNINGS: Final = (
    (b"\xff\x0a", "JPEG XL"),
    (b"\x00\x00\x00\x0cJXL \r\n\x87\n", "JPEG XL"),
    (b"8BPS\x00\x01", "PSD"),
    (b"qoif", "QOI"),
    (b"icns", "ICNS"),
    (b"DDS \x7c\x00\x00\x00", "DDS"),
)
_HEIC: Final = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx")

_TILE_WIDTH, _TILE_LENGTH = 322, 323


def open_other_format(data: bytes) -> Image.Image | None:
    """The picture, its pixels not yet decoded; None where it is of none of these formats."""
    try:
        return Image.open(io.BytesIO(data), formats=OTHERS)
    except UnidentifiedImageError:
        return None


def decode_other_format(image: Image.Image) -> None:
    """Decode a picture of another format, and raise what Pillow raises where it is damaged."""
    if image.format == "TIFF":
        # A tile may be declared larger than the picture, and is unpacked as a whole.
        tags = getattr(image, "tag_v2", {})
        width, length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
        if width * length > 4 * image.width * image.height:
            raise NoUsableBody("the image is damaged: a tile is larger than the TIFF picture")
    image.load()


def undecodable_format(data: bytes) -> str | None:
    """The format of a file that Pillow cannot decode, by its beginning; None for no picture."""
    for beginning, name in _BEGINNINGS:
        if data.startswith(beginning):
            return name
    if data[4:8] == b"ftyp":
        brands = data[8 : min(64, int.from_bytes(data[:4], "big"))]
        if any(brand in brands for brand in _HEIC):
            return "HEIC"
    if data.startswith(b"\x00\x00\x01\x00") and _holds_icons(data):
        return "ICO"
    return None


def _holds_icons(data: bytes) -> bool:
    """Whether each entry of an ICO's directory lies within the file: four bytes tell little."""
    count = int.from_bytes(data[4:6], "little")
    if not count or len(data) < 6 + 16 * count:
        return False
    for place in range(6, 6 + 16 * count, 16):
        length, start = struct.unpack_from("<II", data, place + 8)
        if not length or start < 6 + 16 * count or start + length > len(data):
            return False
    return True

"""Recognition of formats that are not accepted: a complete image in one of them was paid for."""

from __future__ import annotations

import io
import struct
from typing import Final

from PIL import Image, UnidentifiedImageError

from krea_dagster.errors import NoUsableBody

#: What Pillow decodes without plugins, with bounded memory once the dimensions are known. Excluded:
#: ICO, which is decoded when it is opened, and formats without a signature.
OTHERS: Final = ("GIF", "BMP", "TIFF", "JPEG2000", "PPM")

#: Signatures of formats that cannot be decoded here.
_SIGNATURES: Final = (
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
    """Return the image, not yet decoded; None if it has none of these formats."""
    try:
        return Image.open(io.BytesIO(data), formats=OTHERS)
    except UnidentifiedImageError:
        return None


def decode_other_format(image: Image.Image) -> None:
    """Decode an image in another format. Raises what Pillow raises for a damaged one."""
    if image.format == "TIFF":
        # A tile may claim to be larger than the image, and is decompressed as a whole.
        tags = getattr(image, "tag_v2", {})
        width, length = tags.get(_TILE_WIDTH, 0), tags.get(_TILE_LENGTH, 0)
        if width * length > 4 * image.width * image.height:
            raise NoUsableBody("the image is damaged: a tile is larger than the TIFF image")
    image.load()


def undecodable_format(data: bytes) -> str | None:
    """Return the format of a file by its signature; None if it is not an image."""
    for signature, name in _SIGNATURES:
        if data.startswith(signature):
            return name
    if data[4:8] == b"ftyp":
        brands = data[8 : min(64, int.from_bytes(data[:4], "big"))]
        if any(brand in brands for brand in _HEIC):
            return "HEIC"
    if data.startswith(b"\x00\x00\x01\x00") and _holds_icons(data):
        return "ICO"
    return None


def _holds_icons(data: bytes) -> bool:
    """Return whether all entries of an ICO directory are inside the file."""
    count = int.from_bytes(data[4:6], "little")
    if not count or len(data) < 6 + 16 * count:
        return False
    for place in range(6, 6 + 16 * count, 16):
        length, start = struct.unpack_from("<II", data, place + 8)
        if not length or start < 6 + 16 * count or start + length > len(data):
            return False
    return True

"""Detection of truncated WebP files."""

from __future__ import annotations

from typing import Final

from krea_dagster.errors import NoUsableBody

#: Chunks that contain pixels.
_PIXEL_CHUNKS: Final = frozenset({b"VP8 ", b"VP8L"})


def check_webp(data: bytes) -> None:
    """Raise NoUsableBody if a chunk, or the whole, is longer than its container.

    Data after the end is ignored. Chunks have no checksum, so only decoding can find more damage.
    """
    end = 8 + _number(data, 4)
    if end > len(data):
        raise NoUsableBody("the WEBP file is cut short")
    place, kinds = 12, set[bytes]()
    while place + 8 <= end:
        kinds.add(data[place : place + 4])
        length = _number(data, place + 4)
        if place + 8 + length > end:
            raise NoUsableBody("the image is damaged: a part of the WEBP file is cut short")
        place += 8 + length + length % 2
    if not kinds & _PIXEL_CHUNKS:
        raise NoUsableBody("the image is damaged: the WEBP file does not contain an image")


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "little")

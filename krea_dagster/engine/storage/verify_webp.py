"""Finds a WebP whose parts do not fit into it."""

from __future__ import annotations

from typing import Final

from krea_dagster.errors import NoUsableBody

#: Chunks that hold the pixels.
_PICTURES: Final = frozenset({b"VP8 ", b"VP8L"})


def check_webp(data: bytes) -> None:
    """Raise NoUsableBody where a chunk, or the whole, is longer than what holds it.

    What follows the whole is not looked at. The data in a chunk hold no checksum: what does not
    decode is all that can be told of them.
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
    if not kinds & _PICTURES:
        raise NoUsableBody("the image is damaged: the WEBP file holds no picture")


def _number(data: bytes, place: int) -> int:
    return int.from_bytes(data[place : place + 4], "little")

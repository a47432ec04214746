"""Make the bodies that the file host sends: the images, and damaged ones.

CPU-bound and without HTTP, so it is called in a thread.
"""

from __future__ import annotations

import struct
import threading
import zlib
from collections import OrderedDict
from typing import Final

from PIL import Image

from krea_dagster.emulator import render

ImageKey = tuple[str, int, int, int]  # prompt, seed, width, height

#: Effects of file faults that replace the image by another body.
BODY_EFFECTS: Final = frozenset(
    {"jpeg", "black", "half", "bomb", "noise", "nothing", "cut", "same"}
)

_BOMB_SIDE: Final = 60_000


class ImageFiles:
    """Draws images and caches the last ones, up to ``keep_bytes`` in total. Thread-safe."""

    def __init__(self, keep_bytes: int = 32 << 20) -> None:
        self._keep_bytes = keep_bytes
        self._kept: OrderedDict[ImageKey, bytes] = OrderedDict()
        self._size = 0
        self._lock = threading.Lock()

    def png(self, key: ImageKey) -> bytes:
        """Return the image of (prompt, seed, width, height) as PNG."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        body = render.render_png(*key)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = body
                self._size += len(body)
            while self._size > self._keep_bytes:
                _, dropped = self._kept.popitem(last=False)
                self._size -= len(dropped)
        return body

    def damaged(self, key: ImageKey, effect: str, noise: bytes) -> bytes:
        """Return what is sent instead of the image. ``effect`` is one of BODY_EFFECTS."""
        prompt, seed, width, height = key
        if effect == "jpeg":
            return render.encode(render.render(prompt, seed, width, height), "JPEG")
        if effect == "black":
            return render.encode(Image.new("RGB", (width, height)), "PNG")
        if effect == "half":
            return render.render_png(prompt, seed, width // 2, height // 2)
        if effect == "bomb":
            return bomb()
        if effect == "same":
            return self.png(("the same for all", 1, width, height))
        if effect == "noise":
            return noise
        if effect == "cut":
            body = self.png(key)
            return body[: len(body) * 2 // 3]
        return b""


#: What an emulator of this process has drawn, no other draws again: the same key is the same image.
DRAWN: Final = ImageFiles()


def bomb() -> bytes:
    """Return a small PNG that declares 60,000 × 60,000 RGB pixels, with valid checksums.

    It contains the first rows only. A reader that trusts the header reserves 10 GB.
    """
    header = struct.pack(">IIBBBBB", _BOMB_SIDE, _BOMB_SIDE, 8, 2, 0, 0, 0)
    rows = zlib.compress(bytes(3 * _BOMB_SIDE + 1) * 4, 9)
    return (
        b"\x89PNG\r\n\x1a\n"
        + render.png_chunk(b"IHDR", header)
        + render.png_chunk(b"IDAT", rows)
        + render.png_chunk(b"IEND", b"")
    )

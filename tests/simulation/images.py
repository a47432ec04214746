"""Images that cost almost nothing: of the right size, each different, damaged on demand."""

from __future__ import annotations

import concurrent.futures
import functools
import io
from collections.abc import Callable
from typing import Any

from PIL import Image

from krea_dagster.emulator.images import ImageFiles, ImageKey, bomb
from krea_dagster.emulator.render import png_chunk

#: Where a PNG's header chunk ends: 8 bytes of signature, and 25 of the chunk.
_AFTER_HEADER = 33


class CheapPictures(ImageFiles):
    """Stripes in black and white, and the prompt in a chunk of text."""

    def png(self, key: ImageKey) -> bytes:
        """Return the image of (prompt, seed, width, height) as PNG."""
        prompt, seed, width, height = key
        plain = _stripes(width, height, "PNG")
        text = png_chunk(b"tEXt", f"Title\0{seed} {prompt}".encode("latin-1", "replace"))
        return plain[:_AFTER_HEADER] + text + plain[_AFTER_HEADER:]

    def damaged(self, key: ImageKey, effect: str, noise: bytes) -> bytes:
        """Return the bytes that are sent instead of the image."""
        _, _, width, height = key
        body = self.png(key)
        match effect:
            case "jpeg":
                return _stripes(width, height, "JPEG") + b""
            case "black":
                return _black(width, height)
            case "half":
                return _stripes(width // 2, height // 2, "PNG")
            case "bomb":
                return bomb()
            case "same":
                return self.png(("the same for all", 1, width, height))
            case "noise":
                return noise
            case "cut":
                return body[: len(body) * 2 // 3]
        return b""


@functools.lru_cache(maxsize=16)
def _stripes(width: int, height: int, kind: str) -> bytes:
    stripe = Image.new("1", (16, 1))
    stripe.putdata([0] * 8 + [1] * 8)
    row = Image.new("1", (width, 1))
    for left in range(0, width, 16):
        row.paste(stripe, (left, 0))
    return _encoded(row.resize((width, height)), kind)


@functools.lru_cache(maxsize=16)
def _black(width: int, height: int) -> bytes:
    return _encoded(Image.new("1", (width, height)), "PNG")


def _encoded(image: Image.Image, kind: str) -> bytes:
    buffer = io.BytesIO()
    (image if kind == "PNG" else image.convert("L")).save(buffer, kind)
    return buffer.getvalue()


class AtOnce(concurrent.futures.Executor):
    """Makes each call at once, in the caller's thread."""

    def submit(self, call: Callable[..., Any], /, *args: Any, **named: Any) -> Any:
        """Make the call."""
        future: concurrent.futures.Future[Any] = concurrent.futures.Future()
        try:
            future.set_result(call(*args, **named))
        except Exception as error:  # noqa: BLE001 - the caller gets it
            future.set_exception(error)
        return future

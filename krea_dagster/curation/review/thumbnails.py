"""Thumbnails for the grid, created on demand and cached on disk.

They are named by the SHA-256 of the image, so they never become stale, and the folder can be
deleted at any time.
"""

from __future__ import annotations

import io
import os
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import BinaryIO, Final
from uuid import uuid4

import anyio
import anyio.to_thread
from PIL import Image, ImageOps

from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import DECODE_ERRORS, FORMATS

#: The longer side of a thumbnail, pixels: a cell of the grid on a high-density screen.
SIDE: Final = 384
#: Larger images are not decoded: this package does not buy such.
MOST_PIXELS: Final = 64_000_000
#: Concurrent decoders. Each may take about 10 bytes per pixel.
DECODERS: Final = max(2, min(8, os.cpu_count() or 2))
_QUALITY: Final = 80
#: The background of transparent images, RGBA.
_BACKGROUND: Final = (128, 128, 128, 255)


class NoThumbnail(Exception):
    """No thumbnail can be made of a file; the text is the reason."""


def thumbnail_folder(storage: Storage) -> Path:
    """Return the thumbnail folder: under the storage root, or for a URL the user's cache folder."""
    if storage.folder is not None:
        return storage.folder / "review" / "thumbnails"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "krea-dagster" / "thumbnails"


class Thumbnails:
    """The thumbnails of a storage root."""

    def __init__(self, storage: Storage, folder: Path | None = None) -> None:
        self._storage = storage
        self._folder = thumbnail_folder(storage) if folder is None else folder
        self._limiter = anyio.CapacityLimiter(DECODERS)
        self._under_way: dict[str, anyio.Event] = {}

    async def get(self, sha256: str, name: str) -> bytes:
        """Return the thumbnail (JPEG) of the file ``name`` with this hash. Raises NoThumbnail."""
        path = self._folder / sha256[:2] / f"{sha256}-{SIDE}.jpg"
        while True:
            with suppress(OSError):
                if data := path.read_bytes():  # a power failure may leave an empty file
                    return data
            other = self._under_way.get(sha256)
            if other is None:
                break
            await other.wait()
        done = self._under_way[sha256] = anyio.Event()
        try:
            made = partial(self._make, name, path)
            return await anyio.to_thread.run_sync(made, limiter=self._limiter)
        finally:
            del self._under_way[sha256]
            done.set()

    def _make(self, name: str, path: Path) -> bytes:
        try:
            with self._storage.open(name) as file:
                data = make_thumbnail(file)
        except FileNotFoundError:
            raise NoThumbnail("the file no longer exists") from None
        except OSError as error:
            raise NoThumbnail(f"the file cannot be read: {error}") from None
        # On a full disk or a read-only root, the thumbnail is only made again next time.
        with suppress(OSError):
            _cache(path, data)
        return data


def make_thumbnail(file: BinaryIO) -> bytes:
    """Return the thumbnail of an image as JPEG. Raises NoThumbnail for a bad or too large one."""
    out = io.BytesIO()
    try:
        with Image.open(file, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise NoThumbnail(f"the image has {image.width}×{image.height} pixels")
            # A JPEG is decoded at a half, a quarter or an eighth of its size, which is faster.
            image.draft("RGB", (SIDE * 2, SIDE * 2))
            image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
            turned = ImageOps.exif_transpose(image)
            _on_background(turned).save(out, "JPEG", quality=_QUALITY)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise NoThumbnail("the image declares too many pixels") from None
    except DECODE_ERRORS as error:
        raise NoThumbnail(f"the image is damaged: {error}") from None
    return out.getvalue()


def _on_background(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    background = Image.new("RGBA", image.size, _BACKGROUND)
    background.alpha_composite(image.convert("RGBA"))
    return background.convert("RGB")


def _cache(path: Path, data: bytes) -> None:
    """Write a file atomically, but not durably: it can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{uuid4().hex}.part")
    try:
        new.write_bytes(data)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

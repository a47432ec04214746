"""Small pictures for the grid, made when they are first looked at and then kept on disk.

They are known by the SHA-256 of the picture they were made of, so one never gets old, and the
folder may be emptied at any time.
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
from krea_dagster.engine.storage.verify import DAMAGED, FORMATS

#: The longer side of a small picture, pixels: a cell of the grid on a screen of double density.
SIDE: Final = 384
#: Pictures beyond this are not decoded: they are not what this package buys.
MOST_PIXELS: Final = 64_000_000
#: Decodings at a time. Each may take some 10 bytes a pixel.
DECODERS: Final = max(2, min(8, os.cpu_count() or 2))
_QUALITY: Final = 80
#: Behind a small picture that has transparent parts.
_BEHIND: Final = (128, 128, 128, 255)


class NoThumbnail(Exception):
    """A file cannot be shown small; the text says why."""


def thumbnail_folder(storage: Storage) -> Path:
    """The folder for small pictures: under the storage root, or where that is no folder, a cache.

    The cache is this user's, and apart for each root.
    """
    if storage.folder is not None:
        return storage.folder / "review" / "thumbnails"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "krea-dagster" / "thumbnails"


class Thumbnails:
    """The small pictures of a storage root."""

    def __init__(self, storage: Storage, folder: Path | None = None) -> None:
        self._storage = storage
        self._folder = thumbnail_folder(storage) if folder is None else folder
        self._limiter = anyio.CapacityLimiter(DECODERS)
        self._under_way: dict[str, anyio.Event] = {}

    async def get(self, sha256: str, name: str) -> bytes:
        """The small picture (JPEG) of the file ``name``, whose hash is ``sha256``.

        Raises NoThumbnail.
        """
        path = self._folder / sha256[:2] / f"{sha256}-{SIDE}.jpg"
        while True:
            with suppress(OSError):
                if data := path.read_bytes():  # a power cut may leave a name without content
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
                data = small(file)
        except FileNotFoundError:
            raise NoThumbnail("the file is not there any more") from None
        except OSError as error:
            raise NoThumbnail(f"the file cannot be read: {error}") from None
        # A disk that is full, or a root that is read only, costs time and not the picture.
        with suppress(OSError):
            _keep(path, data)
        return data


def small(file: BinaryIO) -> bytes:
    """A picture, small, as JPEG. Raises NoThumbnail where it is none, or far too large."""
    out = io.BytesIO()
    try:
        with Image.open(file, formats=tuple(FORMATS)) as image:
            if image.width * image.height > MOST_PIXELS:
                raise NoThumbnail(f"the picture has {image.width}×{image.height} pixels")
            # A JPEG is decoded at a half, a quarter, an eighth: a fraction of the time.
            image.draft("RGB", (SIDE * 2, SIDE * 2))
            image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=2.0)
            turned = ImageOps.exif_transpose(image)
            _on_grey(turned).save(out, "JPEG", quality=_QUALITY)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise NoThumbnail("the picture declares far too many pixels") from None
    except DAMAGED as error:
        raise NoThumbnail(f"the picture is damaged: {error}") from None
    return out.getvalue()


def _on_grey(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if "A" not in image.getbands() and "transparency" not in image.info:
        return image.convert("RGB")
    behind = Image.new("RGBA", image.size, _BEHIND)
    behind.alpha_composite(image.convert("RGBA"))
    return behind.convert("RGB")


def _keep(path: Path, data: bytes) -> None:
    """Write a file whole or not at all. It need not survive a crash: it can be made again."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{uuid4().hex}.part")
    try:
        new.write_bytes(data)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)

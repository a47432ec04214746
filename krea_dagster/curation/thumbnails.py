"""Thumbnails of images: made while a run verifies them, kept on disk, and used everywhere.

They are named by the SHA-256 of the image, so they never become stale. Those that are missing or
damaged are made again from the image, and the folder can be deleted at any time.
"""

from __future__ import annotations

import io
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Final

from PIL import Image, ImageOps

from krea_dagster.curation.measures.builtin import to_grey_or_rgb
from krea_dagster.engine.record import FORMATS
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import DECODE_ERRORS
from krea_dagster.engine.storage.verify_png import whole_png
from krea_dagster.errors import ConfigError, NoUsableBody, StorageUnavailable

#: The longest side of a thumbnail, pixels: at most, and at least where the image is larger.
SIDE: Final = 384
LEAST_SIDE: Final = 320
#: Larger images are not decoded: this package does not buy such.
MOST_PIXELS: Final = 64_000_000

_FOLDER: Final = "thumbnails"
#: A JPEG takes 0.3 ms of CPU and 20 KB, a WebP 3 ms and 12 KB.
_QUALITY: Final = 85
_JPEG_START: Final = b"\xff\xd8"
_JPEG_END: Final = b"\xff\xd9"
_SHA256: Final = re.compile("[0-9a-f]{64}")


class NoThumbnail(Exception):
    """No thumbnail can be made of a file; the text is the reason."""


class Thumbnails:
    """The thumbnails of a storage root, as JPEG. For any number of threads.

    They are in its folder ``thumbnails``. Those of a root behind a URL are in the user's cache
    folder: there, each would cost a request when it is written, and one when it is shown.
    """

    def __init__(self, storage: Storage) -> None:
        self._images = storage
        self._files = storage if storage.folder is not None else _user_cache()

    def add(self, sha256: str, image: Image.Image) -> bytes:
        """Make the thumbnail of a decoded image, keep it if possible, and return it."""
        data = thumbnail_of(image)
        # On a full disk or a read-only root, it is only made again next time.
        with suppress(OSError, StorageUnavailable):
            if self._files is not None and _SHA256.fullmatch(sha256):
                self._files.cache(_name(sha256), data)
        return data

    def find(self, sha256: str) -> bytes | None:
        """Return the kept thumbnail of an image; None if there is none, or a damaged one."""
        if self._files is None or not _SHA256.fullmatch(sha256):
            return None
        try:
            with self._files.open(_name(sha256)) as file:
                data = file.read()
        except (OSError, StorageUnavailable):
            return None
        # Another process may be writing the file, or a power failure has left it incomplete.
        return data if data.startswith(_JPEG_START) and data.endswith(_JPEG_END) else None

    def get(self, sha256: str, name: str) -> bytes:
        """Return the thumbnail of the file ``name`` with this hash. Raises NoThumbnail."""
        return self.find(sha256) or self.make(sha256, name)

    def make(self, sha256: str, name: str) -> bytes:
        """Make the thumbnail of the file ``name`` with this hash. Raises NoThumbnail."""
        try:
            with self._images.open(name) as file:
                data = file.read()
        except FileNotFoundError:
            raise NoThumbnail("the file no longer exists") from None
        except (OSError, StorageUnavailable) as error:
            raise NoThumbnail(f"the file cannot be read: {error}") from None
        return self.add(sha256, decoded(data, SIDE))


def _user_cache() -> Storage | None:
    """Return the folder of this package in the user's cache; None where there is none."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return Storage(str(home / "krea-dagster"))
    except (ConfigError, OSError, RuntimeError):  # such as a container's user without a home
        return None


def decoded(data: bytes, side: int) -> Image.Image:
    """Decode a file for a thumbnail of this side. Raises NoThumbnail for a bad or too large one."""
    try:
        image: Image.Image = Image.open(io.BytesIO(data), formats=tuple(FORMATS))
        if image.width * image.height > MOST_PIXELS:
            raise NoThumbnail(f"the image has {image.width}×{image.height} pixels")
        if image.format == "PNG":
            image = Image.open(io.BytesIO(whole_png(data)), formats=("PNG",))
        # A JPEG is decoded at a half, a quarter or an eighth of its size, which is faster.
        image.draft("RGB", (side, side))
        image.load()
        ImageOps.exif_transpose(image, in_place=True)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise NoThumbnail("the image declares too many pixels") from None
    except (*DECODE_ERRORS, NoUsableBody) as error:
        raise NoThumbnail(f"the file is damaged: {error}") from None
    return image


def thumbnail_of(image: Image.Image) -> bytes:
    """Return the thumbnail of a decoded image as JPEG, with transparency laid on white."""
    small = _reduced(image)
    ImageOps.exif_transpose(small, in_place=True)
    buffer = io.BytesIO()
    to_grey_or_rgb(small).convert("RGB").save(buffer, "JPEG", quality=_QUALITY)
    return buffer.getvalue()


def _reduced(image: Image.Image) -> Image.Image:
    """Return a copy with at most ``SIDE`` pixels, and ``LEAST_SIDE`` of an image that has more."""
    longest = max(image.size)
    factor = -(-longest // SIDE)
    if image.mode in {"RGB", "L"} and longest >= factor * LEAST_SIDE:
        # The mean of a whole number of pixels takes a quarter of the time of a filter.
        return image.reduce(factor)
    small = to_grey_or_rgb(image).copy()
    small.info = image.info  # the orientation
    small.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC, reducing_gap=1.5)
    return small


def _name(sha256: str) -> str:
    return f"{_FOLDER}/{sha256[:2]}/{sha256}-{SIDE}.jpg"

"""A paid image: fetch it to a temporary file, look at it, and publish it under its own name.

The name comes from the request's key, so no prompt_id can name a file. What the file is, is
read from its bytes; neither the link's ending nor the answer's header is believed.
"""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, Protocol, cast

import anyio
import anyio.to_thread
from PIL import Image, UnidentifiedImageError

from krea_dagster.engine.record import StoredImage
from krea_dagster.engine.storage import Storage
from krea_dagster.errors import DownloadError, ImageRejected, NoUsableBody
from krea_dagster.models import ImageRequest

#: Formats that are looked at, and the ending of their files.
FORMATS: Final = {"PNG": "png", "JPEG": "jpg", "WEBP": "webp", "AVIF": "avif"}

#: Bytes of the largest file that is taken: four times an uncompressed 2K picture would be more
#: than any of the formats needs.
MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024

#: A picture whose every channel stays within this range is one flat colour: hosts were seen to
#: answer an overlong prompt with a black one.
_FLAT_RANGE: Final = 2

#: What Pillow's decoders raise for damaged files, found by its own fuzzing corpus.
DAMAGED: Final = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    OverflowError,
    struct.error,
    zlib.error,
)


class Fetched(Protocol):
    """What a download tells of the bytes that went through it."""

    @property
    def size_bytes(self) -> int:
        """How many."""

    @property
    def sha256(self) -> str:
        """Their hash, in hex."""


class Downloader(Protocol):
    """The part of KreaClient that is needed here."""

    async def download(
        self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
    ) -> Fetched:
        """Stream a file into ``sink``."""


class ImageStore:
    """The verified images under the storage root.

    ``decoders`` bounds how many pictures are decoded at once: a decoded 2K picture takes some
    20 MB, and Pillow releases the interpreter, so one per core is enough.
    """

    def __init__(self, storage: Storage, *, decoders: int | None = None) -> None:
        self.storage = storage
        self._decoders = anyio.CapacityLimiter(decoders or os.cpu_count() or 1)

    def holds(self, image: StoredImage) -> bool:
        """Whether a stored image's file is still there with its size."""
        return self.storage.size_bytes(image.path) == image.bytes

    async def fetch(self, client: Downloader, url: str, request: ImageRequest) -> StoredImage:
        """Download, verify and publish the image of a request.

        Raises DownloadError: ImageRejected where the file is whole but wrong (it is kept
        under ``images/rejected``, for it was paid for), others where it could not be had.
        """
        with self.storage.scratch() as temporary:
            with temporary.open("wb") as file:
                fetched = await client.download(url, sink=file.write, max_bytes=MAX_IMAGE_BYTES)
            return await anyio.to_thread.run_sync(
                self._admit, temporary, fetched, request, limiter=self._decoders
            )

    def _admit(self, temporary: Path, fetched: Fetched, request: ImageRequest) -> StoredImage:
        key = request.request_key
        try:
            image_format = look_at(temporary, request.pixels)
        except ImageRejected as rejected:
            name = f"images/rejected/{key}"
            self.storage.publish(temporary, name)
            raise ImageRejected(
                rejected.code, f"{rejected}; kept as {self.storage.locate(name)}"
            ) from None
        name = f"images/{key[:2]}/{key}.{FORMATS[image_format]}"
        self.storage.publish(temporary, name)
        width, height = request.pixels
        return StoredImage(
            path=name,
            sha256=fetched.sha256,
            bytes=fetched.size_bytes,
            format=image_format,
            width=width,
            height=height,
        )


def look_at(path: Path, pixels: tuple[int, int]) -> str:
    """Decode a file in full and return its format: ``PNG``, ``JPEG``, ``WEBP`` or ``AVIF``.

    Raises NoUsableBody where it is no whole picture, and ImageRejected where it is one of
    other dimensions, or of one flat colour. Dimensions are compared before anything is
    decoded, so that a small file cannot ask for much memory.
    """
    try:
        with Image.open(path, formats=tuple(FORMATS)) as image:
            if image.size != pixels:
                raise _wrong_size(image.size, pixels)
            image_format = image.format or ""
            if getattr(image, "n_frames", 1) != 1:
                raise ImageRejected("animated", "the image has several frames")
            image.load()
            flat = _is_flat(image)
        if image_format == "PNG":
            with Image.open(path, formats=["PNG"]) as image:
                image.verify()  # decoding does not compare the checksums
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageRejected(
            "wrong_size", f"the image declares far more than {pixels[0]}×{pixels[1]} pixels"
        ) from None
    except UnidentifiedImageError:
        raise NoUsableBody(f"not an image: it begins with {_beginning(path)}") from None
    except DownloadError:
        raise
    except DAMAGED as error:
        raise NoUsableBody(f"the image is damaged: {error}") from None
    if not _ends_well(path, image_format):
        raise NoUsableBody(f"the {image_format} file is cut short")
    if flat:
        raise ImageRejected("flat_image", "the image is one flat colour")
    return image_format


def _wrong_size(found: tuple[int, int], wanted: tuple[int, int]) -> ImageRejected:
    return ImageRejected(
        "wrong_size",
        f"the image has {found[0]}×{found[1]} pixels instead of {wanted[0]}×{wanted[1]}",
    )


def _is_flat(image: Image.Image) -> bool:
    if image.mode.startswith("I"):  # grey in 16 bits
        low, high = cast("tuple[int, int]", image.getextrema())
        return high - low <= _FLAT_RANGE * 257
    # By way of RGBA, because a palette may hold its transparency in a form that RGB cannot.
    colours = image if image.mode == "RGB" else image.convert("RGBA").convert("RGB")
    extrema = cast("tuple[tuple[int, int], ...]", colours.getextrema())
    return all(high - low <= _FLAT_RANGE for low, high in extrema)


def _ends_well(path: Path, image_format: str) -> bool:
    """Whether the file's end is its format's: decoders forgive a missing tail."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(12)
        file.seek(max(0, size - 64))
        tail = file.read()
    match image_format:
        case "PNG":
            return b"IEND\xaeB`\x82" in tail
        case "JPEG":
            return tail.rstrip(b"\x00").endswith(b"\xff\xd9")
        case "WEBP":
            return size >= int.from_bytes(head[4:8], "little") + 8
        case _:
            return True


def _beginning(path: Path) -> str:
    with path.open("rb") as file:
        return repr(file.read(24))

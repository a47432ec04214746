"""A paid image: fetch it, look at it, and publish it under its own name.

The name comes from the request's key, so no prompt_id can name a file. Bytes wait in memory only
as far as a budget of bytes allows, and everything that blocks or computes is done in threads: one
call for an image of up to 1 MiB, and one more for each further MiB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from PIL import Image

from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.storage.byte_budget import ByteBudget
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import FORMATS, decoded_bytes, verify_image
from krea_dagster.engine.threads import InThread, Threads
from krea_dagster.errors import ConfigError, DownloadError, ImageRejected, NoUsableBody
from krea_dagster.models import ImageRequest

__all__ = ["DAMAGED", "FORMATS", "MAX_IMAGE_BYTES", "Downloader", "Fetched", "ImageStore"]

_log = logging.getLogger(__name__)

#: Bytes of the largest file that is taken: four times an uncompressed 2K picture would be more
#: than any of the formats needs.
MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024

#: So much of a body waits in memory before it is written, and so much more on its way there.
_PIECE_BYTES: Final = 1024 * 1024
_ON_ITS_WAY_BYTES: Final = 512 * 1024

#: What all downloads together, and all looks together, may hold in memory.
_DOWNLOADS_BYTES: Final = 96 * 1024 * 1024
_LOOKS_BYTES: Final = 256 * 1024 * 1024


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
        """Stream a file into ``sink``, and wait for what it returns where that is possible."""


async def _once(call: Callable[[], Awaitable[StoredImage]]) -> StoredImage:
    return await call()


class ImageStore:
    """The verified images under the storage root. Use it in one event loop at a time.

    ``look`` decodes every picture: a flat or damaged one is rejected. Without it, a file is
    taken for what its header says, its bytes are as the host sent them, and a decode is saved.
    ``decoders`` bounds how many pictures are decoded at once: Pillow releases the interpreter,
    so one per core is enough.

    ``on_image`` is given the sha256 and the decoded pixels of each picture, once it is
    published; only with ``look``. It is called in threads, several at once, and what goes wrong
    in it is logged: the image is paid for, and stays stored. ``in_thread`` makes the calls that
    block or compute.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        look: bool = True,
        decoders: int | None = None,
        on_image: Callable[[str, Image.Image], object] | None = None,
        in_thread: InThread | None = None,
    ) -> None:
        cores = os.cpu_count() or 1
        self.storage = storage
        self._look = look
        self._on_picture = on_image
        self._decoding = threading.BoundedSemaphore(decoders or cores)
        self._downloads = ByteBudget(_DOWNLOADS_BYTES)
        self._looks = ByteBudget(_LOOKS_BYTES)
        self._in_thread = in_thread or Threads(min(32, 4 + 2 * cores))

    def holds(self, image: StoredImage) -> bool:
        """Whether the file is there in its full size."""
        return self.storage.size_bytes(image.path) == image.bytes

    def find(self, record: Record, *, adopts: bool = False) -> str | None:
        """Return the name of a file that may be a request's image, None where there is none.

        It lies under the request's own name. Behind a URL it is looked for only where the journal
        has entered one before, or the root ``adopts`` files that it did not enter.
        """
        if record.image is not None:
            return record.image.path if self.holds(record.image) else None
        if self.storage.folder is None and not adopts:
            return None
        for image_format in FORMATS:
            name = image_name(record.request_key, image_format)
            if self.storage.size_bytes(name):
                return name
        return None

    async def verified(self, name: str, record: Record) -> StoredImage | None:
        """Return the image in a file of the storage root, None where it is not the request's.

        One that was stored before must have the same content; another one is looked at.
        """
        return await self._in_thread(self._verified, self.storage, name, record)

    async def copied(self, location: str, record: Record) -> StoredImage | None:
        """Copy a stored image from another storage root; None where it cannot be had there."""
        return await self._in_thread(self._copied, location, record)

    def _verified(self, storage: Storage, name: str, record: Record) -> StoredImage | None:
        try:
            with storage.open(name) as file:
                data = file.read(MAX_IMAGE_BYTES + 1)
        except OSError:
            return None
        sha256 = hashlib.sha256(data).hexdigest()
        if record.image is not None:
            return record.image if record.image.sha256 == sha256 else None
        try:
            with self._decoding:
                image_format = verify_image(data, record.request.pixels)
        except DownloadError:
            return None
        width, height = record.request.pixels
        return StoredImage(name, sha256, len(data), image_format, width, height)

    def _copied(self, location: str, record: Record) -> StoredImage | None:
        image = record.image
        try:
            other = Storage(location)
            if image is None or self._verified(other, image.path, record) is None:
                return None
            with other.open(image.path) as source, self.storage.scratch() as temporary:
                temporary.write_bytes(source.read())
                self.storage.publish(temporary, image.path)
        except (OSError, ConfigError):
            return None
        return image

    async def fetch(
        self,
        client: Downloader,
        url: str,
        request: ImageRequest,
        *,
        repeated: Callable[[Callable[[], Awaitable[StoredImage]]], Awaitable[StoredImage]] = _once,
    ) -> StoredImage:
        """Download, verify and publish the image of a request.

        ``repeated`` makes a call again where the storage root was away: what has been downloaded
        is kept until it can be published.

        Raises DownloadError: ImageRejected where the file is whole but wrong (it is kept
        under ``images/rejected``, for it was paid for), others where it could not be had.
        """
        async with self._downloads.take(_PIECE_BYTES + _ON_ITS_WAY_BYTES):
            body = _Body(self.storage, self._in_thread)
            try:
                fetched = await client.download(url, sink=body.take, max_bytes=MAX_IMAGE_BYTES)
                memory = fetched.size_bytes if body.path is not None else 0
                if self._look:
                    memory += decoded_bytes(request.pixels)
                async with self._looks.take(memory):
                    admit = partial(self._in_thread, self._admit, body, fetched, request)
                    return await repeated(admit)
            finally:
                if body.path is not None:
                    body.path.unlink(missing_ok=True)

    def _admit(self, body: _Body, fetched: Fetched, request: ImageRequest) -> StoredImage:
        key = request.request_key
        pictures: list[Image.Image] = []
        try:
            image_format = self._look_at(body, request, pictures)
        except ImageRejected as rejected:
            name = f"images/rejected/{key}"
            body.publish(name)
            raise ImageRejected(
                rejected.code, f"{rejected}; kept as {self.storage.locate(name)}"
            ) from None
        name = image_name(key, image_format)
        body.publish(name)
        for picture in pictures:
            self._show(fetched.sha256, picture)
        width, height = request.pixels
        return StoredImage(
            path=name,
            sha256=fetched.sha256,
            bytes=fetched.size_bytes,
            format=image_format,
            width=width,
            height=height,
        )

    def _look_at(self, body: _Body, request: ImageRequest, pictures: list[Image.Image]) -> str:
        if not self._look:
            try:
                return verify_image(body.beginning(), request.pixels, decode=False)
            except NoUsableBody:  # its header may be longer
                return verify_image(body.content(), request.pixels, decode=False)
        with self._decoding:
            if self._on_picture is None:
                return verify_image(body.content(), request.pixels)
            return verify_image(body.content(), request.pixels, on_decoded=pictures.append)

    def _show(self, sha256: str, picture: Image.Image) -> None:
        if self._on_picture is None:
            return
        try:
            with self._decoding:
                self._on_picture(sha256, picture)
        except Exception:  # noqa: BLE001 - a paid image is not given up for what comes of it
            _log.exception("the image %s is stored, and what was to be made of it failed", sha256)


class _Body:
    """What has come of a file: in memory, and from 1 MiB on in a file at ``path``."""

    def __init__(self, storage: Storage, in_thread: InThread) -> None:
        self._storage = storage
        self._in_thread = in_thread
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0
        self._written_bytes = 0
        self.path: Path | None = None

    def take(self, piece: bytes) -> object:
        """Take the next piece. What it returns is to be waited for before the next."""
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        return _Room(self) if self._waiting_bytes >= _PIECE_BYTES else None

    async def make_room(self) -> None:
        """Write what waits to the file."""
        await self._in_thread(self.written)

    def written(self) -> Path:
        """Write what waits to the file; returns its path. In a thread."""
        try:
            if self.path is None:
                self.path, descriptor = self._storage.open_new_file()
            else:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.ftruncate(descriptor, self._written_bytes)  # an earlier try may have failed
                for piece in self._waiting:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._storage.fail(error)
        self._written_bytes += sum(map(len, self._waiting))
        self._waiting.clear()
        self._waiting_bytes = 0
        return self.path

    def publish(self, name: str) -> None:
        """Give the file its name. In a thread."""
        self._storage.publish(self.written(), name)
        if self._storage.folder is not None:
            self.path = None  # it has been renamed

    def beginning(self) -> bytes:
        """The first 64 KiB or more, or all of it. In a thread."""
        if self.path is None and self._waiting:
            return self._waiting[0]
        return self.content()

    def content(self) -> bytes:
        """All of it. In a thread."""
        if self.path is not None:
            return self.written().read_bytes()
        if len(self._waiting) != 1:
            self._waiting[:] = [b"".join(self._waiting)]
        return self._waiting[0]


class _Room:
    """Room in memory for the next piece, for whoever waits for it."""

    def __init__(self, body: _Body) -> None:
        self._body = body

    def __await__(self) -> Generator[Any, None, None]:
        return self._body.make_room().__await__()


def image_name(request_key: str, image_format: str) -> str:
    """The name of a stored image under the storage root."""
    return f"images/{request_key[:2]}/{request_key}.{FORMATS[image_format]}"

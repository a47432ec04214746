"""Fetching paid images: download, verify, and publish under the final name.

The name is derived from the request key, so a prompt_id cannot choose a file. A byte budget limits
memory, and everything that blocks or computes runs in threads: one call for an image of up to
1 MiB, and one more for each further MiB.
"""

from __future__ import annotations

import hashlib
import logging
import os
import threading
from collections.abc import Awaitable, Callable, Generator, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Final, Protocol

from PIL import Image

from krea_dagster.engine.record import FORMATS, Record, StoredImage
from krea_dagster.engine.storage.byte_budget import ByteBudget
from krea_dagster.engine.storage.lookups import listing_of
from krea_dagster.engine.storage.storage import STORE_THREADS, Storage
from krea_dagster.engine.storage.verify import DECODE_ERRORS, decoded_bytes, verify_image
from krea_dagster.engine.threads import InThread, Threads
from krea_dagster.errors import ConfigError, DownloadError, ImageRejected, NoUsableBody
from krea_dagster.models import ImageRequest

__all__ = [
    "DECODE_ERRORS",
    "MAX_IMAGE_BYTES",
    "DownloadedFile",
    "Downloader",
    "ImageStore",
]

_log = logging.getLogger(__name__)

#: The largest accepted file: four times an uncompressed 2K image, more than any format needs.
MAX_IMAGE_BYTES: Final = 64 * 1024 * 1024

#: Bytes of a body that are buffered before they are written, and that may be in transit.
_PIECE_BYTES: Final = 1024 * 1024
_TRANSIT_BYTES: Final = 512 * 1024

#: Memory for all downloads, and for all verifications.
_DOWNLOADS_BYTES: Final = 96 * 1024 * 1024
_VERIFICATION_BYTES: Final = 256 * 1024 * 1024

#: Twice this is more than the memory of verifying a 1K image.
_LARGE_BLOCK_BYTES: Final = 12 * 1024 * 1024


class DownloadedFile(Protocol):
    """The size and hash of a download."""

    @property
    def size_bytes(self) -> int:
        """Its size."""

    @property
    def sha256(self) -> str:
        """Its hash, in hexadecimal."""


class Downloader(Protocol):
    """The part of ``KreaClient`` that is used here."""

    async def download(
        self, url: str, *, sink: Callable[[bytes], object], max_bytes: int
    ) -> DownloadedFile:
        """Stream a file into ``sink``; await the sink's result if it is awaitable."""


def _keep_freed_memory() -> None:
    """Have the memory of an image used again for the next one.

    glibc returns free memory to the system above twice the largest block that was ever freed, and
    fresh pages for each image take a tenth of its CPU (mallopt(3): M_TRIM_THRESHOLD). This block
    is never written, so it takes no memory. Other allocators ignore it.
    """
    bytearray(_LARGE_BLOCK_BYTES)


async def _once(call: Callable[[], Awaitable[StoredImage]]) -> StoredImage:
    return await call()


class ImageStore:
    """The verified images under the storage root. For one event loop at a time.

    Args:
        storage: the storage root.
        verify: decode every image, and reject flat and damaged ones. Otherwise only the header is
            checked.
        decoders: how many images are decoded at once. Pillow releases the GIL, so the default is
            one per core.
        on_image: each is called with the sha256 and the decoded pixels of each published image,
            with ``verify`` only, in several threads. An error is logged: the image stays stored.
        in_thread: makes the calls that block or compute.
    """

    def __init__(
        self,
        storage: Storage,
        *,
        verify: bool = True,
        decoders: int | None = None,
        on_image: Sequence[Callable[[str, Image.Image], object]] = (),
        in_thread: InThread | None = None,
    ) -> None:
        cores = os.cpu_count() or 1
        self.storage = storage
        self._verify = verify
        self._on_image = on_image
        self._decoding = threading.BoundedSemaphore(decoders or cores)
        self._downloads = ByteBudget(_DOWNLOADS_BYTES)
        self._verifications = ByteBudget(_VERIFICATION_BYTES)
        self._in_thread = in_thread or Threads(min(32, 4 + 2 * cores))
        if verify:
            _keep_freed_memory()

    def holds(self, image: StoredImage) -> bool:
        """Return whether the file exists with its full size."""
        return self.storage.holds(image)

    def find(self, record: Record, *, adopts: bool = False) -> str | None:
        """Return the name of a file that may be a request's image, None where there is none.

        Behind a URL it is searched only if the journal knows an image of the request, or if the
        root ``adopts`` files that the journal does not know.
        """
        if record.image is not None:
            return record.image.path if self.holds(record.image) else None
        names = [image_name(record.request_key, image_format) for image_format in FORMATS]
        if self.storage.folder is None:
            found = self._listed(record.request_key, names) if adopts else set()
            return next((name for name in names if name in found), None)
        return next((name for name in names if self.storage.size_bytes(name)), None)

    def find_all(self, records: Iterable[Record], *, adopts: bool) -> dict[str, str]:
        """Return the name of a file for each request that has one; a store is asked in parallel."""
        find = partial(self.find, adopts=adopts)
        wanted = list(records)
        if self.storage.folder is not None or len(wanted) < 2:
            names: Iterable[str | None] = map(find, wanted)
        else:
            with ThreadPoolExecutor(min(len(wanted), STORE_THREADS)) as pool:
                names = list(pool.map(find, wanted))
        pairs = zip(wanted, names, strict=True)
        return {record.request_key: name for record, name in pairs if name is not None}

    def _listed(self, request_key: str, names: Sequence[str]) -> set[str]:
        """Return which of a request's names the store has, with some content: by one request."""
        if not self.storage.lists_by_prefix:
            return {name for name in names if self.storage.size_bytes(name)}
        return {name for name, size in self.storage.listed(listing_of(request_key)) if size}

    async def verified(self, name: str, record: Record) -> StoredImage | None:
        """Return the image in a file of the storage root, None if it is not the request's.

        A known image must have the same content; an unknown one is verified.
        """
        return await self._in_thread(self._verified, self.storage, name, record)

    async def copied(self, location: str, record: Record) -> StoredImage | None:
        """Copy a stored image from another storage root; return None if it is not there."""
        return await self._in_thread(self._copied, location, record)

    def _verified(self, storage: Storage, name: str, record: Record) -> StoredImage | None:
        data = _read(storage, name)
        return None if data is None else self._of(record, name, data)

    def _of(self, record: Record, name: str, data: bytes) -> StoredImage | None:
        """Return the image of a record in a file's content, None if it is another."""
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
            other = Storage(location, self.storage.options_for(location))
            data = None if image is None else _read(other, image.path)
            if image is None or data is None or self._of(record, image.path, data) is None:
                return None
            self.storage.write(image.path, lambda file: file.write(data))
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

        ``repeated`` repeats a call while the storage root is unavailable: the download is kept
        until it can be published.

        Raises ImageRejected if the file is complete but wrong (it is kept under
        ``images/rejected``, because it was paid for), and other DownloadErrors.
        """
        async with self._downloads.take(_PIECE_BYTES + _TRANSIT_BYTES):
            body = _DownloadedBody(self.storage, self._in_thread)
            try:
                fetched = await client.download(url, sink=body.take, max_bytes=MAX_IMAGE_BYTES)
                memory = fetched.size_bytes if body.path is not None else 0
                if self._verify:
                    memory += decoded_bytes(request.pixels)
                async with self._verifications.take(memory):
                    admit = partial(self._in_thread, self._admit, body, fetched, request)
                    return await repeated(admit)
            finally:
                if body.path is not None:
                    body.path.unlink(missing_ok=True)

    def _admit(
        self, body: _DownloadedBody, fetched: DownloadedFile, request: ImageRequest
    ) -> StoredImage:
        key = request.request_key
        images: list[Image.Image] = []
        try:
            image_format = self._verified_format(body, request, images)
        except ImageRejected as rejected:
            name = f"images/rejected/{key}"
            body.publish(name)
            raise ImageRejected(
                rejected.code, f"{rejected}; kept as {self.storage.locate(name)}"
            ) from None
        name = image_name(key, image_format)
        body.publish(name)
        for image in images:
            self._notify(fetched.sha256, image)
        width, height = request.pixels
        return StoredImage(
            path=name,
            sha256=fetched.sha256,
            bytes=fetched.size_bytes,
            format=image_format,
            width=width,
            height=height,
        )

    def _verified_format(
        self, body: _DownloadedBody, request: ImageRequest, images: list[Image.Image]
    ) -> str:
        if not self._verify:
            try:
                return verify_image(body.beginning(), request.pixels, decode=False)
            except NoUsableBody:  # the header may be longer
                return verify_image(body.content(), request.pixels, decode=False)
        with self._decoding:
            return verify_image(body.content(), request.pixels, on_decoded=images.append)

    def _notify(self, sha256: str, image: Image.Image) -> None:
        with self._decoding:
            for call in self._on_image:
                try:
                    call(sha256, image)
                except Exception:  # noqa: BLE001 - a paid image stays stored after any error
                    _log.exception("the image %s is stored, but its callback failed", sha256)


def _read(storage: Storage, name: str) -> bytes | None:
    """Return the content of an image's file, None if it cannot be read."""
    try:
        with storage.open(name) as file:
            return file.read(MAX_IMAGE_BYTES + 1)
    except OSError:
        return None


class _DownloadedBody:
    """A partial download: in memory, and from 1 MiB on in a file at ``path``."""

    def __init__(self, storage: Storage, in_thread: InThread) -> None:
        self._storage = storage
        self._in_thread = in_thread
        self._buffered: list[bytes] = []
        self._buffered_bytes = 0
        self._written_bytes = 0
        self.path: Path | None = None

    def take(self, piece: bytes) -> object:
        """Take the next piece. The result, if any, must be awaited before the next."""
        self._buffered.append(piece)
        self._buffered_bytes += len(piece)
        return _Flush(self) if self._buffered_bytes >= _PIECE_BYTES else None

    async def flush(self) -> None:
        """Write the buffer to the file."""
        await self._in_thread(self.written)

    def written(self) -> Path:
        """Write the buffer to the file, and return its path. Blocks."""
        try:
            if self.path is None:
                self.path, descriptor = self._storage.create_temporary()
            else:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND)
            try:
                os.ftruncate(descriptor, self._written_bytes)  # an earlier try may have failed
                for piece in self._buffered:
                    rest = memoryview(piece)
                    while rest:
                        rest = rest[os.write(descriptor, rest) :]
            finally:
                os.close(descriptor)
        except OSError as error:
            self._storage.fail(error)
        self._written_bytes += sum(map(len, self._buffered))
        self._buffered.clear()
        self._buffered_bytes = 0
        return self.path

    def publish(self, name: str) -> None:
        """Give the file its name. Blocks."""
        self._storage.publish(self.written(), name)
        if self._storage.folder is not None:
            self.path = None  # it has been renamed

    def beginning(self) -> bytes:
        """Return at least the first 64 KiB. Blocks."""
        if self.path is None and self._buffered:
            return self._buffered[0]
        return self.content()

    def content(self) -> bytes:
        """Return the whole body. Blocks."""
        if self.path is not None:
            return self.written().read_bytes()
        if len(self._buffered) != 1:
            self._buffered[:] = [b"".join(self._buffered)]
        return self._buffered[0]


class _Flush:
    """An awaitable that flushes a body; unlike a coroutine, it need not be awaited."""

    def __init__(self, body: _DownloadedBody) -> None:
        self._body = body

    def __await__(self) -> Generator[Any, None, None]:
        return self._body.flush().__await__()


def image_name(request_key: str, image_format: str) -> str:
    """Return the name of a stored image under the storage root."""
    return f"images/{request_key[:2]}/{request_key}.{FORMATS[image_format]}"

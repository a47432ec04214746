"""The images that a review sends: thumbnails and files, addressed by their hash only."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Final

import anyio.to_thread
import numpy as np
import numpy.typing as npt
from PIL import Image
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import FileResponse, Response, StreamingResponse

from krea_dagster.curation.review.thumbnails import GridThumbnails
from krea_dagster.curation.thumbnails import NoThumbnail, Thumbnails
from krea_dagster.engine.storage.storage import Storage

#: Images are addressed by their hash, so they can be cached forever.
_CACHE_FOREVER: Final = {"Cache-Control": "private, max-age=31536000, immutable"}

#: Pillow's image formats that are sent to a browser.
_TYPES: Final = {
    "PNG": "image/png",
    "JPEG": "image/jpeg",
    "WEBP": "image/webp",
    "AVIF": "image/avif",
}

Colours = npt.NDArray[np.float64]

#: From this mean difference in chroma on, images are of other colours. Measured on 24 drawn images:
#: compressed, halved or blurred ones differ by at most 0.7, darker, lighter and flatter ones by at
#: most 7.0; half as colourful ones by at least 9.4, as those with hues turned by 30°, and grey ones
#: by 18. Hues turned by 15° (4.5 to 5.9) are not told from a change of brightness.
OTHER_COLOURS: Final = 8.0
#: The most images whose colours are compared: those that the page shows side by side.
_COMPARED: Final = 16

#: From a hash to path, format and size in bytes of a file.
_FileOf = Callable[[str], tuple[str, str, int | None] | None]


class ReviewImages:
    """Serves the images of a storage root. ``file_of`` returns path, format and size of one."""

    def __init__(self, storage: Storage, file_of: _FileOf) -> None:
        self._storage = storage
        self._file_of = file_of
        self._made = Thumbnails(storage)
        self._thumbnails = GridThumbnails(self._made)

    def mark_other_colours(self, row: Mapping[str, Any], others: Sequence[dict[str, Any]]) -> None:
        """Set ``other_colours`` of the rows whose image is of other colours than that of ``row``.

        Near-duplicates are found by grey values only. Those of which no thumbnail can be made are
        not marked.
        """
        own = self._colours(row["image_sha256"])
        for other in others[:_COMPARED]:
            theirs = self._colours(other["image_sha256"])
            if own is not None and theirs is not None:
                other["other_colours"] = colour_difference(own, theirs) > OTHER_COLOURS

    def _colours(self, sha256: str) -> Colours | None:
        found = self._file_of(sha256)
        name = None if found is None else name_in(self._storage, found[0])
        if name is None:
            return None
        try:
            return colours_of(self._made.get(sha256, name))
        except (NoThumbnail, OSError):
            return None

    async def small(self, request: Request) -> Response:
        """Return the thumbnail of an image."""
        name, _ = await anyio.to_thread.run_sync(self._name_of, request)
        if await request.is_disconnected():
            return Response(status_code=499)  # the client has scrolled on
        try:
            data = await self._thumbnails.get(request.path_params["sha256"], name)
        except NoThumbnail as error:
            raise HTTPException(415, str(error)) from None
        return Response(data, media_type="image/jpeg", headers=_CACHE_FOREVER)

    async def full(self, request: Request) -> Response:
        """Return the file of an image."""
        name, kind = await anyio.to_thread.run_sync(self._name_of, request)
        storage = self._storage
        if storage.folder is not None:
            return FileResponse(storage.folder / name, media_type=kind, headers=_CACHE_FOREVER)
        try:
            file = await anyio.to_thread.run_sync(storage.open, name)
        except FileNotFoundError:
            raise HTTPException(404, "the file no longer exists") from None
        except OSError as error:
            raise HTTPException(502, f"the file cannot be read: {error}") from None

        async def parts() -> Any:
            try:
                while part := await anyio.to_thread.run_sync(file.read, 1 << 18):
                    yield part
            finally:
                await anyio.to_thread.run_sync(file.close)

        return StreamingResponse(parts(), media_type=kind, headers=_CACHE_FOREVER)

    def _name_of(self, request: Request) -> tuple[str, str]:
        """Return the name under the storage root and the media type of a requested image.

        The address contains only the hash; the path comes from the index.
        """
        found = self._file_of(request.path_params["sha256"])
        if found is None:
            raise HTTPException(404, "no row has this image")
        name = name_in(self._storage, found[0])
        kind = _TYPES.get(found[1].upper())
        if name is None or kind is None:
            raise HTTPException(415, "the row's file is not an image of this storage root")
        try:
            size = self._storage.size_bytes(name)
        except OSError as error:
            raise HTTPException(502, f"the file cannot be read: {error}") from None
        if size is None:
            raise HTTPException(404, "the file no longer exists")
        if found[2] is not None and size != found[2]:
            # No other image may be judged under this one's hash.
            raise HTTPException(415, "the file has changed since it was verified")
        return name, kind


def colours_of(thumbnail: bytes) -> Colours:
    """Return the chroma (Cb and Cr) of an image, in 16 × 16 areas."""
    image = Image.open(io.BytesIO(thumbnail)).convert("RGB")
    small = image.resize((16, 16), Image.Resampling.BOX).convert("YCbCr")
    return np.asarray(small, np.float64)[:, :, 1:]


def colour_difference(one: Colours, other: Colours) -> float:
    """Return the mean difference of two images in chroma, 0 to 255."""
    return float(np.abs(one - other).mean())


def name_in(storage: Storage, location: str) -> str | None:
    """Return the name of an image under the root; None where it is outside of it."""
    name = storage.name_of(location)
    allowed = name.startswith("images/") and ".." not in PurePosixPath(name).parts
    return name if allowed else None

"""Fetches: downloads, verifies and publishes a paid image, or says that it is lost."""

from __future__ import annotations

from functools import partial
from typing import Any

from krea_dagster.engine.frozen import changed
from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.run.outages import Outages, Part
from krea_dagster.engine.run.work_item import Carrier, Desk, trouble
from krea_dagster.engine.states import Event, State
from krea_dagster.engine.storage.images import Downloader, ImageStore
from krea_dagster.errors import DownloadError, ImageRejected, LinkDead, NoUsableBody, StorageError


class Fetching:
    """The downloads of one run.

    Every method takes a carrier, changes its record and trail, and returns the seconds to wait
    before its next step. Raises JournalError where an event could not be written, and StorageError
    where an image could not.
    """

    def __init__(
        self, client: Downloader, images: ImageStore, desk: Desk, outages: Outages
    ) -> None:
        self._client = client
        self._outages = outages
        self._images = images
        self._desk = desk
        #: The content of what this run has stored, by request key.
        self.stored: dict[str, str] = {}

    async def fetch(self, carrier: Carrier) -> float:
        """Download, verify and publish the image, and record it."""
        record = carrier.record
        try:
            image = await self._download(str(record.result_url), record)
        except DownloadError as error:
            if isinstance(error, NoUsableBody) and await self._outages.until_back(Part.API, error):
                return 0.0  # the network was away, and not the file
            await self._desk.record(carrier, Event.NOT_STORED, trouble(error.code, str(error)))
            if isinstance(error, ImageRejected):
                # A whole file that was paid for: it is kept, and would come again as it is.
                carrier.trail = changed(carrier.trail, final=f"not stored: {error}")
                return 0.0
            carrier.trail = changed(
                carrier.trail,
                fetch_failures=carrier.trail.fetch_failures + 1,
                stale_link=True,
                link_dead=isinstance(error, LinkDead),
            )
            return self._desk.backoff_s(carrier.trail.fetch_failures)
        except OSError as error:
            raise self._not_stored(error) from error
        again = record.state is State.STORED  # in another storage root
        await self._desk.record(carrier, Event.FOUND if again else Event.STORED, _columns(image))
        self.stored[record.request_key] = image.sha256
        return 0.0

    async def _download(self, url: str, record: Record) -> StoredImage:
        # What has been downloaded whole is kept while the storage root is away.
        repeated = self._outages.repeated
        fetch = self._images.fetch
        return await repeated(lambda: fetch(self._client, url, record.request, repeated=repeated))

    def _not_stored(self, error: OSError) -> StorageError:
        return StorageError(
            f"could not store an image under {self._images.storage.shown('')}: {error}. "
            "Nothing more is bought until this is mended. What was paid for is in the journal, "
            "and the next run fetches it: do not wait longer than its links live, which is 24 "
            "hours."
        )

    async def adopt(self, carrier: Carrier, name: str) -> float:
        """Take a file that lies under the request's name for its image, if it verifies."""
        record = carrier.record
        carrier.trail = changed(carrier.trail, file=None)
        image = await self._outages.repeated(partial(self._images.verified, name, record))
        if image is not None:
            values = _columns(image)
            if record.state is State.SUBMITTED and record.charged_units is None:
                values["charged_units"] = 0 if record.replayed else record.reserved_units
            found = {"file": name, "was": record.state.value}
            await self._desk.record(carrier, Event.FOUND, values, found)
        return 0.0

    async def not_here(self, carrier: Carrier) -> float:
        """Get the file of a stored image that is not in this storage root.

        Where another root of the journal holds it, it is copied from there, or fetched by the link
        while that lives; what is said of the other root stays true. Else it is missing.
        """
        record, elsewhere = carrier.record, carrier.trail.elsewhere
        for location in elsewhere:
            image = await self._outages.repeated(partial(self._images.copied, location, record))
            if image is not None:
                found = {"file": image.path, "copied_from": location}
                await self._desk.record(carrier, Event.FOUND, _columns(image), found)
                return 0.0
        if not elsewhere:
            return await self._file_missing(carrier)
        there = (
            f"stored in the storage root {', '.join(elsewhere)}, which cannot be read from here; "
            f"copy {_path(record)} here. Its link"
        )
        if record.result_url is None:
            carrier.trail = changed(carrier.trail, final=f"{there} is not known")
            return 0.0
        try:
            image = await self._download(record.result_url, record)
        except OSError as error:
            raise self._not_stored(error) from error
        except DownloadError as error:
            carrier.trail = changed(carrier.trail, final=f"{there} is of no use any more: {error}")
            return 0.0
        await self._desk.record(carrier, Event.FOUND, _columns(image), {"file": image.path})
        return 0.0

    async def expire(self, carrier: Carrier, code: str, message: str) -> float:
        """Record that an image is paid and lost."""
        await self._desk.record(carrier, Event.EXPIRED, trouble(code, message))
        return 0.0

    async def _file_missing(self, carrier: Carrier) -> float:
        """Record that a stored file is not there any more."""
        await self._desk.record(carrier, Event.FILE_MISSING)
        # Counted, because a storage that changes what it is given would be filled for ever.
        failures = carrier.trail.fetch_failures + 1
        carrier.trail = changed(carrier.trail, fetch_failures=failures)
        return 0.0


def _columns(image: StoredImage) -> dict[str, Any]:
    """Return what an event sets where a request's file is known."""
    return {
        "image_path": image.path,
        "image_sha256": image.sha256,
        "image_bytes": image.bytes,
        "image_format": image.format,
        "width": image.width,
        "height": image.height,
    }


def _path(record: Record) -> str:
    return "its file" if record.image is None else record.image.path

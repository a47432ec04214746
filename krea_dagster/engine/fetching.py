"""Fetches: downloads, verifies and publishes a paid image, or says that it is lost."""

from __future__ import annotations

from krea_dagster.engine.carrier import Carrier, Desk, trouble
from krea_dagster.engine.frozen import changed
from krea_dagster.engine.images import Downloader, ImageStore
from krea_dagster.engine.states import Event
from krea_dagster.errors import DownloadError, ImageRejected, LinkDead, StorageError


class Fetching:
    """The downloads of one run.

    Every method takes a carrier, changes its record and trail, and returns the seconds to wait
    before its next step. Raises JournalError where an event could not be written, and StorageError
    where an image could not.
    """

    def __init__(self, client: Downloader, images: ImageStore, desk: Desk) -> None:
        self._client = client
        self._images = images
        self._desk = desk

    async def fetch(self, carrier: Carrier) -> float:
        """Download, verify and publish the image, and record it."""
        record = carrier.record
        try:
            image = await self._images.fetch(self._client, str(record.result_url), record.request)
        except DownloadError as error:
            await self._desk.record(carrier, Event.NOT_STORED, trouble(error.code, str(error)))
            # A rejected image mostly comes again as it is: fewer looks are enough.
            weight = 2 if isinstance(error, ImageRejected) else 1
            carrier.trail = changed(
                carrier.trail,
                fetch_failures=carrier.trail.fetch_failures + weight,
                stale_link=True,
                link_dead=isinstance(error, LinkDead),
            )
            return self._desk.backoff_s(carrier.trail.fetch_failures)
        except OSError as error:
            raise StorageError(
                f"could not store an image under {self._images.storage.locate('')}: {error}. "
                "Nothing more is bought until this is mended. What was paid for is in the journal, "
                "and the next run fetches it: do not wait longer than its links live, which is 24 "
                "hours."
            ) from error
        await self._desk.record(
            carrier,
            Event.STORED,
            {
                "image_path": image.path,
                "image_sha256": image.sha256,
                "image_bytes": image.bytes,
                "image_format": image.format,
                "width": image.width,
                "height": image.height,
            },
        )
        return 0.0

    async def expire(self, carrier: Carrier, code: str, message: str) -> float:
        """Record that an image is paid and lost."""
        await self._desk.record(carrier, Event.EXPIRED, trouble(code, message))
        return 0.0

    async def file_missing(self, carrier: Carrier) -> float:
        """Record that a stored file is not there any more."""
        await self._desk.record(carrier, Event.FILE_MISSING)
        # Counted, because a storage that changes what it is given would be filled for ever.
        failures = carrier.trail.fetch_failures + 1
        carrier.trail = changed(carrier.trail, fetch_failures=failures)
        return 0.0

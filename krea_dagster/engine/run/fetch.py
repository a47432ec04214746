"""The fetch step: downloads, verifies and publishes a paid image, or records that it is lost."""

from __future__ import annotations

from functools import partial
from typing import Any

from krea_dagster.engine.record import Record, StoredImage
from krea_dagster.engine.run.context import RunContext
from krea_dagster.engine.run.work_item import WorkItem
from krea_dagster.engine.states import Event, State
from krea_dagster.errors import DownloadError, ImageRejected, LinkExpired, StorageError


class FetchStep:
    """The downloads of one run.

    Each step takes an item, changes its record and retry state, and returns the seconds to wait
    before its next step. Raises JournalError if an event cannot be written, and StorageError if an
    image cannot.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._record = context.record
        self._images = context.options.images
        self._outages = context.outages
        self._stored: dict[str, str] = {}  # the SHA-256 of each file, by request key

    @property
    def same_files(self) -> list[str]:
        """One sentence for each file that several requests of this run got."""
        by_content: dict[str, list[str]] = {}
        for key, sha256 in self._stored.items():
            by_content.setdefault(sha256, []).append(key)
        return [
            f"{len(keys)} requests got one and the same file ({sha256[:12]}): "
            f"{', '.join(key[:12] for key in keys[:10])}"
            for sha256, keys in by_content.items()
            if len(keys) > 1
        ]

    async def fetch(self, item: WorkItem) -> float:
        """Download, verify and publish the image, and record it."""
        record, retry = item.record, item.retry
        try:
            image = await self._download(str(record.result_url), record)
        except DownloadError as error:
            await self._context.write_noted(item)
            if await self._context.api_was_away(error):
                return 0.0  # the network failed, and not the file
            await self._record(item, Event.NOT_STORED, error=(error.code, str(error)))
            if isinstance(error, ImageRejected):
                # A complete file that was paid for: it is kept, and would come again as it is.
                retry.leave_reason = f"not stored: {error}"
                return 0.0
            retry.fetch_failures += 1
            retry.stale_link = True
            retry.link_dead = isinstance(error, LinkExpired)
            return self._context.backoff_s(retry.fetch_failures)
        except OSError as error:
            raise self._not_stored(error) from error
        again = record.state is State.STORED  # in another storage root
        await self._record(item, Event.FOUND if again else Event.STORED, _columns(image))
        self._stored[record.request_key] = image.sha256
        return 0.0

    async def _download(self, url: str, record: Record) -> StoredImage:
        # A complete download is kept while the storage root is away.
        repeated = self._outages.repeated
        fetch, client = self._images.fetch, self._context.client
        return await repeated(lambda: fetch(client, url, record.request, repeated=repeated))

    def _not_stored(self, error: OSError) -> StorageError:
        return StorageError(
            f"could not store an image under {self._images.storage.shown('')}: {error}. "
            "Nothing more is bought until this is fixed. The purchases so far are in the journal, "
            "and the next run fetches their images: start it within 24 hours, while their links "
            "are valid."
        )

    async def adopt(self, item: WorkItem, name: str) -> float:
        """Record a file under the request's name as its image, if it verifies."""
        record = item.record
        item.retry.file = None
        image = await self._outages.repeated(partial(self._images.verified, name, record))
        if image is not None:
            values = _columns(image)
            if record.state is State.SUBMITTED and record.charged_units is None:
                values["charged_units"] = 0 if record.replayed else record.reserved_units
            data = {"file": name, "was": record.state.value}
            await self._record(item, Event.FOUND, values, data)
        return 0.0

    async def restore(self, item: WorkItem) -> float:
        """Get the file of a stored image that is not in this storage root.

        It is copied from another root of the journal that holds it, or fetched by its link while
        that is valid; what is known of the other root stays true. Otherwise it is missing.
        """
        record, elsewhere = item.record, item.retry.elsewhere
        for location in elsewhere:
            image = await self._outages.repeated(partial(self._images.copied, location, record))
            if image is not None:
                data = {"file": image.path, "copied_from": location}
                await self._record(item, Event.FOUND, _columns(image), data)
                return 0.0
        if not elsewhere:
            await self._record(item, Event.FILE_MISSING)
            # Counted, because a storage that changes what it is given would be filled for ever.
            item.retry.fetch_failures += 1
            return 0.0
        path = "its file" if record.image is None else record.image.path
        reason = (
            f"stored in the storage root {', '.join(elsewhere)}, which cannot be read from here; "
            f"copy {path} here. Its link"
        )
        if record.result_url is None:
            item.retry.leave_reason = f"{reason} is not known"
            return 0.0
        try:
            image = await self._download(record.result_url, record)
        except OSError as error:
            raise self._not_stored(error) from error
        except DownloadError as error:
            item.retry.leave_reason = f"{reason} is not valid any more: {error}"
            return 0.0
        await self._record(item, Event.FOUND, _columns(image), {"file": image.path})
        return 0.0

    async def expire(self, item: WorkItem, code: str, message: str) -> float:
        """Record that an image is paid and lost."""
        await self._record(item, Event.EXPIRED, error=(code, message))
        return 0.0


def _columns(image: StoredImage) -> dict[str, Any]:
    """Return the columns that an event sets when a request's file is known."""
    return {
        "image_path": image.path,
        "image_sha256": image.sha256,
        "image_bytes": image.bytes,
        "image_format": image.format,
        "width": image.width,
        "height": image.height,
    }

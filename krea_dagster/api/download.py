"""Download a file from an untrusted host to a sink, with every limit enforced.

There are limits for the addresses, redirects, bytes (also of a compressed body), silence, and the
lowest speed. No credentials, no cookies and no API key are sent.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Protocol

import anyio
import httpx

from krea_dagster.api.connect_errors import describe_connect_error
from krea_dagster.api.decompress import CHUNK_BYTES, Decompressor
from krea_dagster.api.download_limits import MIN_BYTES_PER_S, DownloadLimit, RateWindow
from krea_dagster.api.links import MAX_REDIRECTS, check_link, check_redirect, printable_link
from krea_dagster.api.ranges import ResumableFile, content_length, is_encoded, resumable_file
from krea_dagster.api.resolver import CheckedResolver
from krea_dagster.api.transport import UNSENT, raw_body
from krea_dagster.api.untrusted import safe_text
from krea_dagster.errors import KreaError, LinkExpired, NoUsableBody

#: The share of the longest silence by which a download may end later: each further byte in it
#: needs no new timer.
_LATE: Final = 1 / 16

#: How often one download is resumed, if each time brings more bytes.
RESUMED_MAX: Final = 5

_OK: Final = 200
_DEAD_STATUSES: Final = frozenset({403, 404, 410})
_REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})


class Sink(Protocol):
    """The target of a download: anything with ``write``, such as a binary file."""

    def write(self, data: bytes, /) -> object:
        """Take the next piece."""


@dataclass(frozen=True)
class Download:
    """A complete body that went to the sink.

    Attributes:
        size_bytes: the bytes that the sink received.
        sha256: their SHA-256 in hex.
        content_type: the header's media type in lower case, without parameters, "" if there was
            none. It is a hint only.
        url: the final URL after redirects, with its query.
    """

    size_bytes: int
    sha256: str
    content_type: str
    url: str


class _Interrupted(Exception):
    """No answer, or an incomplete body. ``silent``: no byte came in time."""

    def __init__(self, trouble: str, *, silent: bool = False) -> None:
        super().__init__(trouble)
        self.silent = silent


class _TooSlow(Exception):
    """A body that comes too slowly ever to be complete."""


class FileDownloader:
    """Downloads result links, by the rules of :mod:`krea_dagster.api.links`.

    It uses the transport without an ``httpx.AsyncClient``, which would log the whole URL of every
    request, and the query of a result link is a credential.

    Args:
        transport: does not follow redirects.
        resolver: checks the addresses of hosts.
        checks_itself: whether the transport connects to checked addresses only, for a URL. If not,
            as behind a proxy, the host is checked before the request where that is possible.
        http_allowed: whether a link may be http.
        user_agent: sent to the file host; an unknown one may get a 403.
        timeout: of each request, as httpx's transports read it.
        silence_s: the longest time in seconds without a byte, and the window for the speed.
        most: the most simultaneous downloads.
        monotonic: seconds of a clock that never goes back.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        *,
        resolver: CheckedResolver,
        checks_itself: Callable[[httpx.URL], bool],
        http_allowed: bool,
        user_agent: str,
        timeout: dict[str, float | None],
        silence_s: float,
        most: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._resolver = resolver
        self._checks_itself = checks_itself
        self._http_allowed = http_allowed
        self._headers = {"User-Agent": user_agent, "Accept": "*/*", "Accept-Encoding": "identity"}
        self._timeout = timeout
        self._silence_s = silence_s
        self._limit = DownloadLimit(most, most)
        self._places = anyio.CapacityLimiter(most)
        self._monotonic = monotonic

    async def fetch(
        self, link: str, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Download one link to a sink, in pieces of 64 KiB or more and a shorter last one.

        An awaitable that the sink returns is awaited before the next piece is read. After an error
        the sink holds the beginning of a body, or nothing: discard it. Errors of the sink pass
        through.

        Raises:
            LinkRefused: the link, a redirect, or an address is not allowed.
            LinkExpired: 403, 404 or 410.
            NoUsableBody: another status, no answer, a body that is empty, truncated, longer
                than ``max_bytes`` or has an unreadable encoding, too many redirects, silence, or
                a body that comes too slowly.
        """
        write = sink if callable(sink) else sink.write
        async with self._places:
            started_at_s = self._monotonic()
            body = _DownloadBody(write, max_bytes)
            for _ in range(1 + RESUMED_MAX):
                had_bytes = body.size_bytes
                try:
                    done = await self._receive(link, body)
                except _TooSlow as error:
                    self._set_limit(self._limit.slow(started_at_s, self._monotonic()))
                    raise NoUsableBody(str(error)) from None
                except _Interrupted as error:
                    if error.silent:
                        self._set_limit(self._limit.slow(started_at_s, self._monotonic()))
                    if body.resumable is None or body.size_bytes == had_bytes:
                        raise NoUsableBody(str(error)) from None
                    trouble = str(error)
                else:
                    self._set_limit(self._limit.success())
                    return done
        raise NoUsableBody(f"{trouble}, for the {1 + RESUMED_MAX}th time")

    def _set_limit(self, limit: DownloadLimit) -> None:
        if limit.number != self._limit.number:
            self._places.total_tokens = limit.number
        self._limit = limit

    async def _receive(self, link: str, body: _DownloadBody) -> Download:
        """Fetch a link, or the rest of it if the body has begun."""
        body.link = link
        with anyio.CancelScope(deadline=anyio.current_time() + self._silence_s) as silence:
            url = check_link(link, http_allowed=self._http_allowed)
            for _ in range(MAX_REDIRECTS + 1):
                async with self._answer(url, body) as (answer, parts):
                    body.link = str(url)
                    location = answer.headers.get("Location", "")
                    if answer.status_code not in _REDIRECT_STATUSES or not location:
                        body.read_head(answer)
                        await self._read_body(parts, body, silence)
                        return await body.finish()
                url = check_redirect(url, location, http_allowed=self._http_allowed)
                silence.deadline = anyio.current_time() + self._silence_s
            raise NoUsableBody(f"{printable_link(link)}: more than {MAX_REDIRECTS} redirects")
        raise _Interrupted(f"{body.shown}: no byte came for {self._silence_s:g} s", silent=True)

    @asynccontextmanager
    async def _answer(
        self, url: httpx.URL, body: _DownloadBody
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
        headers = dict(self._headers)
        if body.resumable is not None:
            headers |= body.resumable.range_headers(body.size_bytes)
        try:
            await self._resolver.check_url(url, by_connector=self._checks_itself(url))
            answer = await self._transport.handle_async_request(
                httpx.Request("GET", url, headers=headers, extensions={"timeout": self._timeout})
            )
        except KreaError:
            raise
        except Exception as error:
            raise _broken_off(url, error) from error
        async with raw_body(answer) as parts:
            yield answer, parts

    async def _read_body(
        self, parts: AsyncIterator[bytes], body: _DownloadBody, silence: anyio.CancelScope
    ) -> None:
        """Read a body to its end. Time that the sink takes does not count as silence."""
        window = RateWindow(self._monotonic())
        renewed_at_s = -math.inf
        while True:
            began_at_s = self._monotonic()
            if began_at_s - renewed_at_s > _LATE * self._silence_s:
                renewed_at_s = began_at_s
                silence.deadline = anyio.current_time() + (1 + _LATE) * self._silence_s
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                silence.deadline = math.inf
                return
            except Exception as error:
                silence.deadline = math.inf
                silent = isinstance(error, httpx.ReadTimeout)
                raise _Interrupted(f"{body.shown}: {_describe(error)}", silent=silent) from error
            came_at_s = self._monotonic()
            window = window.add(len(part))
            waited = False
            for waiting in body.add(part):
                waited, renewed_at_s, silence.deadline = True, -math.inf, math.inf
                await waiting
            if body.is_complete:
                continue
            if window.is_over(came_at_s, self._silence_s):
                if window.is_too_slow(came_at_s):
                    raise _TooSlow(
                        f"{body.shown}: fewer than {MIN_BYTES_PER_S} bytes a second came over "
                        f"{came_at_s - window.since_s:.3g} s"
                    )
                window = RateWindow(came_at_s)
            if waited:
                window = window.pause(self._monotonic() - came_at_s)


class _DownloadBody:
    """The received part of a file: counted, hashed, and written in pieces of 64 KiB or more.

    ``link`` is where it comes from, also after a redirect. ``resumable`` is None if the download
    cannot be resumed.
    """

    def __init__(self, write: Callable[[bytes], object], max_bytes: int) -> None:
        self.link = ""
        self.size_bytes = 0
        self.resumable: ResumableFile | None = None
        self._expected_bytes: int | None = None
        self._media_type = ""
        self._decompressor = Decompressor("")
        self._digest = hashlib.sha256()
        self._write = write
        self._max_bytes = max_bytes
        self._buffer: list[bytes] = []
        self._buffered_bytes = 0

    def read_head(self, answer: httpx.Response) -> None:
        """Check that the answer has a usable body, or its rest. Raises DownloadError."""
        if answer.status_code in _DEAD_STATUSES:
            raise LinkExpired(f"{self.shown}: status {answer.status_code}")
        headers = dict(answer.headers.items())  # lower-case, and quicker to search
        if self.resumable is not None:
            self._expected_bytes = self.resumable.resumed_size(
                answer.status_code, headers, self.size_bytes
            )
            if self._expected_bytes is None:
                raise NoUsableBody(
                    f"{self.shown}: broke off after {self.size_bytes} bytes, and the host does not"
                    f" resume there (status {answer.status_code})"
                )
        elif answer.status_code == _OK:
            self.resumable = resumable_file(headers)
            self._expected_bytes = None if is_encoded(headers) else content_length(headers)
            self._media_type = headers.get("content-type", "").partition(";")[0]
            try:
                self._decompressor = Decompressor(headers.get("content-encoding", ""))
            except ValueError as error:
                raise NoUsableBody(f"{self.shown}: {error}") from None
        else:
            raise NoUsableBody(f"{self.shown}: status {answer.status_code}")
        longest = max(self._expected_bytes or 0, content_length(headers) or 0)
        if longest > self._max_bytes:
            raise NoUsableBody(
                f"{self.shown}: {longest} bytes, which is more than {self._max_bytes}"
            )

    @property
    def shown(self) -> str:
        """The link for a message."""
        return printable_link(self.link)

    @property
    def is_complete(self) -> bool:
        """Whether all announced bytes have come."""
        return self._expected_bytes is not None and self.size_bytes >= self._expected_bytes

    def add(self, part: bytes) -> Iterator[Awaitable[object]]:
        """Take the next part as it was received; yields what must be awaited before the next."""
        for piece in self._decompress(part):
            self.size_bytes += len(piece)
            if self.size_bytes > self._max_bytes:
                raise NoUsableBody(f"{self.shown}: longer than {self._max_bytes} bytes")
            self._buffer.append(piece)
            self._buffered_bytes += len(piece)
            if self._buffered_bytes >= CHUNK_BYTES:
                yield from self._flush()

    def _decompress(self, part: bytes) -> Iterator[bytes]:
        try:
            yield from self._decompressor.feed(part)
        except ValueError as error:
            raise NoUsableBody(f"{self.shown}: {error}") from None

    async def finish(self) -> Download:
        """Write the rest and return the download. Raise if something is missing."""
        if self._expected_bytes is not None and self.size_bytes != self._expected_bytes:
            raise _Interrupted(
                f"{self.shown}: ended after {self.size_bytes} of {self._expected_bytes} bytes"
            )
        if not self.size_bytes:
            raise NoUsableBody(f"{self.shown}: the body is empty")
        if not self._decompressor.finished:
            raise NoUsableBody(f"{self.shown}: the compressed body is cut off")
        for waiting in self._flush():
            await waiting
        return Download(
            size_bytes=self.size_bytes,
            sha256=self._digest.hexdigest(),
            content_type=safe_text(self._media_type, max_chars=100).lower(),
            url=self.link,
        )

    def _flush(self) -> Iterator[Awaitable[object]]:
        if not self._buffer:
            return
        data = self._buffer[0] if len(self._buffer) == 1 else b"".join(self._buffer)
        self._buffer.clear()
        self._buffered_bytes = 0
        self._digest.update(data)
        done = self._write(data)
        if done is not None and isinstance(done, Awaitable):
            yield done


def _broken_off(url: httpx.URL, error: Exception) -> _Interrupted:
    shown = printable_link(str(url))
    if isinstance(error, UNSENT):
        return _Interrupted(f"{shown}: {safe_text(describe_connect_error(error, url.host))}")
    return _Interrupted(f"{shown}: {_describe(error)}", silent=isinstance(error, httpx.ReadTimeout))


def _describe(error: Exception) -> str:
    detail = safe_text(str(error), max_chars=200)
    return f"{type(error).__name__}{': ' + detail if detail else ''}"

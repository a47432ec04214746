"""Fetches one file from a host that is not trusted, to a sink, with every bound enforced.

What is bounded: the addresses that are connected to, redirects, bytes (also of a compressed
body), silence, and how slowly a body may come. No credentials, no cookies and no API key go there.
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
from krea_dagster.api.links import MAX_REDIRECTS, check_link, check_redirect, printable_link
from krea_dagster.api.ranges import ResumableFile, content_length, is_encoded, resumable_file
from krea_dagster.api.resolver import CheckedResolver
from krea_dagster.api.throughput import MIN_BYTES_PER_S, DownloadLimit, RateWindow
from krea_dagster.api.transport import UNSENT, raw_body
from krea_dagster.api.wire import safe_text
from krea_dagster.errors import KreaError, LinkDead, NoUsableBody

#: How often one download goes on where it broke off, each time with some bytes more.
CONTINUED_MAX: Final = 5

_OK: Final = 200
_DEAD_STATUSES: Final = frozenset({403, 404, 410})
_REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})


class Sink(Protocol):
    """Where the bytes go: anything with ``write``, such as a file opened for binary writing."""

    def write(self, data: bytes, /) -> object:
        """Takes the next piece."""


@dataclass(frozen=True)
class Download:
    """A whole body that went to the sink.

    ``size_bytes`` and ``sha256`` (hex) are those of what the sink got. ``content_type`` is the
    header's media type in lower case, without parameters, "" where there was none: a hint, not
    a fact. ``url`` is where the body came from after redirects, with its query.
    """

    size_bytes: int
    sha256: str
    content_type: str
    url: str


class _Interrupted(Exception):
    """No answer, or a body that ended before it was whole. ``silent``: for want of any byte."""

    def __init__(self, trouble: str, *, silent: bool = False) -> None:
        super().__init__(trouble)
        self.silent = silent


class _TooSlow(Exception):
    """A body that comes so slowly that it would never be whole."""


class FileDownloader:
    """Fetches result links, by the rules of :mod:`krea_dagster.api.links`.

    It uses the transport itself and no ``httpx.AsyncClient``, because that writes the whole URL of
    every request to the log, and the query of a result link is a credential.

    Args:
        transport: follows no redirects.
        addresses: what a link may lead to.
        checks_itself: whether the transport connects to checked addresses only, for this URL.
            Where it does not, as behind a proxy, what this machine can tell is checked before.
        http_allowed: whether a link may be http.
        user_agent: sent to the file host; an unknown one may get a 403.
        timeout: of each request, as httpx's transports read it.
        silence_s: the longest time without a byte, and over which the speed is judged.
        most: downloads at once.
        monotonic: seconds that never go back.
    """

    def __init__(
        self,
        transport: httpx.AsyncBaseTransport,
        *,
        addresses: CheckedResolver,
        checks_itself: Callable[[httpx.URL], bool],
        http_allowed: bool,
        user_agent: str,
        timeout: dict[str, float | None],
        silence_s: float,
        most: int,
        monotonic: Callable[[], float],
    ) -> None:
        self._transport = transport
        self._addresses = addresses
        self._checks_itself = checks_itself
        self._http_allowed = http_allowed
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        }
        self._timeout = timeout
        self._silence_s = silence_s
        self._at_once = DownloadLimit(most, most)
        self._places = anyio.CapacityLimiter(most)
        self._monotonic = monotonic

    @property
    def at_once(self) -> int:
        """How many downloads run at once now."""
        return self._at_once.number

    async def fetch(
        self, link: str, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Fetches one link to a sink, in pieces of 64 KiB or more and a last, shorter one.

        Where the sink returns something to wait for, it is waited for before the next piece is
        read. After an error the sink holds the beginning of a body, or nothing: throw it away. What
        the sink raises is passed on as it is.

        Raises:
            LinkRefused: the link, a redirect, or an address is not allowed.
            LinkDead: 403, 404 or 410.
            NoUsableBody: another status, no answer, a body that is empty, truncated, longer
                than ``max_bytes`` or unreadably packed, too many redirects, silence, or a body
                that comes too slowly.
        """
        write = sink if callable(sink) else sink.write
        async with self._places:
            began_at_s = self._monotonic()
            body = _DownloadBody(write, max_bytes)
            for _ in range(1 + CONTINUED_MAX):
                had_bytes = body.size_bytes
                try:
                    done = await self._receive(link, body)
                except _TooSlow as error:
                    self._set_places(self._at_once.slow(began_at_s, self._monotonic()))
                    raise NoUsableBody(str(error)) from None
                except _Interrupted as error:
                    if error.silent:
                        self._set_places(self._at_once.slow(began_at_s, self._monotonic()))
                    if body.whole is None or body.size_bytes == had_bytes:
                        raise NoUsableBody(str(error)) from None
                    trouble = str(error)
                else:
                    self._set_places(self._at_once.well())
                    return done
        raise NoUsableBody(f"{trouble}, for the {1 + CONTINUED_MAX}th time")

    def _set_places(self, at_once: DownloadLimit) -> None:
        if at_once.number != self._at_once.number:
            self._places.total_tokens = at_once.number
        self._at_once = at_once

    async def _receive(self, link: str, body: _DownloadBody) -> Download:
        """Fetch a link, from where the body broke off if it has begun."""
        shown = printable_link(link)
        with anyio.CancelScope(deadline=anyio.current_time() + self._silence_s) as silence:
            url = check_link(link, http_allowed=self._http_allowed)
            for _ in range(MAX_REDIRECTS + 1):
                async with self._answer(url, body) as (answer, parts):
                    shown = printable_link(str(url))
                    location = answer.headers.get("Location", "")
                    if answer.status_code not in _REDIRECT_STATUSES or not location:
                        body.take_head(shown, answer)
                        await self._take(shown, parts, body, silence)
                        return await body.ended(url, shown)
                url = check_redirect(url, location, http_allowed=self._http_allowed)
                silence.deadline = anyio.current_time() + self._silence_s
            raise NoUsableBody(f"{printable_link(link)}: more than {MAX_REDIRECTS} redirects")
        raise _Interrupted(f"{shown}: no byte came for {self._silence_s:g} s", silent=True)

    @asynccontextmanager
    async def _answer(
        self, url: httpx.URL, body: _DownloadBody
    ) -> AsyncIterator[tuple[httpx.Response, AsyncIterator[bytes]]]:
        headers = dict(self._headers)
        if body.whole is not None:
            headers |= body.whole.request_rest(body.size_bytes)
        try:
            await self._addresses.check_url(url, by_connector=self._checks_itself(url))
            answer = await self._transport.handle_async_request(
                httpx.Request("GET", url, headers=headers, extensions={"timeout": self._timeout})
            )
        except KreaError:
            raise
        except Exception as error:
            raise _broken_off(url, error) from error
        async with raw_body(answer) as parts:
            yield answer, parts

    async def _take(
        self,
        shown: str,
        parts: AsyncIterator[bytes],
        body: _DownloadBody,
        silence: anyio.CancelScope,
    ) -> None:
        """Take a body to its end. What the sink takes its time for is no silence of the host."""
        span = RateWindow(self._monotonic())
        while True:
            silence.deadline = anyio.current_time() + self._silence_s
            try:
                part = await anext(parts)
            except StopAsyncIteration:
                return
            except Exception as error:
                silent = isinstance(error, httpx.ReadTimeout)
                raise _Interrupted(f"{shown}: {_described(error)}", silent=silent) from error
            finally:
                silence.deadline = math.inf
            came_at_s = self._monotonic()
            span = span.add(len(part))
            await body.add(part, shown)
            if body.is_whole:
                continue
            if span.is_over(came_at_s, self._silence_s):
                if span.is_crawling(came_at_s):
                    raise _TooSlow(
                        f"{shown}: fewer than {MIN_BYTES_PER_S} bytes a second came over "
                        f"{came_at_s - span.since_s:.3g} s"
                    )
                span = RateWindow(came_at_s)
            span = span.pause(self._monotonic() - came_at_s)


class _DownloadBody:
    """What has come of one file, counted, hashed, and written in pieces of 64 KiB or more.

    ``whole`` is what the host said of the file, None where it cannot go on where it broke off.
    """

    def __init__(self, write: Callable[[bytes], object], max_bytes: int) -> None:
        self.size_bytes = 0
        self.whole: ResumableFile | None = None
        self._promised_bytes: int | None = None
        self._media_type = ""
        self._unpacker = Decompressor("")
        self._digest = hashlib.sha256()
        self._write = write
        self._max_bytes = max_bytes
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def take_head(self, shown: str, answer: httpx.Response) -> None:
        """Look at the answer, whether its body is one, or the rest of one, that can be taken."""
        if answer.status_code in _DEAD_STATUSES:
            raise LinkDead(f"{shown}: status {answer.status_code}")
        headers = answer.headers
        if self.whole is not None:
            self._promised_bytes = self.whole.size_if_continued(
                answer.status_code, headers, self.size_bytes
            )
            if self._promised_bytes is None:
                raise NoUsableBody(
                    f"{shown}: broke off after {self.size_bytes} bytes, and the host does not go on"
                    f" there (status {answer.status_code})"
                )
        elif answer.status_code == _OK:
            self.whole = resumable_file(headers)
            self._promised_bytes = None if is_encoded(headers) else content_length(headers)
            self._media_type = headers.get("Content-Type", "").partition(";")[0]
            try:
                self._unpacker = Decompressor(headers.get("Content-Encoding", ""))
            except ValueError as error:
                raise NoUsableBody(f"{shown}: {error}") from None
        else:
            raise NoUsableBody(f"{shown}: status {answer.status_code}")
        longest = max(self._promised_bytes or 0, content_length(headers) or 0)
        if longest > self._max_bytes:
            raise NoUsableBody(f"{shown}: {longest} bytes, which is more than {self._max_bytes}")

    @property
    def is_whole(self) -> bool:
        """Whether as much has come as was promised."""
        return self._promised_bytes is not None and self.size_bytes >= self._promised_bytes

    async def add(self, part: bytes, shown: str) -> None:
        """Take the next part as it came over the line."""
        for piece in self._unpacked(part, shown):
            self.size_bytes += len(piece)
            if self.size_bytes > self._max_bytes:
                raise NoUsableBody(f"{shown}: longer than {self._max_bytes} bytes")
            self._waiting.append(piece)
            self._waiting_bytes += len(piece)
            if self._waiting_bytes >= CHUNK_BYTES:
                await self._flush()

    def _unpacked(self, part: bytes, shown: str) -> Iterator[bytes]:
        try:
            yield from self._unpacker.pieces(part)
        except ValueError as error:
            raise NoUsableBody(f"{shown}: {error}") from None

    async def ended(self, url: httpx.URL, shown: str) -> Download:
        """Write the rest, and return what was taken. Raises where something is missing."""
        if self._promised_bytes is not None and self.size_bytes != self._promised_bytes:
            raise _Interrupted(
                f"{shown}: ended after {self.size_bytes} of {self._promised_bytes} bytes"
            )
        if not self.size_bytes:
            raise NoUsableBody(f"{shown}: the body is empty")
        if not self._unpacker.ended:
            raise NoUsableBody(f"{shown}: the packed body is cut off")
        await self._flush()
        return Download(
            size_bytes=self.size_bytes,
            sha256=self._digest.hexdigest(),
            content_type=safe_text(self._media_type, max_chars=100).lower(),
            url=str(url),
        )

    async def _flush(self) -> None:
        if not self._waiting:
            return
        data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self._digest.update(data)
        done = self._write(data)
        if isinstance(done, Awaitable):
            await done


def _broken_off(url: httpx.URL, error: Exception) -> _Interrupted:
    shown = printable_link(str(url))
    if isinstance(error, UNSENT):
        return _Interrupted(f"{shown}: {safe_text(describe_connect_error(error, url.host))}")
    return _Interrupted(
        f"{shown}: {_described(error)}", silent=isinstance(error, httpx.ReadTimeout)
    )


def _described(error: Exception) -> str:
    detail = safe_text(str(error), max_chars=200)
    return f"{type(error).__name__}{': ' + detail if detail else ''}"

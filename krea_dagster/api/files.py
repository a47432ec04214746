"""Fetches one file from a host that is not trusted, to a sink, with every bound enforced.

What is bounded: the addresses that are connected to, redirects, bytes (also of a compressed
body), and the time that all of it takes. No credentials, no cookies and no API key go there.
"""

from __future__ import annotations

import hashlib
import socket
import ssl
import urllib.request
import zlib
from collections.abc import (
    AsyncGenerator,
    AsyncIterator,
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Sequence,
)
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Final, Protocol

import anyio
import httpcore
import httpx

from krea_dagster.api.links import (
    MAX_REDIRECTS,
    AddressKind,
    address_kind,
    check_addresses,
    check_link,
    check_redirect,
    is_address,
    printable,
)
from krea_dagster.api.wire import safe_text
from krea_dagster.errors import ConfigError, LinkDead, NoUsableBody

#: Names to addresses: host and port in, IP addresses out. Raises OSError where there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

#: How much is gathered before it goes to the sink, and most of what is unpacked at a time.
CHUNK_BYTES: Final = 64 * 1024

_DEAD_STATUSES: Final = frozenset({403, 404, 410})
_REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})
_PACKED: Final = frozenset({"gzip", "x-gzip", "deflate"})

# Everything by which httpcore says that there was no usable answer; it has no common base.
_NETWORK_ERRORS: Final = (
    httpcore.TimeoutException,
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.ProxyError,
    httpcore.UnsupportedProtocol,
    OSError,
)


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


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """The addresses of a host by the system's resolver, in its order of preference."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(entry[4][0] for entry in found))


class Unpacker:
    """Undoes a Content-Encoding piece by piece, so that a small body cannot fill the memory.

    Understands none, gzip and deflate. ``ended`` is false for a packed body that is cut off.

    Raises:
        ValueError: the encoding is another one, or (from ``pieces``) the data is not in it.
    """

    def __init__(self, encoding: str) -> None:
        name = encoding.strip().lower()
        if name not in ("", "identity") and name not in _PACKED:
            raise ValueError(f"the body is packed with {safe_text(name, max_chars=40)}")
        # 32 + 15: the largest window, and the header tells gzip from zlib.
        self._inflate = zlib.decompressobj(47) if name in _PACKED else None

    @property
    def ended(self) -> bool:
        """Whether nothing is missing at the end of a packed body."""
        return self._inflate is None or self._inflate.eof

    def pieces(self, data: bytes) -> Iterator[bytes]:
        """What the next data unpacks to, at most 64 KiB at a time where it was packed."""
        if self._inflate is None:
            yield data
            return
        try:
            while not self._inflate.eof:
                piece = self._inflate.decompress(data, CHUNK_BYTES)
                data = self._inflate.unconsumed_tail
                if piece:
                    yield piece
                if not data and len(piece) < CHUNK_BYTES:
                    return
        except zlib.error as error:
            raise ValueError(f"the packed body is damaged: {error}") from None


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects only to addresses that were checked, and to exactly those.

    The check is part of connecting, so that a name cannot be answered differently between the
    two, and a connection that is reused is one that was checked. TLS still verifies the name.
    """

    def __init__(self, addresses_of: Callable[[str, int], Awaitable[Sequence[str]]]) -> None:
        self._addresses_of = addresses_of
        self._inner = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - the signature is httpcore's
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        addresses = await self._addresses_of(host, port)
        share = timeout / len(addresses) if timeout is not None and addresses else timeout
        failures: list[Exception] = []
        for address in addresses:
            try:
                return await self._inner.connect_tcp(
                    address, port, share, local_address, socket_options
                )
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                failures.append(error)
        if failures:
            raise failures[-1]
        raise httpcore.ConnectError("the host has no address")

    async def sleep(self, seconds: float) -> None:
        await anyio.sleep(seconds)


class FileHosts:
    """Fetches result links, by the rules of :mod:`krea_dagster.api.links`.

    Proxies of the environment (``HTTPS_PROXY``, ``NO_PROXY`` …) are used as they are for the
    API. A proxy is given the host's name and resolves it itself, so that the address cannot be
    pinned there. Then the check is what this machine can still do: addresses that are written
    out are checked, and so is a name if this machine can resolve it; what else the proxy may
    reach is for the proxy to decide.

    Args:
        base_url: the API's; it decides whether http and local addresses are allowed.
        ssl_context: for https.
        user_agent: sent to the file host; an unknown one may get a 403.
        read_timeout_s: the longest silence. connect_timeout_s: for DNS, TCP and TLS each.
        deadline_s: for the whole of one download, redirects included.
        max_connections: at a time, kept alive.
        resolve: names to addresses.

    Raises:
        ConfigError: a proxy of the environment cannot be used.
    """

    def __init__(
        self,
        base_url: httpx.URL,
        *,
        ssl_context: ssl.SSLContext,
        user_agent: str,
        read_timeout_s: float,
        connect_timeout_s: float,
        deadline_s: float,
        max_connections: int,
        resolve: Resolve,
    ) -> None:
        self._base_host = base_url.host
        self._base_port = base_url.port or (80 if base_url.scheme == "http" else 443)
        self._http_allowed = base_url.scheme == "http"
        self._base_kinds: frozenset[AddressKind] | None = None
        self._headers = [
            (b"User-Agent", user_agent.encode("ascii")),
            (b"Accept", b"*/*"),
            (b"Accept-Encoding", b"identity"),
        ]
        self._timeouts = {
            "connect": connect_timeout_s,
            "read": read_timeout_s,
            "write": read_timeout_s,
            "pool": deadline_s,
        }
        self._deadline_s = deadline_s
        self._resolve = resolve
        self._ssl_context = ssl_context
        self._max_connections = max_connections
        self._direct = httpcore.AsyncConnectionPool(
            ssl_context=ssl_context,
            max_connections=max_connections,
            max_keepalive_connections=max_connections,
            keepalive_expiry=5.0,
            network_backend=_CheckedBackend(self._checked_addresses),
        )
        proxies = urllib.request.getproxies()
        self._proxied = {
            scheme: self._proxy_pool(proxy_url)
            for scheme in ("http", "https")
            if (proxy_url := proxies.get(scheme) or proxies.get("all"))
        }

    async def aclose(self) -> None:
        """Closes the connections."""
        for pool in (self._direct, *self._proxied.values()):
            await pool.aclose()

    async def fetch(
        self, link: str, sink: Sink | Callable[[bytes], object], max_bytes: int
    ) -> Download:
        """Fetches one link to a sink, in pieces of 64 KiB and a last, shorter one.

        After an error the sink holds the beginning of a body, or nothing: throw it away. What
        the sink raises is passed on as it is.

        Raises:
            LinkRefused: the link, a redirect, or an address is not allowed.
            LinkDead: 403, 404 or 410.
            NoUsableBody: another status, no answer, a body that is empty, truncated, longer
                than ``max_bytes`` or unreadably packed, too many redirects, or out of time.
        """
        write = sink if callable(sink) else sink.write
        with anyio.move_on_after(self._deadline_s):
            return await self._follow(link, write, max_bytes)
        raise NoUsableBody(f"{printable(link)}: not done after {self._deadline_s:g} s")

    async def _follow(
        self, link: str, write: Callable[[bytes], object], max_bytes: int
    ) -> Download:
        url = check_link(link, http_allowed=self._http_allowed)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._answer(url) as answer:
                location = _header(answer, b"location")
                if answer.status not in _REDIRECT_STATUSES or not location:
                    return await self._receive(url, answer, write, max_bytes)
            url = check_redirect(url, location, http_allowed=self._http_allowed)
        raise NoUsableBody(f"{printable(link)}: more than {MAX_REDIRECTS} redirects")

    @asynccontextmanager
    async def _answer(self, url: httpx.URL) -> AsyncIterator[httpcore.Response]:
        pool = self._pool_for(url)
        if pool is not self._direct:
            await self._check_before_proxy(url)
        request = httpcore.Request(
            "GET",
            httpcore.URL(
                scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path
            ),
            headers=[(b"Host", url.netloc), *self._headers],
            extensions={"timeout": self._timeouts},
        )
        try:
            answer = await pool.handle_async_request(request)
        except _NETWORK_ERRORS as error:
            raise _unusable(url, error) from error
        try:
            yield answer
        finally:
            with suppress(*_NETWORK_ERRORS):  # what was read counts, not how the line ended
                await answer.aclose()

    async def _receive(
        self,
        url: httpx.URL,
        answer: httpcore.Response,
        write: Callable[[bytes], object],
        max_bytes: int,
    ) -> Download:
        shown = printable(str(url))
        if answer.status in _DEAD_STATUSES:
            raise LinkDead(f"{shown}: status {answer.status}")
        if answer.status != 200:
            raise NoUsableBody(f"{shown}: status {answer.status}")
        promised = _header(answer, b"content-length")
        if promised.isdecimal() and len(promised) < 20 and int(promised) > max_bytes:
            raise NoUsableBody(f"{shown}: {promised} bytes, which is more than {max_bytes}")
        try:
            unpacker = Unpacker(_header(answer, b"content-encoding"))
        except ValueError as error:
            raise NoUsableBody(f"{shown}: {error}") from None
        gathered = _Gathered(write)
        async with aclosing(_pieces(url, answer, unpacker)) as pieces:
            async for piece in pieces:
                if gathered.size_bytes + len(piece) > max_bytes:
                    raise NoUsableBody(f"{shown}: longer than {max_bytes} bytes")
                gathered.add(piece)
        if not gathered.size_bytes:
            raise NoUsableBody(f"{shown}: the body is empty")
        if not unpacker.ended:
            raise NoUsableBody(f"{shown}: the packed body is cut off")
        gathered.flush()
        media_type = _header(answer, b"content-type").partition(";")[0]
        return Download(
            size_bytes=gathered.size_bytes,
            sha256=gathered.digest.hexdigest(),
            content_type=safe_text(media_type, max_chars=100).lower(),
            url=str(url),
        )

    # -- where it may go ----------------------------------------------------------------------

    async def _checked_addresses(self, host: str, port: int) -> Sequence[str]:
        """All addresses of a host. LinkRefused where one is not allowed."""
        addresses = (host,) if is_address(host) else await self._lookup(host, port)
        if any(address_kind(address) is not AddressKind.PUBLIC for address in addresses):
            check_addresses(host, addresses, await self._kinds_of_base())
        return addresses

    async def _kinds_of_base(self) -> frozenset[AddressKind]:
        # Looked up only when a link is not public, and remembered once it was answered.
        if self._base_kinds is None:
            host = self._base_host
            if is_address(host):
                addresses: Sequence[str] = (host,)
            else:
                addresses = await self._lookup(host, self._base_port)
            self._base_kinds = frozenset(address_kind(address) for address in addresses)
        return self._base_kinds

    async def _lookup(self, host: str, port: int) -> Sequence[str]:
        with anyio.move_on_after(self._timeouts["connect"]):
            try:
                return await self._resolve(host, port)
            except (OSError, UnicodeError) as error:
                raise httpcore.ConnectError(f"no address for the host: {error}") from error
        raise httpcore.ConnectTimeout("the name was not resolved in time")

    # -- proxies ------------------------------------------------------------------------------

    def _pool_for(self, url: httpx.URL) -> httpcore.AsyncConnectionPool:
        pool = self._proxied.get(url.scheme)
        if pool is None or urllib.request.proxy_bypass(url.netloc.decode("ascii")):
            return self._direct
        return pool

    async def _check_before_proxy(self, url: httpx.URL) -> None:
        try:
            await self._checked_addresses(url.raw_host.decode("ascii"), _port(url))
        except (httpcore.ConnectError, httpcore.ConnectTimeout):
            return  # behind a proxy, names often resolve nowhere else

    def _proxy_pool(self, proxy_url: str) -> httpcore.AsyncConnectionPool:
        try:
            proxy = httpx.Proxy(proxy_url if "://" in proxy_url else f"http://{proxy_url}")
            return httpcore.AsyncConnectionPool(
                ssl_context=self._ssl_context,
                proxy=httpcore.Proxy(
                    url=httpcore.URL(
                        scheme=proxy.url.raw_scheme,
                        host=proxy.url.raw_host,
                        port=proxy.url.port,
                        target=b"/",
                    ),
                    auth=proxy.raw_auth,
                    ssl_context=proxy.ssl_context,
                ),
                max_connections=self._max_connections,
                max_keepalive_connections=self._max_connections,
                keepalive_expiry=5.0,
            )
        except (httpx.InvalidURL, ValueError):
            # The proxy's URL may hold a password, so it is not named.
            raise ConfigError("a proxy in the environment has a URL that cannot be used") from None


class _Gathered:
    """Counts and hashes what came, and writes it in pieces of 64 KiB or more."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.size_bytes = 0
        self.digest = hashlib.sha256()
        self._write = write
        self._waiting = bytearray()

    def add(self, piece: bytes) -> None:
        self.size_bytes += len(piece)
        self._waiting += piece
        if len(self._waiting) >= CHUNK_BYTES:
            self.flush()

    def flush(self) -> None:
        if self._waiting:
            data = bytes(self._waiting)
            self._waiting.clear()
            self.digest.update(data)
            self._write(data)


async def _pieces(
    url: httpx.URL, answer: httpcore.Response, unpacker: Unpacker
) -> AsyncGenerator[bytes, None]:
    try:
        async for data in answer.aiter_stream():
            for piece in unpacker.pieces(data):
                yield piece
    except _NETWORK_ERRORS as error:
        raise _unusable(url, error) from error
    except ValueError as error:
        raise NoUsableBody(f"{printable(str(url))}: {error}") from None


def _unusable(url: httpx.URL, error: Exception) -> NoUsableBody:
    detail = safe_text(str(error), max_chars=200)
    return NoUsableBody(
        f"{printable(str(url))}: {type(error).__name__}{': ' + detail if detail else ''}"
    )


def _header(answer: httpcore.Response, name: bytes) -> str:
    for key, value in answer.headers:
        if key.lower() == name:
            return value.decode("latin-1").strip()
    return ""


def _port(url: httpx.URL) -> int:
    return url.port or (80 if url.scheme == "http" else 443)

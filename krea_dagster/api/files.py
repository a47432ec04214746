"""Fetches one file from a host that is not trusted, to a sink, with every bound enforced.

What is bounded: the addresses that are connected to, redirects, bytes (also of a compressed
body), and the time that all of it takes. No credentials, no cookies and no API key go there.
"""

from __future__ import annotations

import asyncio
import hashlib
import socket
import ssl
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from typing import Any, Final, Protocol

import aiohttp
import aiohttp.abc
import anyio
import httpx
import yarl

from krea_dagster.api.exchange import Limits
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
from krea_dagster.api.proxies import Proxies, Proxy
from krea_dagster.api.unpack import CHUNK_BYTES, Unpacker
from krea_dagster.api.wire import safe_text
from krea_dagster.errors import LinkDead, LinkRefused, NoUsableBody

#: Names to addresses: host and port in, IP addresses out. Raises OSError where there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]

#: Connections that nobody has used for so long are closed.
_KEPT_S: Final = 5.0
#: How much of a body aiohttp reads ahead: half of what it buffers at most.
_READ_AHEAD_BYTES: Final = 128 * 1024

_DEAD_STATUSES: Final = frozenset({403, 404, 410})
_REDIRECT_STATUSES: Final = frozenset({301, 302, 303, 307, 308})

# Everything by which aiohttp says that there was no usable answer.
_NETWORK_ERRORS: Final = (aiohttp.ClientError, asyncio.TimeoutError, OSError)


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


class _CheckedResolver(aiohttp.abc.AbstractResolver):
    """Finds the addresses of a name, all of them checked."""

    def __init__(self, addresses_of: Callable[[str, int], Awaitable[Sequence[str]]]) -> None:
        self._addresses_of = addresses_of

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """The addresses, whatever their family. Raises OSError where there are none."""
        found = [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in await self._addresses_of(host, port)
            if family in (socket.AF_UNSPEC, socket.AF_INET6 if ":" in address else socket.AF_INET)
        ]
        if not found:
            raise OSError("the host has no address")
        return found

    async def close(self) -> None:
        """Nothing is held."""


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
        proxies: the environment's.
        user_agent: sent to the file host; an unknown one may get a 403.
        limits: of one download, redirects included.
        resolve: names to addresses.
    """

    def __init__(
        self,
        base_url: httpx.URL,
        *,
        ssl_context: ssl.SSLContext,
        proxies: Proxies,
        user_agent: str,
        limits: Limits,
        resolve: Resolve,
    ) -> None:
        self._base_host = base_url.host
        self._base_port = base_url.port or (80 if base_url.scheme == "http" else 443)
        self._http_allowed = base_url.scheme == "http"
        self._base_kinds: frozenset[AddressKind] | None = None
        self._headers = {
            "User-Agent": user_agent,
            "Accept": "*/*",
            "Accept-Encoding": "identity",
        }
        self._limits = limits
        self._places = asyncio.Semaphore(limits.connections)
        self._resolve = resolve
        self._ssl_context = ssl_context
        self._proxies = proxies
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Closes the connections."""
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()

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
                than ``max_bytes`` or unreadably packed, too many redirects, or out of time.
        """
        write = sink if callable(sink) else sink.write
        with anyio.move_on_after(self._limits.deadline_s):
            async with self._places:
                return await self._follow(link, write, max_bytes)
        raise NoUsableBody(f"{printable(link)}: not done after {self._limits.deadline_s:g} s")

    async def _follow(
        self, link: str, write: Callable[[bytes], object], max_bytes: int
    ) -> Download:
        url = check_link(link, http_allowed=self._http_allowed)
        for _ in range(MAX_REDIRECTS + 1):
            async with self._answer(url) as answer:
                location = answer.headers.get("Location", "")
                if answer.status not in _REDIRECT_STATUSES or not location:
                    return await self._receive(url, answer, write, max_bytes)
            url = check_redirect(url, location, http_allowed=self._http_allowed)
        raise NoUsableBody(f"{printable(link)}: more than {MAX_REDIRECTS} redirects")

    @asynccontextmanager
    async def _answer(self, url: httpx.URL) -> AsyncIterator[aiohttp.ClientResponse]:
        proxy = self._proxies.of(url)
        await self._check_before(url, proxy)
        session = self._session(proxy)
        target = yarl.URL(str(url), encoded=True)
        options = {} if proxy is None else proxy.options(target, {})
        try:
            answer = await session.request("GET", target, allow_redirects=False, **options)
        except _NETWORK_ERRORS as error:
            raise _unusable(url, error) from error
        try:
            yield answer
        finally:
            answer.close()  # closes nothing where the body was read to its end

    async def _receive(
        self,
        url: httpx.URL,
        answer: aiohttp.ClientResponse,
        write: Callable[[bytes], object],
        max_bytes: int,
    ) -> Download:
        if answer.status in _DEAD_STATUSES:
            raise LinkDead(f"{printable(str(url))}: status {answer.status}")
        if answer.status != 200:
            raise NoUsableBody(f"{printable(str(url))}: status {answer.status}")
        promised = answer.headers.get("Content-Length", "")
        if promised.isdecimal() and len(promised) < 20 and int(promised) > max_bytes:
            raise _too_long(url, f"{promised} bytes, which is more than {max_bytes}")
        try:
            unpacker = Unpacker(answer.headers.get("Content-Encoding", ""))
        except ValueError as error:
            raise NoUsableBody(f"{printable(str(url))}: {error}") from None
        gathered = _Gathered(write)
        async with aclosing(_pieces(url, answer, unpacker)) as pieces:
            async for piece in pieces:
                if gathered.size_bytes + len(piece) > max_bytes:
                    raise _too_long(url, f"longer than {max_bytes} bytes")
                if gathered.add(piece) >= CHUNK_BYTES:
                    await gathered.flush()
        if not gathered.size_bytes:
            raise NoUsableBody(f"{printable(str(url))}: the body is empty")
        if not unpacker.ended:
            raise NoUsableBody(f"{printable(str(url))}: the packed body is cut off")
        await gathered.flush()
        media_type = answer.headers.get("Content-Type", "").partition(";")[0]
        return Download(
            size_bytes=gathered.size_bytes,
            sha256=gathered.digest.hexdigest(),
            content_type=safe_text(media_type, max_chars=100).lower(),
            url=str(url),
        )

    def _session(self, proxy: Proxy | None) -> aiohttp.ClientSession:
        # Only here is an event loop certain to run.
        if proxy is not None:
            if self._proxied is None:
                connector = aiohttp.TCPConnector(
                    ssl=self._ssl_context, limit=0, keepalive_timeout=_KEPT_S
                )
                self._proxied = self._session_over(connector)
            return self._proxied
        if self._direct is None:
            connector = aiohttp.TCPConnector(
                ssl=self._ssl_context,
                limit=0,
                keepalive_timeout=_KEPT_S,
                resolver=_CheckedResolver(self._checked_addresses),
                use_dns_cache=False,
                socket_factory=self._checked_socket,
            )
            self._direct = self._session_over(connector)
        return self._direct

    def _session_over(self, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
        limits = self._limits
        return aiohttp.ClientSession(
            connector=connector,
            headers=self._headers,
            timeout=aiohttp.ClientTimeout(
                total=None,  # the deadline is over all redirects
                connect=3 * limits.connect_s,  # the name, TCP and TLS
                sock_connect=2 * limits.connect_s,
                sock_read=limits.silence_s,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_AHEAD_BYTES,
        )

    # -- where it may go ----------------------------------------------------------------------

    def _checked_socket(self, wanted: Any) -> socket.socket:
        """A socket for an address that may be connected to.

        Addresses are checked before, where names are resolved and links are read. Here is the
        last place before the connection, and it is given the very address that is used.
        """
        family, kind, protocol, _, (address, *_) = wanted
        found = address_kind(address)
        allowed = found is AddressKind.PUBLIC or found in (self._base_kinds or ())
        if not allowed or found is AddressKind.NEVER:
            raise LinkRefused(f"{address} is an address that a result link may not lead to")
        return socket.socket(family, kind, protocol)

    async def _check_before(self, url: httpx.URL, proxy: Proxy | None) -> None:
        """Check what aiohttp would connect to without asking for an address, or leave to a proxy.

        It does so for hosts that look like addresses, among them 2130706433 and 127.1.
        """
        host = url.raw_host.decode("ascii")
        if proxy is None and not (":" in host or host.replace(".", "").isdigit()):
            return
        try:
            await self._checked_addresses(host, _port(url))
        except OSError as error:
            if proxy is None:
                raise _unusable(url, error) from error
            # Behind a proxy, names often resolve nowhere else.

    async def _checked_addresses(self, host: str, port: int) -> Sequence[str]:
        """All addresses of a host. LinkRefused where one is not allowed, OSError without any."""
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
        with anyio.move_on_after(self._limits.connect_s):
            try:
                return await self._resolve(host, port)
            except (OSError, UnicodeError) as error:
                raise OSError(f"no address for the host: {error}") from error
        raise OSError("the name was not resolved in time")


class _Gathered:
    """Counts and hashes what came, and writes it in pieces of 64 KiB or more."""

    def __init__(self, write: Callable[[bytes], object]) -> None:
        self.size_bytes = 0
        self.digest = hashlib.sha256()
        self._write = write
        self._waiting: list[bytes] = []
        self._waiting_bytes = 0

    def add(self, piece: bytes) -> int:
        """Take the next piece; returns how many bytes wait to be written."""
        self.size_bytes += len(piece)
        self._waiting.append(piece)
        self._waiting_bytes += len(piece)
        return self._waiting_bytes

    async def flush(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        data = self._waiting[0] if len(self._waiting) == 1 else b"".join(self._waiting)
        self._waiting.clear()
        self._waiting_bytes = 0
        self.digest.update(data)
        done = self._write(data)
        if isinstance(done, Awaitable):
            await done


async def _pieces(
    url: httpx.URL, answer: aiohttp.ClientResponse, unpacker: Unpacker
) -> AsyncGenerator[bytes, None]:
    try:
        while data := await answer.content.readany():
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


def _too_long(url: httpx.URL, how: str) -> NoUsableBody:
    return NoUsableBody(f"{printable(str(url))}: {how}")


def _port(url: httpx.URL) -> int:
    return url.port or (80 if url.scheme == "http" else 443)

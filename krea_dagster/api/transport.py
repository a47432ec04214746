"""The HTTP transport, on aiohttp: it says of each failure whether the request may have left.

aiohttp's exceptions do not tell that, and neither do those of the transports that put httpx's
names on them: a server that reads a purchase and closes in silence was seen to become a
"connect timeout". So nothing is read out of an exception. What is believed is where the request
was when it failed: while the connector had not yet handed out a connection, nothing of the
request can have been written. Everything else, and whatever a later version of aiohttp does in
another order, counts as sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from functools import lru_cache
from ssl import SSLContext
from typing import Any, ClassVar, Final

import aiohttp
import anyio
import httpx
import yarl

from krea_dagster.api.connect_errors import cause_of
from krea_dagster.api.proxies import Proxies, Proxy, Secret
from krea_dagster.errors import KreaError

#: Connections that nobody has used for so long are closed: servers close theirs without a word,
#: and a purchase that meets such a one has an unknown outcome.
KEPT_S: Final = 5.0
#: How much of a body aiohttp reads ahead: half of what it buffers at most.
_READ_AHEAD_BYTES: Final = 128 * 1024

#: What says that certainly no byte of the request has left.
UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
#: Set in a request's extensions where it was cancelled before a byte of it had left.
CANCELLED_UNSENT: Final = "cancelled_unsent"
#: httpx's own, which raise UNSENT only before the first byte of a request. Not their subclasses.
_HTTPX_OWN: Final = (httpx.AsyncHTTPTransport, httpx.MockTransport)

# aiohttp would write these itself where they are missing. All of them are the caller's to decide.
_NOT_ADDED: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
_SECRET_HEADERS: Final = (b"authorization", b"proxy-authorization")


def reports_unsent(transport: httpx.AsyncBaseTransport) -> bool:
    """Whether a transport raises UNSENT only where certainly no byte of the request has left.

    httpx's own do. Another one says so by a class attribute ``reports_unsent = True``.
    """
    return getattr(transport, "reports_unsent", type(transport) in _HTTPX_OWN) is True


@asynccontextmanager
async def raw_body(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """The body as it was sent, piece by piece. The response is closed at the end.

    ``Response.aiter_raw`` would do, if it took the answers of ``httpx.MockTransport``, which are
    read before they come.
    """
    parts = aiter(response.stream)  # type: ignore[arg-type]  # a transport for async gives no other
    try:
        yield parts
    finally:
        if hasattr(parts, "aclose"):
            await parts.aclose()
        await response.aclose()


class _SendState:
    """Where a request is on its way to a connection."""

    __slots__ = ("attempts", "connected", "connecting", "is_new", "repeatable")

    def __init__(self, *, repeatable: bool) -> None:
        self.attempts = 0
        self.connecting = False
        self.connected = False
        self.is_new = False
        self.repeatable = repeatable

    @property
    def unsent(self) -> bool:
        """Whether it has certainly never had a connection."""
        return self.connecting and not self.connected


_SEND_STATE: Final[ContextVar[_SendState | None]] = ContextVar("krea_request_way", default=None)


class _Connector(aiohttp.TCPConnector):
    """Notes when a request begins to wait for its connection, and when it has got one."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> Any:
        """Connect. Name resolution, TCP, TLS and a proxy's tunnel are all within."""
        way = _SEND_STATE.get()
        if way is None:
            return await super().connect(req, traces, timeout)
        way.attempts += 1
        if way.attempts > 1 and (way.is_new or not way.repeatable):
            # aiohttp sends some methods again where the server has closed the connection. A GET
            # may be, over one that was kept. Anything else is sent once, and the caller decides.
            raise aiohttp.ServerDisconnectedError
        way.connecting = True
        connection = await super().connect(req, traces, timeout)
        way.connecting, way.connected = False, True
        return connection

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> Any:
        """Open a connection, where none was kept."""
        way = _SEND_STATE.get()
        if way is not None:
            way.is_new = True
        return await super()._create_connection(req, traces, timeout)


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends each request once, by aiohttp. Use it in one event loop.

    Redirects are not followed, bodies are not unpacked, cookies and ``.netrc`` are not read. It
    raises ``httpx.ConnectError``, ``ConnectTimeout``, ``PoolTimeout`` and ``ProxyError`` only where
    certainly no byte of the request has left, and other errors of httpx for all else.

    Args:
        ssl_context: for https; httpx's default where none is given.
        proxies: those of the environment where none are given.
        max_connections: open at a time, and kept alive.
        connector: further options of the connector for hosts that no proxy is used for. What its
            resolver and its sockets raise of this package's errors is passed on as it is.
    """

    reports_unsent: ClassVar[bool] = True

    def __init__(
        self,
        *,
        ssl_context: SSLContext | None = None,
        proxies: Proxies | None = None,
        max_connections: int = 16,
        connector: Mapping[str, Any] | None = None,
    ) -> None:
        self._ssl_context = ssl_context or httpx.create_ssl_context()
        self._proxies = proxies or Proxies()
        self._places = asyncio.Semaphore(max_connections)
        self._connector = dict(connector or {})
        self._direct: aiohttp.ClientSession | None = None
        self._proxied: aiohttp.ClientSession | None = None

    async def aclose(self) -> None:
        """Close the connections."""
        for session in (self._direct, self._proxied):
            if session is not None:
                await session.close()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Send one request, and return its answer with the body still to be read."""
        timeouts = request.extensions.get("timeout", {})
        await self._take_place(request, timeouts.get("pool"))
        try:
            response = await self._send(request, timeouts)
        except BaseException:
            self._places.release()
            raise
        return httpx.Response(
            response.status,
            headers=list(response.raw_headers),
            stream=_ResponseBody(response, self._places),
        )

    async def _take_place(self, request: httpx.Request, longest_s: float | None) -> None:
        # Not the connector's own queue: its wait could not be told from connecting's.
        if not self._places.locked():
            await self._places.acquire()
            return
        try:
            with anyio.fail_after(longest_s):
                await self._places.acquire()
        except TimeoutError:
            raise httpx.PoolTimeout(f"no connection was free for {longest_s:g} s") from None
        except asyncio.CancelledError:
            request.extensions[CANCELLED_UNSENT] = True
            raise

    async def _send(
        self, request: httpx.Request, timeouts: Mapping[str, float | None]
    ) -> aiohttp.ClientResponse:
        content = await request.aread() or None
        headers = {
            name.decode("latin-1"): (Secret if name.lower() in _SECRET_HEADERS else str)(
                value.decode("latin-1")
            )
            for name, value in request.headers.raw
            if name.lower() != b"transfer-encoding"  # the content is sent whole
        }
        target = yarl.URL(str(request.url), encoded=True)
        proxy = self._proxies.of(request.url)
        options: dict[str, Any] = {"headers": headers}
        if proxy is not None:
            options = proxy.options(target, headers)
        way = _SendState(repeatable=request.method == "GET")
        token = _SEND_STATE.set(way)
        try:
            return await self._session(proxy).request(
                request.method,
                target,
                data=content,
                allow_redirects=False,
                timeout=_aiohttp_timeout(timeouts.get("connect"), timeouts.get("read")),
                **options,
            )
        except KreaError:
            raise
        except asyncio.CancelledError:
            request.extensions[CANCELLED_UNSENT] = way.unsent
            raise
        except Exception as error:
            raise (_unsent(error, proxy) if way.unsent else _sent(error)) from error
        finally:
            _SEND_STATE.reset(token)

    def _session(self, proxy: Proxy | None) -> aiohttp.ClientSession:
        # Only here is an event loop certain to run.
        if proxy is not None:
            if self._proxied is None:
                self._proxied = self._open_session({})
            return self._proxied
        if self._direct is None:
            self._direct = self._open_session(self._connector)
        return self._direct

    def _open_session(self, options: Mapping[str, Any]) -> aiohttp.ClientSession:
        return aiohttp.ClientSession(
            connector=_Connector(
                ssl=self._ssl_context, limit=0, keepalive_timeout=KEPT_S, **options
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            trust_env=False,
            read_bufsize=_READ_AHEAD_BYTES,
            skip_auto_headers=_NOT_ADDED,
        )


class _ResponseBody(httpx.AsyncByteStream):
    """A body as it comes. Holds the request's place until it is closed."""

    def __init__(self, response: aiohttp.ClientResponse, places: asyncio.Semaphore) -> None:
        self._response = response
        self._places: asyncio.Semaphore | None = places

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self

    async def __anext__(self) -> bytes:
        try:
            data = await self._response.content.readany()
        except Exception as error:
            raise _sent(error) from error
        if not data:
            raise StopAsyncIteration
        return data

    async def aclose(self) -> None:
        """Close the connection, unless the body was read to its end: then it is kept."""
        self._response.close()
        if self._places is not None:
            self._places.release()
            self._places = None


@lru_cache(maxsize=16)
def _aiohttp_timeout(connect_s: float | None, read_s: float | None) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(
        total=None,  # the deadline is the caller's
        connect=None if connect_s is None else 3 * connect_s,  # the name, TCP and TLS
        sock_connect=None if connect_s is None else 2 * connect_s,
        sock_read=read_s,
    )


def _unsent(error: Exception, proxy: Proxy | None) -> httpx.TransportError:
    timed_out = isinstance(error, asyncio.TimeoutError)
    text = "no connection in time" if timed_out else _text(error)
    if proxy is not None and cause_of(error) != "certificate":
        return httpx.ProxyError(f"the proxy {proxy.url} could not be used: {text}")
    return httpx.ConnectTimeout(text) if timed_out else httpx.ConnectError(text)


def _sent(error: Exception) -> httpx.TransportError:
    text = _text(error)
    if isinstance(error, asyncio.TimeoutError):
        return httpx.ReadTimeout(text)
    if isinstance(error, aiohttp.ClientError) and not isinstance(error, OSError):
        return httpx.RemoteProtocolError(text)
    return httpx.ReadError(text)


def _text(error: Exception) -> str:
    detail = str(error)
    return f"{type(error).__name__}: {detail}" if detail else type(error).__name__

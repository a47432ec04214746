"""An HTTP transport on aiohttp that reports of each failure whether the request may have left.

aiohttp's exceptions do not tell that, and neither do those of other httpx transports on aiohttp:
a server that read a purchase and closed the connection was seen to become a "connect timeout". So
the exception does not count. What counts is the step at which the request failed: before the
connector has returned a connection, no byte of the request can have been written. Everything else
counts as sent, also if a later version of aiohttp changes the order of the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from contextvars import ContextVar
from dataclasses import dataclass
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

#: Idle connections are closed after this time: servers close theirs silently, and a purchase on
#: such a connection has an unknown outcome.
KEPT_S: Final = 5.0
#: How much of a body aiohttp reads ahead; it buffers at most twice as much.
_READ_AHEAD_BYTES: Final = 128 * 1024

#: The errors that mean that certainly no byte of the request has left.
UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)
#: Set in the extensions of a request that was cancelled before a byte of it had left.
CANCELLED_UNSENT: Final = "cancelled_unsent"
#: httpx's transports, which raise UNSENT only before the first byte. Their subclasses may not.
_HTTPX_OWN: Final = (httpx.AsyncHTTPTransport, httpx.MockTransport)

# aiohttp would add these headers if they are missing. The caller decides about all of them.
_NOT_ADDED: Final = ("User-Agent", "Accept", "Accept-Encoding", "Content-Type")
_SECRET_HEADERS: Final = (b"authorization", b"proxy-authorization")


def reports_unsent(transport: httpx.AsyncBaseTransport) -> bool:
    """Return whether a transport raises UNSENT only if certainly no byte has left.

    httpx's own do. Another one declares it by a class attribute ``reports_unsent = True``.
    """
    return getattr(transport, "reports_unsent", type(transport) in _HTTPX_OWN) is True


@asynccontextmanager
async def raw_body(response: httpx.Response) -> AsyncIterator[AsyncIterator[bytes]]:
    """Iterate over the body as it was sent. The response is closed at the end.

    ``Response.aiter_raw`` does not work with responses of ``httpx.MockTransport``, which are
    already read.
    """
    parts = aiter(response.stream)  # type: ignore[arg-type]  # a transport for async gives no other
    try:
        yield parts
    finally:
        if hasattr(parts, "aclose"):
            await parts.aclose()
        await response.aclose()


@dataclass(slots=True)
class _SendState:
    """The step at which a request is on its way to a connection."""

    repeatable: bool
    attempts: int = 0
    connecting: bool = False
    connected: bool = False
    is_new: bool = False

    @property
    def unsent(self) -> bool:
        """Whether the request has certainly never had a connection."""
        return self.connecting and not self.connected


_SEND_STATE: Final[ContextVar[_SendState | None]] = ContextVar("krea_send_state", default=None)


class _Connector(aiohttp.TCPConnector):
    """Records when a request starts to wait for a connection, and when it has one."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> Any:
        """Connect, with name resolution, TCP, TLS and a proxy's tunnel."""
        state = _SEND_STATE.get()
        if state is None:
            return await super().connect(req, traces, timeout)
        state.attempts += 1
        if state.attempts > 1 and (state.is_new or not state.repeatable):
            # aiohttp repeats some methods if the server has closed the connection. A GET may be
            # repeated if the connection was a kept one. Anything else is sent only once.
            raise aiohttp.ServerDisconnectedError
        state.connecting = True
        connection = await super().connect(req, traces, timeout)
        state.connecting, state.connected = False, True
        return connection

    async def _create_connection(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> Any:
        """Open a new connection."""
        state = _SEND_STATE.get()
        if state is not None:
            state.is_new = True
        return await super()._create_connection(req, traces, timeout)


class AiohttpTransport(httpx.AsyncBaseTransport):
    """Sends each request once, with aiohttp. Use it in one event loop.

    Redirects are not followed, bodies are not decompressed, cookies and ``.netrc`` are not read.
    It raises ``httpx.ConnectError``, ``ConnectTimeout``, ``PoolTimeout`` and ``ProxyError`` only if
    certainly no byte of the request has left, and other errors of httpx for all else.

    Args:
        ssl_context: for https; httpx's default if None.
        proxies: those of the environment if None.
        max_connections: the most open connections.
        connector: more options of aiohttp's connector for hosts without a proxy. Errors of this
            package that its resolver or sockets raise pass through.
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
        """Send one request and return its response with an unread body."""
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
        # Not the connector's own queue: waiting there would look like connecting.
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
            if name.lower() != b"transfer-encoding"  # the content is sent in one piece
        }
        target = yarl.URL(str(request.url), encoded=True)
        proxy = self._proxies.for_url(request.url)
        options: dict[str, Any] = {"headers": headers}
        if proxy is not None:
            options = proxy.options(target, headers)
        state = _SendState(repeatable=request.method == "GET")
        token = _SEND_STATE.set(state)
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
            request.extensions[CANCELLED_UNSENT] = state.unsent
            raise
        except Exception as error:
            raise (_unsent(error, proxy) if state.unsent else _sent(error)) from error
        finally:
            _SEND_STATE.reset(token)

    def _session(self, proxy: Proxy | None) -> aiohttp.ClientSession:
        # An event loop is certain to run only here.
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
    """The body of a response. It holds the request's place until it is closed."""

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
        """Close the connection, or keep it if the body was read to its end."""
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

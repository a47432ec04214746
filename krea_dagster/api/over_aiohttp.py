"""Sends requests by aiohttp, and knows of each whether it may have left.

aiohttp's exceptions do not tell that, and neither do those of the transports that put httpx's
names on them: a server that reads a purchase and closes in silence was seen to become a
"connect timeout". So nothing is read out of an exception. What is believed is where the request
was when it failed: while the connector had not yet handed out a connection, nothing of the
request can have been written. Everything else, and whatever a later version of aiohttp does in
another order, counts as sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from contextvars import ContextVar
from ssl import SSLContext
from typing import Any, Final

import aiohttp
import anyio
import yarl

from krea_dagster.api.exchange import (
    ANSWER_MAX_BYTES,
    Answer,
    Describe,
    Limits,
    NoAnswer,
    broken_off,
    unusable,
)
from krea_dagster.api.proxies import Proxy
from krea_dagster.api.unpack import Unpacker

#: Connections that nobody has used for so long are closed: servers close theirs without a word,
#: and a purchase that meets such a one has an unknown outcome.
KEPT_S: Final = 5.0


class _Way:
    """Where a request is: ``connecting`` while it has no connection yet."""

    __slots__ = ("attempts", "connecting")

    def __init__(self) -> None:
        self.attempts = 0
        self.connecting = False

    @property
    def unsent(self) -> bool:
        """Whether it has never had a connection."""
        return self.connecting and self.attempts == 1


_WAY: Final[ContextVar[_Way | None]] = ContextVar("krea_request_way", default=None)


class _Connector(aiohttp.TCPConnector):
    """Notes when a request begins to wait for its connection, and when it has got one."""

    async def connect(
        self,
        req: aiohttp.ClientRequest,
        traces: list[Any],
        timeout: aiohttp.ClientTimeout,  # noqa: ASYNC109 - the signature is aiohttp's
    ) -> Any:
        """Connect. Name resolution, TCP, TLS and a proxy's tunnel are all within."""
        way = _WAY.get()
        if way is None:
            return await super().connect(req, traces, timeout)
        way.attempts += 1
        if way.attempts > 1:
            # aiohttp would send a GET again where a kept connection turned out to be closed.
            # Here every request is sent once, and whoever asked decides what comes next.
            raise aiohttp.ServerDisconnectedError("the kept connection was closed")
        way.connecting = True
        connection = await super().connect(req, traces, timeout)
        way.connecting = False
        return connection


class AiohttpExchange:
    """The default way to the API's host. Use it in one event loop.

    Args:
        limits: of each exchange.
        headers: sent with every request.
        ssl_context: for https.
        proxy: goes by way of it, where given.
        describe: what an exception means, without the key.
    """

    def __init__(
        self,
        limits: Limits,
        headers: Mapping[str, str],
        *,
        ssl_context: SSLContext,
        proxy: Proxy | None,
        describe: Describe,
    ) -> None:
        self._limits = limits
        self._headers = dict(headers)
        self._ssl_context = ssl_context
        self._proxy = proxy
        self._describe = describe
        self._session: aiohttp.ClientSession | None = None
        self._places = asyncio.Semaphore(limits.connections)
        self.is_closed = False

    async def aclose(self) -> None:
        """Close the connections."""
        self.is_closed = True
        if self._session is not None:
            await self._session.close()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer | NoAnswer:
        """Send one request once. Returns every failure, and raises only a cancellation."""
        # Not the connector's own queue: its wait could not be told from connecting's.
        if self._places.locked():
            try:
                with anyio.fail_after(self._limits.silence_s):
                    await self._places.acquire()
            except TimeoutError:
                trouble = f"no connection was free for {self._limits.silence_s:g} s"
                return NoAnswer(unsent=True, trouble=f"no answer: {trouble}")
        else:
            await self._places.acquire()
        try:
            return await self._send(method, url, headers, content)
        finally:
            self._places.release()

    async def _send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer | NoAnswer:
        way = _Way()
        token = _WAY.set(way)
        response: aiohttp.ClientResponse | None = None
        target = yarl.URL(url, encoded=True)
        options: dict[str, Any] = {"headers": headers}
        if self._proxy is not None:
            options = self._proxy.options(target, headers)
        try:
            response = await self._open_session().request(
                method, target, data=content, allow_redirects=False, **options
            )
            return await _read_answer(response)
        except Exception as error:  # noqa: BLE001 - whatever it is, what was sent stays sent
            trouble = self._explained(error)
        finally:
            _WAY.reset(token)
            if response is not None:
                response.close()  # closes nothing where the connection was given back
        if response is not None:
            return broken_off(response.status, response.headers, trouble)
        return NoAnswer(way.unsent, f"no answer: {trouble}")

    def _explained(self, error: Exception) -> str:
        if type(error) is asyncio.TimeoutError:
            return f"not done after {self._limits.deadline_s:g} s"
        return self._describe(error)

    def _open_session(self) -> aiohttp.ClientSession:
        # Only here is an event loop certain to run.
        if self._session is None:
            limits = self._limits
            self._session = aiohttp.ClientSession(
                connector=_Connector(ssl=self._ssl_context, limit=0, keepalive_timeout=KEPT_S),
                headers=self._headers,
                timeout=aiohttp.ClientTimeout(
                    total=limits.deadline_s,
                    connect=3 * limits.connect_s,  # the name, TCP and TLS
                    sock_connect=2 * limits.connect_s,
                    sock_read=limits.silence_s,
                ),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                skip_auto_headers=("Content-Type",),
            )
        return self._session


async def _read_answer(response: aiohttp.ClientResponse) -> Answer:
    """The whole body, unpacked, up to the bound."""
    status, headers = response.status, response.headers
    body = bytearray()
    try:
        unpacker = Unpacker(headers.get("Content-Encoding", ""))
        while data := await response.content.readany():
            for piece in unpacker.pieces(data):
                body += piece
                if len(body) > ANSWER_MAX_BYTES:
                    trouble = f"the answer is longer than {ANSWER_MAX_BYTES} bytes"
                    return unusable(status, headers, trouble)
    except ValueError as error:
        return unusable(status, headers, str(error))
    if not unpacker.ended:
        return unusable(status, headers, "the packed answer is cut off")
    response.release()
    return Answer(status, headers, bytes(body), whole=True, trouble="")

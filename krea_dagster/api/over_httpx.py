"""Sends requests by an httpx transport that the caller brings.

What an exception means depends on the transport. Plain httpx raises ``ConnectError``,
``ConnectTimeout``, ``PoolTimeout`` and ``ProxyError`` only before the first byte of a request has
left. Other transports were measured to raise the same for a server that read the whole purchase
and then closed. So those exceptions are believed only where the caller vouches for them.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import aclosing
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Final

import anyio
import httpx

from krea_dagster.api.exchange import (
    ANSWER_MAX_BYTES,
    Answer,
    Describe,
    Limits,
    NoAnswer,
    broken_off,
    unusable,
)
from krea_dagster.api.unpack import Unpacker

# Plain httpx raises these before the first byte of the request has left, and never after.
_UNSENT: Final = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout, httpx.ProxyError)


class HttpxExchange:
    """The way to the API's host by a transport of the caller's.

    Args:
        limits: of each exchange.
        headers: sent with every request.
        transport: the caller's.
        believed: whether the transport's word that nothing has left is taken.
        describe: what an exception means, without the key.
    """

    def __init__(
        self,
        limits: Limits,
        headers: Mapping[str, str],
        *,
        transport: httpx.AsyncBaseTransport,
        believed: bool,
        describe: Describe,
    ) -> None:
        self._deadline_s = limits.deadline_s
        self._believed = believed
        self._describe = describe
        self._http = httpx.AsyncClient(
            timeout=httpx.Timeout(limits.silence_s, connect=limits.connect_s),
            headers=dict(headers),
            cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            follow_redirects=False,
            trust_env=False,
            transport=transport,
        )

    @property
    def is_closed(self) -> bool:
        """Whether it sends nothing any more."""
        return self._http.is_closed

    async def aclose(self) -> None:
        """Close the connections."""
        await self._http.aclose()

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer | NoAnswer:
        """Send one request once. Returns every failure, and raises only a cancellation."""
        request = self._http.build_request(method, url, content=content, headers=headers)
        response: httpx.Response | None = None
        answer: Answer | None = None
        trouble = f"not done after {self._deadline_s:g} s"
        unsent = False
        with anyio.move_on_after(self._deadline_s):
            try:
                response = await self._http.send(request, stream=True)
                try:
                    answer = await _read_answer(response)
                finally:
                    await response.aclose()
            except Exception as error:  # noqa: BLE001 - a transport may raise anything; what was sent stays sent
                trouble = self._describe(error)
                unsent = response is None and isinstance(error, _UNSENT)
        if answer is not None:
            return answer
        if response is not None:
            return broken_off(response.status_code, dict(response.headers), trouble)
        if unsent and not self._believed:
            doubt = "reported by a transport that is not trusted to know that nothing was sent"
            return NoAnswer(unsent=False, trouble=f"no answer: {trouble} ({doubt})")
        return NoAnswer(unsent, f"no answer: {trouble}")


async def _read_answer(response: httpx.Response) -> Answer:
    """The whole body, unpacked, up to the bound."""
    status, headers = response.status_code, dict(response.headers)
    body = bytearray()
    try:
        unpacker = Unpacker(response.headers.get("content-encoding", ""))
        async with aclosing(response.aiter_raw()) as parts:  # type: ignore[type-var]  # httpx says AsyncIterator; it is a generator
            async for part in parts:
                for piece in unpacker.pieces(part):
                    body += piece
                    if len(body) > ANSWER_MAX_BYTES:
                        trouble = f"the answer is longer than {ANSWER_MAX_BYTES} bytes"
                        return unusable(status, headers, trouble)
    except ValueError as error:
        return unusable(status, headers, str(error))
    if not unpacker.ended:
        return unusable(status, headers, "the packed answer is cut off")
    return Answer(status, headers, bytes(body), whole=True, trouble="")

"""Send a response, or do to the connection what a fault wants."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

#: Breaks the connection of an ASGI scope: "close", "reset" or "garbage".
BreakConnection = Callable[[Scope, str], None]

ENDLESS_PIECE_BYTES: Final = 64 * 1024


@dataclass
class Reply:
    """A response, and what happens to the connection.

    ``wire`` is "" for a whole response; "close", "reset" or "garbage" for none at all;
    "truncated" for half of the body under the full length; "endless" for a body without end.
    The response leaves ``delay_s`` seconds late.
    """

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    wire: str = ""

    @property
    def outcome(self) -> str:
        """The word under which the statistics count it."""
        return "dropped" if self.wire in ("close", "reset", "garbage") else str(self.status)


class ReplyResponse(Response):
    """Sends a reply, or breaks the connection."""

    def __init__(self, reply: Reply, break_connection: BreakConnection | None) -> None:
        super().__init__(reply.body, reply.status or 200, reply.headers, reply.content_type)
        self._reply = reply
        self._break_connection = break_connection

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send over one ASGI connection."""
        reply = self._reply
        if reply.delay_s > 0 and await _left_within(receive, reply.delay_s):
            return
        if reply.wire == "":
            await super().__call__(scope, receive, send)
        elif reply.wire == "truncated":
            await self._send_half(scope, receive, send)
        elif reply.wire == "endless":
            await self._send_endlessly(receive, send)
        else:
            await self._end(reply.wire, scope, receive)

    async def _end(self, how: str, scope: Scope, receive: Receive) -> None:
        if self._break_connection is None:
            raise ConnectionError(f"cannot {how} the connection: this server does not support it")
        self._break_connection(scope, how)
        await _left_within(receive, None)

    async def _send_half(self, scope: Scope, receive: Receive, send: Send) -> None:
        start = {"type": "http.response.start", "status": self.status_code}
        await send({**start, "headers": self.raw_headers})
        body = self._reply.body
        half = body[: len(body) // 2]
        await send({"type": "http.response.body", "body": half, "more_body": True})
        await self._end("close", scope, receive)

    async def _send_endlessly(self, receive: Receive, send: Send) -> None:
        headers = [(b"content-type", self._reply.content_type.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        piece = b"\x89PNG\r\n\x1a\n" + self._reply.body[8:]
        left = asyncio.ensure_future(_left_within(receive, None))
        try:
            while not left.done():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                piece = self._reply.body
                await asyncio.sleep(0)
        finally:
            left.cancel()


async def _left_within(receive: Receive, seconds: float | None) -> bool:
    """Wait at most ``seconds`` for the client to leave; return whether it has."""

    async def left() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    try:
        await asyncio.wait_for(left(), seconds)
    except asyncio.TimeoutError:
        return False
    return True

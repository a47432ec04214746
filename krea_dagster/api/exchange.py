"""Send one request to the API once, and return the answer or why there was none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import anyio
import httpx

from krea_dagster.api.connect_errors import cause_of, describe_connect_error
from krea_dagster.api.decompress import Decompressor
from krea_dagster.api.transport import CANCELLED_UNSENT, UNSENT, raw_body, reports_unsent
from krea_dagster.api.wire import RawAnswer
from krea_dagster.errors import Cause

#: The longest JSON answer that is read; a batch of 50 tasks has about 30 KB.
ANSWER_MAX_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class NoAnswer:
    """No status line came. ``unsent``: certainly no byte of the request has left.

    ``cause`` is why no connection was made, None if there was one or may have been.
    """

    unsent: bool
    trouble: str
    cause: Cause | None = None


async def send_once(
    transport: httpx.AsyncBaseTransport,
    request: httpx.Request,
    *,
    deadline_s: float,
    describe: Callable[[Exception], str],
) -> RawAnswer | NoAnswer:
    """Send one request once. Return every failure; raise only a cancellation.

    Args:
        transport: does not follow redirects.
        request: the request.
        deadline_s: seconds for the whole exchange, so that a slow trickle ends.
        describe: returns a line about an exception, without the key.
    """
    believed = reports_unsent(transport)
    response: httpx.Response | None = None
    answer: RawAnswer | None = None
    nothing = NoAnswer(unsent=False, trouble=f"no answer: not done after {deadline_s:g} s")
    trouble = f"not done after {deadline_s:g} s"
    with anyio.move_on_after(deadline_s) as scope:
        try:
            response = await transport.handle_async_request(request)
            answer = await _read_answer(response)
        except Exception as error:  # noqa: BLE001 - a transport may raise anything; what was sent may have been bought
            trouble = describe(error)
            nothing = _no_answer(error, request.url.host, trouble, believed=believed)
    if answer is not None:
        return answer
    if response is not None:
        return _unusable(response, f"the answer broke off: {trouble}")
    if scope.cancelled_caught and believed and request.extensions.get(CANCELLED_UNSENT):
        return NoAnswer(True, f"not sent: no connection after {deadline_s:g} s", "connection")
    return nothing


def _no_answer(error: Exception, host: str, described: str, *, believed: bool) -> NoAnswer:
    if not isinstance(error, UNSENT):
        return NoAnswer(unsent=False, trouble=f"no answer: {described}")
    if not believed:
        doubt = "reported by a transport that is not trusted to know that nothing was sent"
        return NoAnswer(unsent=False, trouble=f"no answer: {described} ({doubt})")
    return NoAnswer(True, f"not sent: {describe_connect_error(error, host)}", cause_of(error))


async def _read_answer(response: httpx.Response) -> RawAnswer:
    """Read the whole body, decompressed, up to the limit."""
    body = bytearray()
    async with raw_body(response) as parts:
        try:
            decompressor = Decompressor(response.headers.get("content-encoding", ""))
            async for part in parts:
                for piece in decompressor.feed(part):
                    body += piece
                    if len(body) > ANSWER_MAX_BYTES:
                        trouble = f"the answer is longer than {ANSWER_MAX_BYTES} bytes"
                        return _unusable(response, trouble)
        except ValueError as error:
            return _unusable(response, str(error))
    if not decompressor.finished:
        return _unusable(response, "the compressed answer is cut off")
    return RawAnswer(response.status_code, response.headers, bytes(body))


def _unusable(response: httpx.Response, trouble: str) -> RawAnswer:
    """Return an answer with a status and without a usable body."""
    return RawAnswer(response.status_code, response.headers, b"", whole=False, trouble=trouble)

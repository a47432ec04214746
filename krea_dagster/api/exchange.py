"""One request to the API, sent once: what was answered, or what is known of why nothing was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

import anyio
import httpx

from krea_dagster.api.connect_errors import cause_of, describe_connect_error
from krea_dagster.api.decompress import Decompressor
from krea_dagster.api.transport import CANCELLED_UNSENT, UNSENT, raw_body, reports_unsent
from krea_dagster.errors import Cause

#: The most that is read of a JSON answer; a batch of 50 tasks has about 30 KB.
ANSWER_MAX_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class RawAnswer:
    """What the server answered. ``whole`` is false where the body broke off or was too long.

    The server may have echoed the key, so the repr leaves out what it wrote.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    whole: bool
    trouble: str


@dataclass(frozen=True)
class NoAnswer:
    """No status line came. ``unsent``: certainly no byte of the request has left.

    ``cause`` says why no connection was made, None where there was one, or may have been.
    """

    unsent: bool
    trouble: str
    cause: Cause | None = None


async def exchange(
    transport: httpx.AsyncBaseTransport,
    request: httpx.Request,
    *,
    deadline_s: float,
    describe: Callable[[Exception], str],
) -> RawAnswer | NoAnswer:
    """Send one request once. Returns every failure, and raises only a cancellation.

    Args:
        transport: follows no redirects.
        request: what is sent.
        deadline_s: for all of it, so that a trickle ends.
        describe: what an exception means, without the key.
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
        except Exception as error:  # noqa: BLE001 - a transport may raise anything; what was sent stays sent
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
    """The whole body, unpacked, up to the bound."""
    body = bytearray()
    async with raw_body(response) as parts:
        try:
            unpacker = Decompressor(response.headers.get("content-encoding", ""))
            async for part in parts:
                for piece in unpacker.pieces(part):
                    body += piece
                    if len(body) > ANSWER_MAX_BYTES:
                        trouble = f"the answer is longer than {ANSWER_MAX_BYTES} bytes"
                        return _unusable(response, trouble)
        except ValueError as error:
            return _unusable(response, str(error))
    if not unpacker.ended:
        return _unusable(response, "the packed answer is cut off")
    return RawAnswer(response.status_code, response.headers, bytes(body), whole=True, trouble="")


def _unusable(response: httpx.Response, trouble: str) -> RawAnswer:
    """An answer whose status came, and whose body did not, or is not one that can be read."""
    return RawAnswer(response.status_code, response.headers, b"", whole=False, trouble=trouble)

"""Takes callbacks over HTTP and remembers which requests are worth asking about.

An ASGI application, to be mounted under any path of another one or served by the command. It
holds no state but the counts of its limits, so several may run behind one address.

What a call claims is never believed. Its path proves that the request was bought by this
deployment; its body may name a task, which is kept as a claim and read by nobody as a fact. So a
forged, repeated or late call costs one question to the API at most.

==========  =====================================================================================
204         the request is remembered, durably; also for a body that says nothing
404         the path was not made with the secret, or the journal does not know the request; why
            is not said
405         anything but POST
408         the body took longer than ``body_timeout_s``
413         the body is beyond ``max_body_bytes``; nothing was remembered
429         more calls from this client than the limits admit
503         the journal cannot be written now; EvoLink calls again after 1, 2 and 4 s
==========  =====================================================================================

Nothing of a body, and no path, is ever logged: whoever has read a path may send hints.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.to_thread
from starlette.types import Receive, Scope, Send

from krea_dagster.callbacks.batcher import CallbackBatcher, RecordCallbacks
from krea_dagster.callbacks.limits import RateLimiter, client_name
from krea_dagster.callbacks.urls import PathReader
from krea_dagster.errors import KreaError
from krea_dagster.models import is_task_id

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_S: Final = 10.0

#: A whole queue that ends at once, at a client that is one address (EvoLink's, or a proxy's).
RATE_PER_S: Final = 1000.0
BURST: Final = 5000.0

#: How long the answer to a load balancer holds: it asks without a secret, so anybody can.
HEALTH_FOR_S: Final = 1.0

_log = logging.getLogger(__name__)


class Receiver:
    """The ASGI application that takes callbacks. Use it in one event loop.

    Args:
        secret: that the addresses were made with.
        remember: writes calls durably, and returns the keys whose requests are known; for
            example that of ``engine.calls.CallbackLog``. It blocks, and is called in a thread, one
            batch at a time. Where it raises, the caller is answered 503.
        check: raises KreaError where ``remember`` could not work now; for the health endpoint.
        rate_per_s, burst: how many calls one client may make; calls with a wrong path are
            counted apart, so that they take nothing from the others of the same proxy.
        monotonic: seconds that never go back.

    Raises:
        ConfigError: the secret is too short.
    """

    def __init__(
        self,
        secret: str,
        remember: RecordCallbacks,
        *,
        check: Callable[[], object] = lambda: None,
        rate_per_s: float = RATE_PER_S,
        burst: float = BURST,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = PathReader(secret)
        self._calls = CallbackBatcher(remember)
        self._check = check
        self._limits = RateLimiter(rate_per_s, burst, monotonic=monotonic)
        self._max_body_bytes = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._monotonic = monotonic
        self._health = (0, 0.0)
        self._failing = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        if scope["type"] == "lifespan":
            await _lifespan(receive, send)
        elif scope["type"] == "http":
            status = await self._status(scope, receive)
            # A body that was not read to its end is not worth reading to keep the connection.
            declared = _declared_bytes(scope)
            unread = declared is None or declared > self._max_body_bytes
            ended = status in (200, 204, 503) or scope["method"] in ("GET", "HEAD")
            await _answer(send, status, close=status == 408 or (unread and not ended))
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _status(self, scope: Scope, receive: Receive) -> int:
        path, method = str(scope["path"]), scope["method"]
        if path.endswith("/health") and method in ("GET", "HEAD"):
            return await self._health_status()
        if method != "POST":
            return 405
        request_key = self._paths.request_key(path)
        client = scope.get("client")
        name = client_name(str(client[0])) if client else ""
        if not self._limits.admit(name if request_key else f"{name} without a secret"):
            return 429
        if request_key is None:
            return 404  # before a byte of the body is read
        return await self._take(request_key, scope, receive)

    async def _take(self, request_key: str, scope: Scope, receive: Receive) -> int:
        if (_declared_bytes(scope) or 0) > self._max_body_bytes:
            return 413
        try:
            with anyio.fail_after(self._body_timeout_s):
                body = await _read(receive, self._max_body_bytes)
        except TimeoutError:
            return 408
        if body is None:
            return 413
        try:
            known = await self._calls.add((request_key, claimed_task_id(body)))
        except KreaError as error:
            self._say_failing(error)
            return 503
        self._failing = False
        return 204 if known else 404

    def _say_failing(self, error: KreaError) -> None:
        if not self._failing:  # once, and not for each of a burst
            _log.error("callbacks cannot be remembered, and are answered with 503: %s", error)
        self._failing = True

    async def _health_status(self) -> int:
        status, until_s = self._health
        if status and self._monotonic() < until_s:
            return status
        try:
            await anyio.to_thread.run_sync(self._check)
        except KreaError as error:
            self._say_failing(error)
            status = 503
        else:
            status = 200
        self._health = (status, self._monotonic() + HEALTH_FOR_S)
        return status


def claimed_task_id(body: bytes) -> str | None:
    """The task id that a body claims, None where it names none that could be one. Pure."""
    try:
        said: Any = json.loads(body)
    except (ValueError, RecursionError):  # ValueError also covers bad UTF-8 and endless digits
        return None
    task_id = said.get("id") if isinstance(said, dict) else None
    return task_id if isinstance(task_id, str) and is_task_id(task_id) else None


async def _read(receive: Receive, most: int) -> bytes | None:
    """The body; None, and read no further, where it is longer than ``most`` bytes.

    One that ends early, because the client left, is a hint as good as a whole one.
    """
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(pieces)
        piece = message.get("body", b"")
        size += len(piece)
        if size > most:
            return None
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)


def _declared_bytes(scope: Scope) -> int | None:
    """The length of the body that the headers declare, None where they declare none."""
    for name, value in scope["headers"]:
        if name == b"content-length" and value.isdigit() and len(value) < 16:
            return int(value)
    return None


async def _answer(send: Send, status: int, *, close: bool) -> None:
    headers = [(b"content-length", b"0")] if status != 204 else []
    if status == 405:
        headers.append((b"allow", b"POST"))
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": b""})


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

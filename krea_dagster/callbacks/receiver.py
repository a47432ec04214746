"""Receive callbacks over HTTP and record which tasks should be read.

An ASGI application, to be mounted under any path of another one or served by the command. Its only
state are the counts of its limits, so several may run behind one address.

The content of a call is not trusted. Its path proves that this deployment bought the request; its
body may name a task, which is stored as a claim and not used as a fact. So a forged, repeated or
late call costs at most one read of the API.

==========  =====================================================================================
204         the call is recorded, durably; also with an empty or meaningless body
404         the path was not made with the secret, or the journal does not know the request (the
            response does not tell which)
405         anything but POST
408         the body took longer than ``body_timeout_s``
413         the body is longer than ``max_body_bytes``; nothing was recorded
429         more calls from this client than the limits allow
503         the journal cannot be written now; EvoLink calls again after 1, 2 and 4 s
==========  =====================================================================================

Bodies and paths are never logged: a reader of a path could send hints.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable
from typing import Any, Final

import anyio
import anyio.to_thread
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from krea_dagster.callbacks.batcher import CallbackBatcher, RecordCallbacks
from krea_dagster.callbacks.limits import RateLimiter, client_name
from krea_dagster.callbacks.urls import PathReader
from krea_dagster.errors import KreaError
from krea_dagster.models import is_task_id

MAX_BODY_BYTES: Final = 64 * 1024
BODY_TIMEOUT_S: Final = 10.0

#: Enough for a whole queue that ends at once, from one address (EvoLink's or a proxy's).
RATE_PER_S: Final = 1000.0
BURST: Final = 5000.0

#: How long a health status is cached: the endpoint needs no secret, so it may be flooded.
HEALTH_FOR_S: Final = 1.0

_log = logging.getLogger(__name__)


class Receiver:
    """The ASGI application that takes callbacks. Use it in one event loop.

    Args:
        secret: the secret of the addresses.
        record: records calls durably and returns the keys whose requests are known, such as
            ``CallbackLog.add``. It blocks, and is called in a thread, one batch at a time. If it
            raises KreaError, the response is 503.
        check: raises KreaError if ``record`` would fail now; for the health endpoint.
        rate_per_s: calls a second that one client may make. Calls with a wrong path are counted
            separately, so that they do not use up the limit of others behind the same proxy.
        burst: calls that one client may make at once.
        max_body_bytes: the longest body.
        body_timeout_s: the longest time in seconds to receive a body.
        monotonic: seconds of a clock that never goes back.

    Raises:
        ConfigError: the secret is too short.
    """

    def __init__(
        self,
        secret: str,
        record: RecordCallbacks,
        *,
        check: Callable[[], object] = lambda: None,
        rate_per_s: float = RATE_PER_S,
        burst: float = BURST,
        max_body_bytes: int = MAX_BODY_BYTES,
        body_timeout_s: float = BODY_TIMEOUT_S,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._paths = PathReader(secret)
        self._batcher = CallbackBatcher(record)
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
            request = Request(scope, receive)
            status = await self._status(request)
            headers = {"allow": "POST"} if status == 405 else {}
            if self._must_close(request, status):
                headers["connection"] = "close"
            await Response(status_code=status, headers=headers)(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    def _must_close(self, request: Request, status: int) -> bool:
        """Return whether to close the connection rather than to read the rest of the body."""
        declared = _declared_bytes(request)
        unread = declared is None or declared > self._max_body_bytes
        ended = status in (200, 204, 503) or request.method in ("GET", "HEAD")
        return status == 408 or (unread and not ended)

    async def _status(self, request: Request) -> int:
        path = str(request.scope["path"])
        if path.endswith("/health") and request.method in ("GET", "HEAD"):
            return await self._health_status()
        if request.method != "POST":
            return 405
        request_key = self._paths.request_key(path)
        name = client_name(request.client.host) if request.client else ""
        if not self._limits.admit(name if request_key else f"{name} without a secret"):
            return 429
        if request_key is None:
            return 404  # before a byte of the body is read
        return await self._record_call(request_key, request)

    async def _record_call(self, request_key: str, request: Request) -> int:
        if (_declared_bytes(request) or 0) > self._max_body_bytes:
            return 413
        try:
            with anyio.fail_after(self._body_timeout_s):
                body = await _read(request, self._max_body_bytes)
        except TimeoutError:
            return 408
        if body is None:
            return 413
        try:
            known = await self._batcher.add((request_key, claimed_task_id(body)))
        except KreaError as error:
            self._log_failure(error)
            return 503
        self._failing = False
        return 204 if known else 404

    def _log_failure(self, error: KreaError) -> None:
        if not self._failing:  # once, not for each call of a burst
            _log.error("callbacks cannot be recorded and get 503: %s", error)
        self._failing = True

    async def _health_status(self) -> int:
        status, until_s = self._health
        if status and self._monotonic() < until_s:
            return status
        try:
            await anyio.to_thread.run_sync(self._check)
        except KreaError as error:
            self._log_failure(error)
            status = 503
        else:
            status = 200
        self._health = (status, self._monotonic() + HEALTH_FOR_S)
        return status


def claimed_task_id(body: bytes) -> str | None:
    """Return the task id that a body claims, None if it has no possible one. Pure."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError):  # ValueError also covers bad UTF-8 and endless digits
        return None
    task_id = value.get("id") if isinstance(value, dict) else None
    return task_id if isinstance(task_id, str) and is_task_id(task_id) else None


async def _read(request: Request, most: int) -> bytes | None:
    """Return the body; None, and stop reading, if it is longer than ``most`` bytes.

    A body that is cut off because the client left is returned too: the call is a hint in any case.
    """
    body = bytearray()
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > most:
                return None
    except ClientDisconnect:
        pass
    return bytes(body)


def _declared_bytes(request: Request) -> int | None:
    """Return the ``Content-Length``, None if there is none."""
    text = request.headers.get("content-length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 16 else None


async def _lifespan(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return

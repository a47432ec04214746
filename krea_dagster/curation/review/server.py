"""Serves a review on this machine until it is stopped."""

from __future__ import annotations

import contextlib
import logging
import socket
from collections.abc import Callable
from typing import Final

import anyio
import uvicorn

from krea_dagster.curation.review.app import Review
from krea_dagster.curation.review.guard import RequestGuard
from krea_dagster.uvicorn_server import QuietServer

#: How long a stop waits for responses in progress, seconds.
_STOP_WITHIN_S: Final = 3

#: The names of this machine in a browser's address.
_NAMES: Final = ("127.0.0.1", "localhost")


def serve(
    review: Review,
    listener: socket.socket,
    token: str,
    *,
    on_ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve until SIGINT or SIGTERM; ``on_ready`` gets the page's address, which is a secret."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    port = listener.getsockname()[1]
    guard = RequestGuard(review.application(), token, [f"{name}:{port}" for name in _NAMES])
    server = QuietServer(
        guard,
        lambda: on_ready(f"http://127.0.0.1:{port}/{token}/"),
        http="h11",
        proxy_headers=False,
        timeout_keep_alive=120,
        timeout_graceful_shutdown=_STOP_WITHIN_S,
    )
    with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again once it has stopped
        anyio.run(_run, review, server, listener)


async def _run(review: Review, server: uvicorn.Server, listener: socket.socket) -> None:
    async with anyio.create_task_group() as group:
        group.start_soon(review.keep_up)
        await server.serve(sockets=[listener])
        group.cancel_scope.cancel()

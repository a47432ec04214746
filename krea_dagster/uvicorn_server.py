"""A quiet uvicorn server that reports when it accepts connections."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any

import uvicorn


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket. Raises OSError if the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    return socket.create_server((host, port), family=family)


class QuietServer(uvicorn.Server):
    """Serves an ASGI application, and calls ``on_ready`` once it accepts connections.

    Only errors are logged: not requests, because their paths are secrets, and not uvicorn's
    warnings, because strangers could fill a disk with them. ``settings`` are those of
    ``uvicorn.Config``.
    """

    def __init__(self, app: Any, on_ready: Callable[[], object], **settings: Any) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                ws="none",
                lifespan="off",
                log_config=None,
                log_level="error",
                access_log=False,
                server_header=False,
                **settings,
            )
        )
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

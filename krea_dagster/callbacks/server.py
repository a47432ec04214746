"""Serves the receiver by uvicorn until it is told to stop."""

from __future__ import annotations

import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import uvicorn

from krea_dagster.callbacks.connections import limited_protocol
from krea_dagster.callbacks.limits import ConnectionLimit
from krea_dagster.callbacks.receiver import Receiver

#: Connections at a time; uvicorn answers those beyond with 503, and EvoLink calls again.
MAX_CONNECTIONS: Final = 2000
#: Those of one client; beyond them they are closed. A whole queue may end at once, and EvoLink's
#: calls come from few addresses.
CLIENT_CONNECTIONS: Final = 1000
#: How long a client may take to send a request's headers.
REQUEST_WITHIN_S: Final = 10.0
#: EvoLink calls again after a second, so a connection that is silent for longer is of no use.
KEEP_ALIVE_S: Final = 30
#: How long a stop waits for answers under way.
STOP_WITHIN_S: Final = 5


class TlsFiles(NamedTuple):
    """Files in PEM form."""

    certificate: Path
    key: Path


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises OSError where the port is taken."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError:
        listener.close()
        raise
    return listener


def serve(
    receiver: Receiver,
    listener: socket.socket,
    *,
    tls: TlsFiles | None = None,
    trusted_proxies: Sequence[str] = (),
    client_connections: int = CLIENT_CONNECTIONS,
    request_within_s: float = REQUEST_WITHIN_S,
    on_ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve until SIGINT or SIGTERM; ``on_ready`` gets the address. Call it in the main thread.

    Trusted proxies may hold any number of connections.
    """
    connections = ConnectionLimit(client_connections, free=trusted_proxies)
    # Errors go to stderr. Requests are not logged, because their paths are secrets, nor is what
    # uvicorn warns of, because strangers could fill a disk with it.
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    config = uvicorn.Config(
        receiver,
        # httptools would be faster, but takes a path and headers of any length into memory.
        http=limited_protocol(connections, request_within_s),
        ws="none",
        lifespan="off",
        log_config=None,
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_WITHIN_S,
        ssl_certfile=None if tls is None else str(tls.certificate),
        ssl_keyfile=None if tls is None else str(tls.key),
    )
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    address = f"{'http' if tls is None else 'https'}://{shown}:{port}"
    ReadyServer(config, lambda: on_ready(address)).run(sockets=[listener])


class ReadyServer(uvicorn.Server):
    """A uvicorn server that calls ``on_ready`` once it accepts connections."""

    def __init__(self, config: uvicorn.Config, on_ready: Callable[[], object]) -> None:
        super().__init__(config)
        self._on_ready = on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to accept connections."""
        await super().startup(sockets)
        if self.started:
            self._on_ready()

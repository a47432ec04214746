"""Serve the receiver with uvicorn, with limits for the connections of each client."""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar, Final, NamedTuple

from uvicorn.protocols.http.h11_impl import H11Protocol

from krea_dagster.callbacks.limits import ConnectionLimit
from krea_dagster.callbacks.receiver import Receiver
from krea_dagster.uvicorn_server import QuietServer

#: Connections at a time; uvicorn answers more of them with 503, and EvoLink calls again.
MAX_CONNECTIONS: Final = 2000
#: Connections of one client; more are closed. A whole queue may end at once, and EvoLink's calls
#: come from few addresses.
CLIENT_CONNECTIONS: Final = 1000
#: How long a client may take to send a request's headers.
HEADER_TIMEOUT_S: Final = 10.0
#: EvoLink calls again within seconds, so a connection that is idle for longer is not used again.
KEEP_ALIVE_S: Final = 30
#: How long a stop waits for responses in progress.
STOP_WITHIN_S: Final = 5


class TlsFiles(NamedTuple):
    """Files in PEM form."""

    certificate: Path
    key: Path


def serve(
    receiver: Receiver,
    listener: socket.socket,
    *,
    tls: TlsFiles | None = None,
    trusted_proxies: Sequence[str] = (),
    client_connections: int = CLIENT_CONNECTIONS,
    header_timeout_s: float = HEADER_TIMEOUT_S,
    on_ready: Callable[[str], object] = lambda _: None,
) -> None:
    """Serve until SIGINT or SIGTERM; ``on_ready`` gets the address. Call it in the main thread.

    Trusted proxies may hold any number of connections.
    """
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s")
    host, port = listener.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    address = f"{'http' if tls is None else 'https'}://{shown}:{port}"
    limit = ConnectionLimit(client_connections, exempt=trusted_proxies)
    server = QuietServer(
        receiver,
        lambda: on_ready(address),
        # httptools would be faster, but reads a path and headers of any length into memory.
        http=limited_protocol(limit, header_timeout_s),
        proxy_headers=bool(trusted_proxies),
        forwarded_allow_ips=list(trusted_proxies),
        limit_concurrency=MAX_CONNECTIONS,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=STOP_WITHIN_S,
        ssl_certfile=None if tls is None else str(tls.certificate),
        ssl_keyfile=None if tls is None else str(tls.key),
    )
    server.run(sockets=[listener])


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol with ``limit`` and ``header_timeout_s``, which uvicorn lacks.

    The rate limit counts requests, so it does not see a client that opens connections and never
    ends the headers of a request.
    """

    limit: ClassVar[ConnectionLimit]
    header_timeout_s: ClassVar[float]

    _client_name: str | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Accept a connection, or close it if its client has too many."""
        super().connection_made(transport)
        self._client_name = self.limit.admit(str(self.client[0]) if self.client else "")
        if self._client_name is None:
            transport.abort()
        else:
            self._start_deadline()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop counting the connection."""
        super().connection_lost(exc)
        self._cancel_deadline()
        if self._client_name is not None:
            self.limit.leave(self._client_name)

    def data_received(self, data: bytes) -> None:
        """Parse data, with a time limit until the headers are complete."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._cancel_deadline()  # the receiver has a time limit for the body
        elif self._deadline is None:
            self._start_deadline()

    def _start_deadline(self) -> None:
        self._deadline = self.loop.call_later(self.header_timeout_s, self.transport.abort)

    def _cancel_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def limited_protocol(connections: ConnectionLimit, timeout_s: float) -> type[LimitedProtocol]:
    """Return a protocol class for uvicorn with these limits.

    A connection is closed if its client takes longer than ``timeout_s`` to its first byte, or from
    there to the end of a request's headers, also if it sends more after a response that ended
    the reading.
    """

    class Protocol(LimitedProtocol):
        limit = connections
        header_timeout_s = timeout_s

    return Protocol

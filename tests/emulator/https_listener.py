"""An HTTPS server on loopback that receives callbacks, with a certificate of a test CA."""

from __future__ import annotations

import contextlib
import json
import queue
import ssl
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import trustme


@dataclass(frozen=True)
class Arrived:
    """One received callback."""

    path: str
    body: bytes
    headers: dict[str, str]

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Listener:
    """``arrived`` holds the callbacks; ``statuses`` are returned in their order, then 204.

    While ``open`` is clear, responses wait.
    """

    url: str = ""
    arrived: queue.Queue[Arrived] = field(default_factory=queue.Queue)
    statuses: list[int] = field(default_factory=list)
    open: threading.Event = field(default_factory=threading.Event)

    def next(self) -> Arrived:
        """Wait for the next callback."""
        return self.arrived.get(timeout=60)


@contextlib.contextmanager
def listening(ca: trustme.CA, name: str = "localhost") -> Iterator[Listener]:
    """Listen on a free port of this machine, with a certificate for ``name``."""
    listener = Listener()
    listener.open.set()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["content-length"]))
            listener.arrived.put(Arrived(self.path, body, dict(self.headers)))
            listener.open.wait(60)
            status = listener.statuses.pop(0) if listener.statuses else 204
            with contextlib.suppress(OSError):  # the caller has left
                self.send_response(status)
                self.send_header("content-length", "0")
                self.end_headers()

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a caller that left
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    ca.issue_cert(name).configure_cert(context)
    server.socket = context.wrap_socket(
        server.socket, server_side=True, do_handshake_on_connect=False
    )
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    listener.url = f"https://localhost:{server.server_address[1]}"
    try:
        yield listener
    finally:
        listener.open.set()
        server.shutdown()
        server.server_close()
        thread.join()


def certificates(ca: trustme.CA, folder: Path) -> Path:
    """Write the CA's certificate to a file."""
    path = folder / "ca.pem"
    ca.cert_pem.write_to_path(path)
    return path

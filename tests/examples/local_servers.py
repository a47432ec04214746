"""A mail server and a webhook on this machine, which keep what they get."""

from __future__ import annotations

import email
import email.policy
import json
import socketserver
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from email.message import EmailMessage
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any


@contextmanager
def serving(server: socketserver.TCPServer) -> Iterator[tuple[str, list[Any]]]:
    """Run a server; yields its address and the list that its handler fills."""
    server.received = []  # type: ignore[attr-defined]  # for the handlers
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}", server.received  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Smtp(socketserver.StreamRequestHandler):
    """As much of SMTP as smtplib needs to deliver a message."""

    def handle(self) -> None:
        self._say("220 ready")
        while line := self.rfile.readline().decode().strip():
            verb = line.split(":")[0].split()[0].upper()
            if verb == "DATA":
                self._say("354 go on")
                self._keep()
            self._say("221 bye" if verb == "QUIT" else "250 ok")

    def _say(self, line: str) -> None:
        self.wfile.write(f"{line}\r\n".encode())

    def _keep(self) -> None:
        lines = []
        while (line := self.rfile.readline()) != b".\r\n":
            lines.append(line)
        message = email.message_from_bytes(b"".join(lines), policy=email.policy.default)
        self.server.received.append(message)  # type: ignore[attr-defined]


class _Webhook(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.received.append(json.loads(body))  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"ok": true}')

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@contextmanager
def mail_server() -> Iterator[tuple[str, list[EmailMessage]]]:
    with serving(socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Smtp)) as running:
        yield running


@contextmanager
def webhook() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    with serving(HTTPServer(("127.0.0.1", 0), _Webhook)) as (address, received):
        yield f"http://{address}/", received

"""An emulator that leaks the key in codes, types, names, values, headers and links.

It stands before the real one and changes its answers. What a prompt holds decides how:
``[refuse]`` is refused with the key in every field of the error, ``[link]`` has the key in the
first links of its task, and ``[fail]`` fails with the key in the task's error. It also serves a
file at ``/table.parquet``, to whoever asks.
"""

from __future__ import annotations

import base64
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

import httpx

from krea_dagster.emulator import Emulator

#: Answers about a task whose links hold the key, before an honest one comes.
BAD_LINKS: Final = 1


def forms_of(key: str) -> list[str]:
    """Return the key in forms in which a server may write it."""
    encoded = base64.b64encode(f"Bearer {key}".encode()).decode()
    return [key, key.upper(), f"Bearer {key}", encoded]


def error_of(key: str) -> dict[str, Any]:
    """Return an error that consists of the key."""
    said = " ".join(forms_of(key))
    return {
        "code": f"invalid_{key}",
        "type": f"type_{key.upper()}",
        "message": f"wrong: {said} (request id: {key})",
        "param": said,
        key: said,
    }


class Echo:
    """The changes of the answers, and the prompts that were seen."""

    def __init__(self, emulator: Emulator, table: Path) -> None:
        self.table = table
        self.http = httpx.Client(base_url=emulator.url, trust_env=False)
        self.prompts: dict[str, str] = {}
        self.asked: Counter[str] = Counter()

    def with_key(self, value: Any, key: str) -> Any:
        """Return an answer with the key in names, values, links and errors."""
        if isinstance(value, list):
            return [self.with_key(item, key) for item in value]
        if not isinstance(value, dict):
            return value
        found = {**value, f"debug_{key}": forms_of(key), key: {key: [key]}}
        if isinstance(value.get("data"), list | dict):
            found["data"] = self.with_key(value["data"], key)
        task_id = value.get("id")
        prompt = self.prompts.get(str(task_id), "")
        if "usage" in value:
            found["usage"] = {**value["usage"], "billing_rule": f"r {key}", key: 1}
        if "[link]" in prompt and value.get("status") == "completed":
            self.asked[str(task_id)] += 1
            if self.asked[str(task_id)] <= BAD_LINKS:
                found["results"] = [f"{link}?token={key}" for link in value["results"]]
        if "[fail]" in prompt and value.get("status") == "completed":
            found |= {"status": "failed", "results": [], "error": error_of(key)}
        return found


class _Handler(BaseHTTPRequestHandler):
    echo: Echo

    def do_GET(self) -> None:
        if self.path.startswith("/table.parquet"):
            self._send_table(self.echo.table.read_bytes())
        else:
            self._forward(b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def _send_table(self, data: bytes) -> None:
        """Send the file, or the requested range."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data, {"Accept-Ranges": "bytes"})
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        told = {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        self._send(206, data[first : last + 1], told)

    def do_POST(self) -> None:
        self._forward(self.rfile.read(int(self.headers.get("Content-Length", "0"))))

    def _forward(self, body: bytes) -> None:
        prompt = json.loads(body).get("prompt", "") if body else ""
        if "[refuse]" in prompt:
            self._send(400, json.dumps({"error": error_of(self._key)}).encode())
            return
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() in ("authorization", "content-type", "idempotency-key")
        }
        answer = self.echo.http.request(self.command, self.path, headers=headers, content=body)
        value = answer.json()
        if prompt and isinstance(value, dict):
            self.echo.prompts[str(value.get("id"))] = prompt
        if answer.status_code >= 400:
            value = {"error": error_of(self._key)}
        told = json.dumps(self.echo.with_key(value, self._key))
        self._send(answer.status_code, told.encode())

    @property
    def _key(self) -> str:
        """Return the key of the request."""
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _send(self, status: int, body: bytes, headers: Mapping[str, str] | None = None) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", f"application/json; key={self._key}")
        self.send_header("X-Request-Id", f"id-{self._key}")
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@contextmanager
def echoing(emulator: Emulator, table: Path) -> Iterator[str]:
    """Yield ``host:port`` of a server that echoes the key."""
    echo = Echo(emulator, table)
    handler = type("Handler", (_Handler,), {"echo": echo})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
            echo.http.close()

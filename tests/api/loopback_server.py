"""A server on loopback that treats each connection as a test says, and records the requests."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio

from krea_dagster.models import ImageRequest

KEY = "sk-test-0123456789abcdefghij"
IDEMPOTENCY_KEY = "krea-0123456789abcdef"
REQUEST = ImageRequest(
    request_key="k",
    prompt="a red cube",
    size="1:1",
    quality="1K",
    seed=7,
    nsfw_check=False,
    attempt=0,
)
CREATED = {"id": "task-unified-1-a", "status": "pending", "usage": {"credits_reserved": 0.45}}


class ReceivedRequest:
    """One received request. Header names are lower-case."""

    def __init__(self, method: str, target: str, headers: dict[str, str], body: bytes) -> None:
        self.method = method
        self.target = target
        self.headers = headers
        self.body = body

    @property
    def json(self) -> Any:
        return json.loads(self.body)


#: Gets the request and the connection. Returns true to keep the connection, else it is closed.
Behaviour = Callable[[ReceivedRequest, asyncio.StreamWriter], Awaitable[bool]]


class Server:
    """The address of the server, and its requests."""

    def __init__(self, port: int, scheme: str) -> None:
        self.port = port
        self.url = f"{scheme}://127.0.0.1:{port}"
        self.seen: list[ReceivedRequest] = []
        self.connections = 0


@asynccontextmanager
async def serving(behave: Behaviour, tls: ssl.SSLContext | None = None) -> AsyncIterator[Server]:
    """Serve until the block ends, then cut open connections."""
    handlers: set[asyncio.Task[None]] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        handlers.add(task)
        server.connections += 1
        try:
            while (seen := await _read_request(reader)) is not None:
                server.seen.append(seen)
                if not await behave(seen, writer):
                    break
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            handlers.discard(task)
            writer.close()

    listener = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    server = Server(listener.sockets[0].getsockname()[1], "https" if tls else "http")
    try:
        yield server
    finally:
        listener.close()
        waiting = tuple(handlers)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)


async def _read_request(reader: asyncio.StreamReader) -> ReceivedRequest | None:
    try:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
    except (asyncio.IncompleteReadError, OSError):
        return None
    first, *lines = head.strip().split("\r\n")
    method, target, _ = first.split(" ")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    body = await reader.readexactly(int(headers.get("content-length", "0")))
    return ReceivedRequest(method, target, headers, body)


def message(status: int, body: bytes = b"", **headers: str) -> bytes:
    """Return an HTTP answer. ``content_type`` is the header Content-Type, and so on."""
    fields = {"Content-Length": str(len(body))}
    fields |= {name.replace("_", "-").title(): value for name, value in headers.items()}
    lines = [f"HTTP/1.1 {status} X", *(f"{name}: {value}" for name, value in fields.items())]
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def answers(status: int, value: object = b"", **headers: str) -> Behaviour:
    """Give every request the same answer; a value that is not bytes is sent as JSON."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return writes(message(status, body, **headers))


def writes(*parts: bytes, keep: bool = True) -> Behaviour:
    """Write these bytes, and keep or close the connection."""

    async def behave(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        for part in parts:
            writer.write(part)
            await writer.drain()
        return keep

    return behave


def hangs(*parts: bytes, reached: asyncio.Event | None = None) -> Behaviour:
    """Write these bytes, set ``reached``, and then write nothing more."""

    async def behave(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        for part in parts:
            writer.write(part)
        if reached is not None:
            reached.set()
        await asyncio.Event().wait()
        return False

    return behave


def drips(*, until: asyncio.Event, reached: asyncio.Event | None = None) -> Behaviour:
    """Write a header byte by byte, so that no reading times out; after ``until`` nothing more."""

    async def behave(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        writer.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
        if reached is not None:
            reached.set()
        while not until.is_set():
            writer.write(b".")
            with anyio.move_on_after(0.02):
                await until.wait()
        await asyncio.Event().wait()
        return False

    return behave


def floods(head: bytes, piece: bytes) -> Behaviour:
    """Write the head, and then one piece after another, until the client leaves."""

    async def behave(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        writer.write(head)
        while not writer.is_closing():
            writer.write(piece)
            await writer.drain()
        return False

    return behave


def by_path(**behaviours: Behaviour) -> Behaviour:
    """Choose the behaviour by the first part of the path: ``task`` for /task/… and so on."""

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        name = seen.target.partition("?")[0].strip("/").split("/")[0]
        return await behaviours[name](seen, writer)

    return behave


def closed_port() -> int:
    """Return a closed port of this machine."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def listening(handle: Callable[..., Any]) -> AsyncIterator[int]:
    """Accept connections with a stream handler until the block ends; yield the port."""
    listener = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()

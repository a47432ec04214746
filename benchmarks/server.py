"""A fast in-memory server of EvoLink's API, without code of krea_dagster.

    python -m benchmarks.server --port 0 --latency 2.0 --spread 0.3 --rate 20 --concurrent 64

It prints one JSON line with its ``url`` on stdout when it listens, and ends on SIGTERM. It serves
the create call, the single read, the batch read of up to 50, the credits and the result files.
``GET /_stats`` returns the record of its calls (``?brief=1`` without the lists of create calls and
tasks). Times in the record are seconds of this machine's ``time.monotonic()``.

All API keys belong to one account. The record names each worker by its key.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import socket
import sys
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Final, cast

from benchmarks.account import Account, AccountLimits, AccountTask, CreateCall, drawn_latencies
from benchmarks.image_files import FORMATS, PIXELS, QUALITIES, draw, marked, pixels_of

MODEL: Final = "krea-2-turbo"
BATCH_MAX: Final = 50
CREDITS: Final[Mapping[str, float]] = {"1K": 0.45, "2K": 1.8}
_PIECE_BYTES: Final = 256 * 1024

_JSON: Final = "application/json"
_REASONS: Final = {
    200: b"OK",
    400: b"Bad Request",
    401: b"Unauthorized",
    404: b"Not Found",
    405: b"Method Not Allowed",
    409: b"Conflict",
    411: b"Length Required",
    429: b"Too Many Requests",
}

_CREATED: Final = (
    '{"created":%d,"id":"%s","model":"krea-2-turbo","object":"image.generation.task","progress":0,'
    '"status":"pending","task_info":{"can_cancel":false,"estimated_time":45},"type":"image",'
    '"usage":{"billing_rule":"per_call","credits_reserved":%s,"user_group":"default"}}'
)
_TASK: Final = (
    '{"created":%d,"id":"%s","model":"krea-2-turbo","object":"image.generation.task",'
    '"progress":%d,"status":"%s","task_info":{"can_cancel":false},"type":"image"%s}'
)


class ErrorResponse(Exception):
    """An error response."""

    def __init__(self, status: int, code: str, message: str, kind: str) -> None:
        super().__init__(status, code)
        self.status = status
        error = {"code": code, "message": message, "type": kind}
        self.body = json.dumps({"error": error}).encode()


def _invalid(detail: str) -> ErrorResponse:
    message = f"Invalid request parameters: {detail}"
    return ErrorResponse(400, "invalid_request", message, "invalid_request_error")


class ServerState:
    """The state that all connections share: the account, the images, and the responses' texts."""

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.keys = frozenset(options.api_keys.split(","))
        self.url = ""
        self.wall_less_monotonic_s = time.time() - time.monotonic()
        self._images: dict[tuple[int, int], tuple[bytes, str]] = {}
        limits = AccountLimits(options.rate, options.burst, options.concurrent)
        latency_of = drawn_latencies(options.latency, options.spread, options.seed)
        self.account = Account(limits, latency_of, f"task-unified-{int(time.time()):010d}-")
        refusal = {
            "code": "rate_limit_exceeded",
            "message": "Too many requests, please try again later",
            "type": "rate_limit_error",
        }
        self.too_many = json.dumps({"error": refusal}).encode()
        self.retry_after = (
            b""
            if options.retry_after == "none"
            else b"retry-after: " + options.retry_after.encode() + b"\r\n"
        )
        for quality in options.qualities.split(","):
            self.image("1:1", quality)

    def image(self, size: str, quality: str) -> tuple[bytes, str]:
        """Return the file of a size and quality, and its format. It is drawn once."""
        pixels = pixels_of(size, quality)
        if pixels not in self._images:
            kind = self.options.format
            self._images[pixels] = (draw(pixels, self.options.image_bytes, kind), kind)
        return self._images[pixels]

    def created(self, task: AccountTask) -> bytes:
        """Return the response to a create call."""
        at = int(task.created_s + self.wall_less_monotonic_s)
        return (_CREATED % (at, task.task_id, CREDITS[task.call.quality])).encode()

    def shown(self, task: AccountTask, now_s: float) -> str:
        """Return a task as a read shows it."""
        at = int(task.created_s + self.wall_less_monotonic_s)
        if now_s >= task.done_s:
            kind = self.image(task.call.size, task.call.quality)[1]
            links = f',"results":["{self.url}/files/{task.task_id}.{kind}"]'
            return _TASK % (at, task.task_id, 100, "completed", links)
        share = (now_s - task.created_s) / (task.done_s - task.created_s)
        status = "processing" if share > 0.05 else "pending"
        return _TASK % (at, task.task_id, int(100 * share), status, "")


class Connection(asyncio.Protocol):
    """One connection: requests in sequence, each answered at once."""

    def __init__(self, state: ServerState) -> None:
        self._state = state
        self._data = b""
        self._transport: asyncio.Transport | None = None
        self._writable = True
        self._rest = memoryview(b"")  # of the file that is being sent
        self._sending: AccountTask | None = None
        self._last = False  # whether the client closes after this response

    # -- the wire -----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin."""
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(high=_PIECE_BYTES)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio's
        """Forget the client."""
        self._transport = None

    def pause_writing(self) -> None:
        """Send no more until the client has read."""
        self._writable = False

    def resume_writing(self) -> None:
        """Continue sending."""
        self._writable = True
        self._send_on()

    def data_received(self, data: bytes) -> None:
        """Answer every complete request."""
        self._data = self._data + data if self._data else data
        while self._sending is None and self._serve_one():
            pass

    def _serve_one(self) -> bool:
        """Answer the first complete request; return whether there was one."""
        data = self._data
        end = data.find(b"\r\n\r\n")
        if end < 0 or self._transport is None:
            return False
        first, *lines = data[:end].split(b"\r\n")
        headers = {}
        for line in lines:
            name, _, value = line.partition(b":")
            headers[name.lower()] = value.strip()
        length = int(headers.get(b"content-length", b"0"))
        if len(data) < end + 4 + length:
            return False
        self._data = data[end + 4 + length :]
        method, target, _ = first.split(b" ", 2)
        body = data[end + 4 : end + 4 + length]
        self._last = headers.get(b"connection", b"").lower() == b"close"
        try:
            self._answer(method, target.decode("ascii"), headers, body)
        except ErrorResponse as error:
            self._send(error.status, error.body)
        if self._last and self._sending is None:
            self._transport.close()
        return True

    def _send(self, status: int, body: bytes, more: bytes = b"", kind: str = _JSON) -> None:
        assert self._transport is not None
        self._transport.write(
            b"HTTP/1.1 %d %s\r\ncontent-type: %s\r\ncontent-length: %d\r\n%s\r\n%s"
            % (status, _REASONS[status], kind.encode(), len(body), more, body)
        )

    # -- the routes ---------------------------------------------------------------------------

    def _answer(self, method: bytes, target: str, headers: dict[bytes, bytes], body: bytes) -> None:
        path, _, query = target.partition("?")
        if b"transfer-encoding" in headers:
            raise ErrorResponse(411, "invalid_request", "Give a Content-Length", "api_error")
        if path.startswith("/files/"):
            self._send_file(path)
            return
        if path == "/_stats":
            brief = "brief=1" in query
            self._send(200, json.dumps(self._state.account.stats(brief=brief)).encode())
            return
        worker = self._worker(headers)
        if path == "/v1/images/generations" and method == b"POST":
            self._create(headers, body, worker)
        elif path == "/v1/tasks/batch" and method == b"POST" and not self._state.options.no_batch:
            self._read_batch(body)
        elif path.startswith("/v1/tasks/") and method == b"GET":
            self._read(path.removeprefix("/v1/tasks/"))
        elif path == "/v1/credits" and method == b"GET":
            self._credits()
        else:
            message = f"Invalid URL ({method.decode()} {path})"
            raise ErrorResponse(404, "not_found", message, "invalid_request_error")

    def _worker(self, headers: dict[bytes, bytes]) -> str:
        key = headers.get(b"authorization", b"").removeprefix(b"Bearer ").decode()
        if key not in self._state.keys:
            raise ErrorResponse(
                401, "unauthorized", "Invalid or expired token", "authentication_error"
            )
        return key

    def _create(self, headers: dict[bytes, bytes], body: bytes, worker: str) -> None:
        now_s = time.monotonic()
        try:
            fields = json.loads(body)
            size, quality = fields.get("size", "1:1"), fields.get("quality", "1K")
            if fields["model"] != MODEL or not isinstance(fields["prompt"], str):
                raise _invalid("model or prompt")
        except (ValueError, KeyError, AttributeError):
            raise _invalid("the body") from None
        if size not in PIXELS or quality not in QUALITIES:
            raise _invalid("size or quality")
        key = headers.get(b"idempotency-key", b"").decode()
        call = CreateCall(body, size, quality, key, worker)
        outcome, task = self._state.account.create(now_s, call)
        if task is not None:
            replayed = b"idempotency-replayed: true\r\n" if outcome == "replayed" else b""
            self._send(200, self._state.created(task), replayed)
        elif outcome == "429":
            self._send(429, self._state.too_many, self._state.retry_after)
        else:
            message = "This Idempotency-Key was already used with a different request body"
            raise ErrorResponse(409, "idempotency_conflict", message, "invalid_request_error")

    def _read(self, task_id: str) -> None:
        state = self._state
        state.account.counts.single_reads += 1
        task = state.account.tasks.get(task_id)
        if task is None:
            message = "The requested task could not be found"
            raise ErrorResponse(404, "task_not_found", message, "invalid_request_error")
        self._send(200, state.shown(task, time.monotonic()).encode())

    def _read_batch(self, body: bytes) -> None:
        account, now_s = self._state.account, time.monotonic()
        try:
            task_ids = json.loads(body)["task_ids"]
        except (ValueError, KeyError, TypeError):
            raise _invalid("task_ids") from None
        if not isinstance(task_ids, list) or not 1 <= len(task_ids) <= BATCH_MAX:
            raise _invalid(f"task_ids must be 1 to {BATCH_MAX}")
        account.counts.batch_reads += 1
        account.counts.batch_ids += len(task_ids)
        found = [account.tasks[task_id] for task_id in task_ids if task_id in account.tasks]
        shown = ",".join(self._state.shown(task, now_s) for task in found)
        self._send(200, f'{{"code":200,"data":[{shown}]}}'.encode())

    def _credits(self) -> None:
        account = self._state.account
        account.counts.credits_reads += 1
        now_s = time.monotonic()
        used = round(
            sum(
                CREDITS[task.call.quality]
                for task in account.tasks.values()
                if task.done_s <= now_s
            ),
            4,
        )
        token = {"remaining_credits": 0, "unlimited_credits": True, "used_credits": used}
        user = {"remaining_credits": round(1e6 - used, 4), "used_credits": used}
        answer = {"data": {"token": token, "user": user}, "message": "", "success": True}
        self._send(200, json.dumps(answer).encode())

    # -- files --------------------------------------------------------------------------------

    def _send_file(self, path: str) -> None:
        assert self._transport is not None
        state = self._state
        task_id = path.removeprefix("/files/").partition(".")[0]
        task = state.account.tasks.get(task_id)
        if task is None or time.monotonic() < task.done_s:
            raise ErrorResponse(404, "not_found", "NoSuchKey", "invalid_request_error")
        file, kind = state.image(task.call.size, task.call.quality)
        head, rest = marked(file, kind, task.number)
        self._transport.write(
            b"HTTP/1.1 200 OK\r\ncontent-type: image/%s\r\ncontent-length: %d\r\n\r\n%s"
            % (kind.encode(), len(head) + len(rest), head)
        )
        state.account.counts.download_bytes += len(head) + len(rest)
        self._rest, self._sending = memoryview(rest), task
        self._send_on()

    def _send_on(self) -> None:
        """Send as much of the file as the client takes; the last byte ends the download."""
        task, transport = self._sending, self._transport
        if task is None or transport is None:
            return
        while self._rest and self._writable:
            piece, self._rest = self._rest[:_PIECE_BYTES], self._rest[_PIECE_BYTES:]
            transport.write(piece)
        if self._rest:
            return
        self._sending = None
        self._state.account.counts.downloads += 1
        task.downloaded_s = time.monotonic()
        if self._last:
            transport.close()
        elif self._data:
            self.data_received(b"")


# -- the process ----------------------------------------------------------------------------------


def parser() -> ArgumentParser:
    """Return the parser of the command's options."""
    add = ArgumentParser(prog="python -m benchmarks.server", description="A server to measure with")
    add.add_argument("--port", type=int, default=0, help="0: any free port")
    add.add_argument("--latency", type=float, default=2.0, metavar="SECONDS")
    add.add_argument("--spread", type=float, default=0.3, help="as a share of the latency")
    add.add_argument("--rate", type=float, help="submissions per second; default: no limit")
    add.add_argument("--burst", type=int, default=20, help="tokens that the bucket holds")
    add.add_argument("--concurrent", type=int, help="unfinished tasks at once; default: no limit")
    add.add_argument("--retry-after", default="none", metavar="none|SECONDS")
    add.add_argument("--no-batch", action="store_true", help="answer the batch read with 404")
    add.add_argument("--image-bytes", type=int, default=300_000)
    add.add_argument("--format", choices=FORMATS, default="jpeg")
    add.add_argument("--qualities", default="1K", help="drawn at the start, e.g. 1K,2K")
    add.add_argument("--seed", type=int, default=0)
    add.add_argument("--api-keys", default="bench", help="keys of the one account, by comma")
    return add


async def serve(options: Namespace) -> None:
    """Serve until SIGTERM or SIGINT."""
    state = ServerState(options)
    loop = asyncio.get_running_loop()
    listening = socket.create_server(("127.0.0.1", options.port), backlog=4096)
    state.url = f"http://127.0.0.1:{listening.getsockname()[1]}"
    server = await loop.create_server(lambda: Connection(state), sock=listening)
    stopped = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stopped.set)
    # Objects made from here on live as long as the server, so collecting them costs time.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 1000)
    sys.stdout.write(json.dumps({"url": state.url}) + "\n")
    sys.stdout.flush()
    await stopped.wait()
    server.close()


def main() -> None:
    """Run the command."""
    options = parser().parse_args()
    if find_spec("uvloop"):
        import uvloop

        uvloop.run(serve(options))
    else:
        asyncio.run(serve(options))


if __name__ == "__main__":
    main()

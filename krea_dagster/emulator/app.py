"""Answer HTTP requests as EvoLink does, from a World, with the faults that it was given.

Every request is answered in one transaction of the world, which is committed before the first
byte of the response leaves. What a fault does to the connection is done afterwards.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from email.utils import formatdate
from typing import Any, Final

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from krea_dagster.emulator import contract, faults
from krea_dagster.emulator.contract import ErrorResponse
from krea_dagster.emulator.faults import ChosenFault, RequestKind
from krea_dagster.emulator.images import BODY_EFFECTS, DRAWN, ImageFiles, ImageKey
from krea_dagster.emulator.model import Account, CreateResult, EmulatedTask
from krea_dagster.emulator.payloads import create_body, credits_body, list_row, task_body
from krea_dagster.emulator.reply import ENDLESS_PIECE_BYTES, BreakConnection, Reply, ReplyResponse
from krea_dagster.emulator.world import LinkExpiredError, World

_PNG: Final = "image/png"
_STATUSES: Final = ("pending", "processing", "completed", "failed", "cancelled")


class EmulatorApp:
    """The ASGI application over a world. The server that runs it sets the hooks.

    ``break_connection`` does what a fault wants to a connection. Without it (with an in-process
    ASGI transport) such a fault raises ConnectionError. ``wake`` is called when a callback was
    planned; the application itself does not make the call. ``close`` ends the drawing threads.

    Args:
        world: the state.
        batch: whether ``POST /v1/tasks/batch`` exists.
        callbacks_to_private: whether a ``callback_url`` may have a private address.
        images: draws the images; by default what all emulators of the process share.
        executor: runs the drawing; by default two threads.
    """

    def __init__(
        self,
        world: World,
        *,
        batch: bool = True,
        callbacks_to_private: bool = False,
        images: ImageFiles | None = None,
        executor: concurrent.futures.Executor | None = None,
    ) -> None:
        self.world = world
        self.break_connection: BreakConnection | None = None
        self.wake: Callable[[], None] = lambda: None
        self._callbacks_to_private = callbacks_to_private
        self._batch = batch
        self._images = images or DRAWN
        self._executor = executor or concurrent.futures.ThreadPoolExecutor(
            2, thread_name_prefix="emulator-render"
        )
        self._app = Starlette(
            routes=[
                Route("/v1/images/generations", self._on("create", self._create), methods=["POST"]),
                Route("/v1/tasks/batch", self._on("batch", self._batch_read), methods=["POST"]),
                Route("/v1/tasks/{task_id}", self._on("read", self._read), methods=["GET"]),
                Route("/v1/tasks", self._on("list", self._list), methods=["GET"]),
                Route("/v1/credits", self._on("credits", self._credits), methods=["GET"]),
                Route("/files/{name}", self._file, methods=["GET"]),
                Route("/emulator/books", self._stats, methods=["GET"]),
                Route("/emulator/faults", self._faults, methods=["GET", "POST"]),
                Route("/emulator/health", self._health, methods=["GET"]),
            ],
            exception_handlers={HTTPException: _no_route, ClientDisconnect: _client_left},
        )
        self._app.router.redirect_slashes = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ASGI connection."""
        await self._app(scope, receive, send)

    def close(self) -> None:
        """End the drawing threads."""
        self._executor.shutdown(wait=True, cancel_futures=True)

    # -- the API ------------------------------------------------------------------------------

    def _on(self, kind: RequestKind, handle: Callable[[_Call], Reply]) -> Callable[[Request], Any]:
        """Wrap a handler: read the body, answer in one transaction, count, send."""

        async def endpoint(request: Request) -> ReplyResponse:
            request_id = self.world.bytes(8).hex()
            raw = await _read_body(request) if request.method == "POST" else b""
            with self.world.transaction():
                try:
                    reply = handle(_Call(request, raw))
                except ErrorResponse as error:
                    # EvoLink was seen to name the request in the errors of this route.
                    reply = _error_reply(error, request_id if kind == "create" else None)
                self.world.count(kind, reply.outcome)
            reply.headers["x-request-id"] = request_id
            return ReplyResponse(reply, self.break_connection)

        return endpoint

    def _account(self, request: Request, route: str) -> Account:
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        account = self.world.account(key.strip()) if scheme.lower() == "bearer" else None
        if account is None:
            raise contract.unauthorized(route)
        return account

    def _create(self, call: _Call) -> Reply:
        account = self._account(call.request, "create")
        if not _is_json(call.request):
            text = "Content-Type must be application/json"
            raise ErrorResponse(415, "unsupported_media_type", text)
        order = contract.read_order(call.json(), callbacks_to_private=self._callbacks_to_private)
        key = contract.read_idempotency_key(call.request.headers.get("idempotency-key"))
        marked = _markers(order.prompt)
        refused = faults.of_kind(marked, "create")
        chosen = refused[0] if refused else self.world.choose_fault("create", order.prompt)
        effect = "" if chosen is None else chosen.fault.effect
        if effect == "conflict":
            if key is not None:
                self.world.take_key(account, key)
            chosen = None  # the create call now meets the key in that state
        if chosen is not None and not chosen.fault.after:
            return self._fault_reply("create", chosen, call.request)
        kept = faults.of_kind(marked, "task")
        if order.callback_url is not None:
            kept += faults.of_kind(marked, "callback")
        undecided = chosen is not None and effect in ("undecided", "delay")
        created = self.world.create(
            account,
            order,
            idempotency_key=key,
            task_faults=kept,
            ignore_key=effect == "ignore_idempotency",
            undecided_s=chosen.seconds if chosen is not None and undecided else 0.0,
        )
        if order.callback_url is not None:
            self.wake()
        reply = _json(create_body(created.task))
        if created.replayed:
            reply.headers["idempotency-replayed"] = "true"
            self.world.count("note", "replays")
        if chosen is None or effect == "ignore_idempotency":
            return reply
        return self._reply_after_create(chosen, account, created, reply, call.request)

    def _reply_after_create(
        self,
        chosen: ChosenFault,
        account: Account,
        created: CreateResult,
        reply: Reply,
        request: Request,
    ) -> Reply:
        """Return the reply that a fault makes of the one for a task that exists."""
        effect = chosen.fault.effect
        if effect == "repeated_id":
            body = create_body(created.task)
            return _json({**body, "id": self.world.first_task_id(account)})
        if effect == "no_id":
            body = create_body(created.task)
            del body["id"]
            return _json(body, headers=reply.headers)
        if effect == "undecided":
            return Reply(0, wire="close")
        if effect == "delay":
            reply.delay_s = chosen.seconds
            return reply
        return self._fault_reply("create", chosen, request)

    def _reply_or_fault(
        self,
        kind: RequestKind,
        request: Request,
        chosen: ChosenFault | None,
        body: Callable[[], Mapping[str, Any]],
    ) -> Reply:
        """Return the reply to a read, or that of the fault that was chosen for it."""
        if chosen is None:
            return _json(body())
        if chosen.fault.effect == "delay":
            reply = _json(body())
            reply.delay_s = chosen.seconds
            return reply
        return self._fault_reply(kind, chosen, request)

    def _read(self, call: _Call) -> Reply:
        request = call.request
        account = self._account(request, "read")
        task_id = request.path_params["task_id"]
        if not task_id.startswith(contract.TASK_ID_PREFIX):
            raise contract.invalid_task_id()
        known = self._task_or_none(task_id, account)
        chosen = self.world.choose_fault("read", known.prompt if known else "")
        return self._reply_or_fault(
            "read",
            request,
            chosen,
            lambda: self._task_body(known or self.world.task(task_id, account), request),
        )

    def _batch_read(self, call: _Call) -> Reply:
        request = call.request
        if not self._batch:
            raise contract.no_such_route(request.method, request.url.path)
        account = self._account(request, "batch")
        task_ids = contract.read_task_ids(call.json())
        chosen = self.world.choose_fault("batch", "")
        all_failed = chosen is not None and chosen.fault.effect == "all_failed"
        changed: dict[str, Any] = {}
        if all_failed:
            failed = {"code": "service_error", "message": "Service error", "type": "task_error"}
            changed = {"status": "failed", "error": failed}

        def body() -> Mapping[str, Any]:
            found = [self._task_or_none(task_id, account) for task_id in dict.fromkeys(task_ids)]
            rows = [{**self._task_body(task, request), **changed} for task in found if task]
            return {"code": 200, "data": rows}

        return self._reply_or_fault("batch", request, None if all_failed else chosen, body)

    def _list(self, call: _Call) -> Reply:
        request = call.request
        account = self._account(request, "list")
        query = request.query_params
        page, page_size = contract.read_page(query)
        status = query.get("status") or None
        if status is not None and status not in _STATUSES:
            raise contract.invalid_request("status")
        matches = query.get("type") in (None, "", "image")
        matches = matches and query.get("model") in (None, "", contract.MODEL)

        def body() -> Mapping[str, Any]:
            found: list[EmulatedTask] = []
            total = 0
            if matches:
                found, total = self.world.tasks(
                    account, status=status, page=page, page_size=page_size
                )
            now = self.world.now()
            rows = [list_row(task, now) for task in found]
            return {"code": 200, "data": rows, "page": page, "page_size": page_size, "total": total}

        return self._reply_or_fault("list", request, self.world.choose_fault("list"), body)

    def _credits(self, call: _Call) -> Reply:
        account = self._account(call.request, "credits")
        chosen = self.world.choose_fault("credits")
        return self._reply_or_fault("credits", call.request, chosen, lambda: credits_body(account))

    def _task_or_none(self, task_id: str, account: Account) -> EmulatedTask | None:
        try:
            return self.world.task(task_id, account)
        except ErrorResponse:
            return None

    def _task_body(self, task: EmulatedTask, request: Request) -> dict[str, Any]:
        now = self.world.now()
        if task.status(now) != "completed":
            return task_body(task, now, [])
        link = task.fault("link")
        if link is not None:
            return task_body(task, now, [link.arg])
        late = task.fault("no_results")
        if late is not None and self.world.count_read_at_end(task) < late.count:
            return task_body(task, now, [])
        return task_body(task, now, [_absolute(request, self.world.link_path(task))])

    # -- faults -------------------------------------------------------------------------------

    def _fault_reply(self, route: str, chosen: ChosenFault, request: Request) -> Reply:
        """Return the reply of a fault in place of the true one. Raises ErrorResponse."""
        effect, status = chosen.fault.effect, chosen.fault.status
        if effect in ("drop", "reset", "garbage"):
            return Reply(0, wire={"drop": "close"}.get(effect, effect))
        if effect == "no_success":
            return _json({"data": None, "message": "Failed to read credits", "success": False})
        if effect == "html":
            return Reply(status, _html(status), "text/html; charset=utf-8")
        if effect == "empty":
            return Reply(status, b"", "text/plain")
        if effect == "redirect":
            elsewhere = _absolute(request, "/elsewhere" + request.url.path)
            return Reply(status, b"", "text/plain", {"location": elsewhere})
        raise _error_of(route, chosen, self.world.now())

    # -- the file host ------------------------------------------------------------------------

    async def _file(self, request: Request) -> ReplyResponse:
        """Serve an image: its record in one transaction, its drawing in a thread."""
        world = self.world
        with world.transaction():
            if "authorization" in request.headers:
                world.count("note", "key_leaks")
            try:
                task = world.file(request.path_params["name"])
            except ErrorResponse:
                return self._send_file(_file_error(404, "NoSuchKey"))
            except LinkExpiredError:
                return self._send_file(_file_error(403, "RequestExpired"))
            chosen = self._file_fault(task)
        if "direct" in request.query_params:
            chosen = None
        if chosen is not None:
            reply = self._reply_without_image(request, chosen)
            if reply is not None:
                return self._send_file(reply)
        effect = "" if chosen is None else chosen.fault.effect
        reply = Reply(200, await self._image(task, effect), _PNG)
        if effect == "octet_stream":
            reply.content_type = "application/octet-stream"
        elif effect == "truncated":
            reply.wire = "truncated"
        elif effect == "delay" and chosen is not None:
            reply.delay_s = chosen.seconds
        return self._send_file(reply)

    def _file_fault(self, task: EmulatedTask) -> ChosenFault | None:
        for one in faults.of_kind(_markers(task.prompt), "file"):
            if not one.once or task.fetched == 0:
                return one
        return self.world.choose_fault("file", task.prompt)

    def _reply_without_image(self, request: Request, chosen: ChosenFault) -> Reply | None:
        """Return the reply of a fault that needs no image, None for other faults."""
        effect, status = chosen.fault.effect, chosen.fault.status
        path = request.url.path
        if effect == "expired":
            return _file_error(403, "RequestExpired")
        if effect == "error":
            return _file_error(status, "AccessDenied" if status == 403 else "Error")
        if effect == "endless":
            return Reply(200, self.world.bytes(ENDLESS_PIECE_BYTES), _PNG, wire="endless")
        if effect.startswith("redirect"):
            location = {
                "redirect": _absolute(request, path + "?direct=1"),
                "redirect_to": chosen.arg,
                "redirect_loop": _absolute(request, path),
            }[effect]
            return Reply(status, b"", _PNG, {"location": location})
        if effect.startswith("too_busy"):
            return _error_reply(_error_of("file", chosen, self.world.now()))
        if effect in ("drop", "reset", "garbage", "html", "empty"):
            return self._fault_reply("file", chosen, request)
        return None

    async def _image(self, task: EmulatedTask, effect: str) -> bytes:
        order = contract.Order(task.prompt, task.size, task.quality)
        key: ImageKey = (task.prompt, task.used_seed, *order.pixels)
        loop = asyncio.get_running_loop()
        if effect in BODY_EFFECTS:
            noise = self.world.bytes(50_000)
            return await loop.run_in_executor(
                self._executor, self._images.damaged, key, effect, noise
            )
        body = await loop.run_in_executor(self._executor, self._images.png, key)
        self.world.rendered(task, hashlib.sha256(body).hexdigest())
        return body

    def _send_file(self, reply: Reply) -> ReplyResponse:
        self.world.count("file", reply.outcome)
        return ReplyResponse(reply, self.break_connection)

    # -- the emulator's own routes ------------------------------------------------------------

    async def _stats(self, request: Request) -> Response:
        return JSONResponse(self.world.stats(tasks=request.query_params.get("tasks") != "0"))

    async def _health(self, _request: Request) -> Response:
        return JSONResponse({"status": "ok", "synthetic": True})

    async def _faults(self, request: Request) -> Response:
        """Script faults or set rates; respond with what is set and still to strike.

        Body: ``{"script": [{"name", "n"?, "match"?, "arg"?}], "rates": {name: rate},
        "quota_credits": number or null, "clear": true}``, each part optional.
        """
        if request.method == "POST":
            call = _Call(request, await _read_body(request))
            try:
                self._set_faults(call.json())
            except ErrorResponse as error:
                return JSONResponse(error.body(), error.status)
            except (faults.UnknownFaultError, TypeError, KeyError, AttributeError) as error:
                return JSONResponse(contract.invalid_request(detail=str(error)).body(), 400)
        return JSONResponse({"unconsumed": self.world.unconsumed(), "rates": self.world.rates()})

    def _set_faults(self, wanted: Mapping[str, Any]) -> None:
        world = self.world
        with world.transaction():
            if wanted.get("clear"):
                world.forget_scripts()
                for name in list(world.rates()):
                    world.set_rate(name, 0)
            for one in wanted.get("script", []):
                world.script(
                    one["name"], one.get("n", 1), match=one.get("match"), arg=one.get("arg")
                )
            for name, rate in wanted.get("rates", {}).items():
                world.set_rate(name, rate)
            if "quota_credits" in wanted:
                world.set_quota(wanted["quota_credits"])


# -- requests and replies ---------------------------------------------------------------------


@dataclass(frozen=True)
class _Call:
    """A request with its whole body; None if that is larger than allowed."""

    request: Request
    raw: bytes | None

    def json(self) -> Any:
        """Return the body's JSON. Raises ErrorResponse 400 or 413."""
        if self.raw is None:
            raise ErrorResponse(413, "payload_too_large", "Request body is too large")
        return contract.parse_json(self.raw)


async def _read_body(request: Request) -> bytes | None:
    """Return the body; None, and stop reading, if it is longer than the limit."""
    pieces, size = [], 0
    async for piece in request.stream():
        size += len(piece)
        if size > contract.MAX_BODY_BYTES:
            return None
        pieces.append(piece)
    return b"".join(pieces)


def _error_of(route: str, chosen: ChosenFault, now: float) -> ErrorResponse:
    """Return the error of a fault."""
    effect, status, arg = chosen.fault.effect, chosen.fault.status, chosen.arg
    message = contract.invalid_request().message
    build: dict[str, Callable[[], ErrorResponse]] = {
        "too_busy": lambda: contract.rate_limited(route, arg),
        "too_busy_date": lambda: contract.rate_limited(
            route, formatdate(now + float(arg), usegmt=True)
        ),
        "too_busy_bare": lambda: contract.rate_limited(route),
        "code": lambda: ErrorResponse(status, arg, message),
        "integer_code": lambda: ErrorResponse(
            int(arg), int(arg), "Upstream error", "upstream_error"
        ),
        "upper_case_code": lambda: ErrorResponse(status, arg, message, ""),
        "unauthorized": lambda: contract.unauthorized(route),
        "out_of_credits": lambda: contract.out_of_credits(route, arg),
        "denied": lambda: contract.access_denied(route, arg),
        "not_found": contract.task_not_found,
        "no_route": lambda: ErrorResponse(404, "not_found", "Invalid URL"),
        "error": lambda: (
            contract.internal_error(route, status)
            if status >= 500
            else ErrorResponse(status, "invalid_request", message)
        ),
    }
    return build[effect]()


def _json(
    value: Mapping[str, Any], status: int = 200, *, headers: dict[str, str] | None = None
) -> Reply:
    body = json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
    return Reply(status, body, headers=headers or {})


def _error_reply(error: ErrorResponse, request_id: str | None = None) -> Reply:
    return _json(error.body(request_id), error.status, headers=dict(error.headers))


def _file_error(status: int, code: str) -> Reply:
    body = f'<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>{code}</Code></Error>\n'
    return Reply(status, body.encode(), "application/xml")


def _html(status: int) -> bytes:
    page = f"<!DOCTYPE html><html><head><title>{status}</title></head><body>{status}</body></html>"
    return page.encode()


def _is_json(request: Request) -> bool:
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    return kind == "application/json" or kind.endswith("+json")


def _markers(prompt: str) -> list[ChosenFault]:
    if "[emulator:" not in prompt:
        return []
    try:
        return faults.markers(prompt)
    except faults.UnknownFaultError as error:
        raise contract.invalid_request("prompt", str(error)) from None


def _absolute(request: Request, path: str) -> str:
    """Return a link under the address that the client used."""
    server = request.scope.get("server") or ("127.0.0.1", 80)
    host = request.headers.get("host") or f"{server[0]}:{server[1]}"
    return f"{request.url.scheme}://{host}{path}"


async def _no_route(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        raise error
    refused = contract.no_such_route(request.method, request.url.path)
    return JSONResponse(refused.body(), error.status_code, headers=error.headers)


async def _client_left(_request: Request, _error: Exception) -> Response:
    """Respond to a client that left while it was still sending; it is not there to read it."""
    return Response(status_code=400)

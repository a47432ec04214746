"""The client over real sockets: the meaning of each failure, and where the key is sent."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import sys
import traceback
from base64 import b64encode
from collections.abc import Awaitable, Callable
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

import anyio
import httpx
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.api.batch_support import BATCH_TRIES
from krea_dagster.api.client import check_base_url
from krea_dagster.api.exchange import ANSWER_MAX_BYTES
from krea_dagster.errors import (
    ApiError,
    ConfigError,
    ContentRefused,
    InputError,
    KreaError,
    LinkRefused,
    NoCapacity,
    NotSent,
    NoUsableAnswer,
    OutcomeUnknown,
    PurchasePending,
    RateLimited,
    SubmitError,
    TaskNotFound,
    TurnedAway,
    Unauthorized,
)
from tests.api.loopback_server import (
    CREATED,
    IDEMPOTENCY_KEY,
    KEY,
    REQUEST,
    Behaviour,
    ReceivedRequest,
    Server,
    answers,
    by_path,
    closed_port,
    floods,
    hangs,
    serving,
    writes,
)
from tests.manual_clock import ManualClock

pytestmark = pytest.mark.anyio


def client_for(server: Server, **settings: Any) -> KreaClient:
    return KreaClient(KEY, base_url=server.url, **settings)


async def buy(client: KreaClient) -> Any:
    return await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)


async def failed_purchase(client: KreaClient) -> SubmitError:
    with pytest.raises(SubmitError) as caught:
        await buy(client)
    return caught.value


def status_of(task_id: str) -> dict[str, str]:
    return {"id": task_id, "status": "processing"}


# -- a successful purchase --------------------------------------------------------------------


async def test_a_purchase_sends_the_key_the_idempotency_key_and_the_body_and_nothing_more() -> None:
    async with serving(answers(200, CREATED)) as server, client_for(server) as client:
        submission = await buy(client)
    (seen,) = server.seen
    assert submission.task_id == "task-unified-1-a"
    assert submission.credits_reserved_units == 4500
    assert (seen.method, seen.target) == ("POST", "/v1/images/generations")
    assert seen.headers.pop("user-agent").startswith("krea-dagster/")
    assert seen.headers == {
        "host": f"127.0.0.1:{server.port}",
        "accept": "application/json",
        "accept-encoding": "identity",
        "content-type": "application/json",
        "content-length": str(len(seen.body)),
        "authorization": f"Bearer {KEY}",
        "idempotency-key": IDEMPOTENCY_KEY,
    }
    assert seen.json["seed"] == 7
    assert "callback_url" not in seen.json


async def test_a_repeat_sends_the_same_bytes_and_is_marked_as_replayed() -> None:
    async with (
        serving(answers(200, CREATED, idempotency_replayed="true")) as server,
        client_for(server) as client,
    ):
        url = "https://example.com/hook"
        for _ in range(2):
            submission = await client.submit(
                REQUEST, idempotency_key=IDEMPOTENCY_KEY, callback_url=url
            )
    assert submission.replayed
    assert server.seen[0].body == server.seen[1].body
    assert server.seen[0].json["callback_url"] == url
    assert server.connections == 1


@pytest.mark.parametrize(
    "key", ["", "short", "x" * 97, "has space 0123456789", "ümlaut-0123456789"]
)
async def test_a_bad_idempotency_key_sends_nothing(key: str) -> None:
    async with serving(answers(200, CREATED)) as server, client_for(server) as client:
        with pytest.raises(InputError):
            await client.submit(REQUEST, idempotency_key=key)
    assert server.seen == []


async def test_a_closed_client_sends_nothing() -> None:
    async with serving(answers(200, CREATED)) as server:
        client = client_for(server)
        await client.aclose()
        with pytest.raises(InputError):
            await buy(client)
    assert server.seen == []


async def test_a_compressed_answer_that_was_not_requested_is_decompressed() -> None:
    body = gzip.compress(json.dumps(CREATED).encode())
    async with (
        serving(answers(200, body, content_encoding="gzip")) as server,
        client_for(server) as client,
    ):
        assert (await buy(client)).task_id == "task-unified-1-a"


# -- failures of the connection ---------------------------------------------------------------


async def test_a_refused_connection_is_certainly_unspent() -> None:
    async with KreaClient(KEY, base_url=f"http://127.0.0.1:{closed_port()}") as client:
        assert type(await failed_purchase(client)) is NotSent


async def test_a_name_that_does_not_resolve_is_certainly_unspent() -> None:
    async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
        assert type(await failed_purchase(client)) is NotSent


async def test_a_failed_tls_handshake_is_certainly_unspent() -> None:
    async def hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 No\r\n\r\n")
        writer.close()

    listener = await asyncio.start_server(hangs_up, "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    async with KreaClient(KEY, base_url=f"https://127.0.0.1:{port}") as client:
        assert type(await failed_purchase(client)) is NotSent
    listener.close()


async def test_a_proxy_that_opens_no_tunnel_is_certainly_unspent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(answers(407)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url)
        async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
            assert type(await failed_purchase(client)) is NotSent
    (seen,) = proxy.seen
    assert seen.method == "CONNECT"
    assert "authorization" not in seen.headers


async def test_waiting_too_long_for_a_connection_is_certainly_unspent() -> None:
    async with (
        serving(hangs()) as server,
        client_for(server, max_connections=1, timeout_s=0.3) as client,
    ):
        errors: list[SubmitError] = []

        async def buy_one() -> None:
            errors.append(await failed_purchase(client))

        async with anyio.create_task_group() as group:
            group.start_soon(buy_one)
            group.start_soon(buy_one)
    assert len(server.seen) == 1
    assert sorted(type(error).__name__ for error in errors) == ["NotSent", "OutcomeUnknown"]


UNKNOWN: dict[str, Behaviour] = {
    "the server reads the purchase and closes in silence": writes(keep=False),
    "the server never answers": hangs(),
    "the status line is garbage": writes(b"garbage\r\n\r\n", keep=False),
    "the head breaks off": writes(b"HTTP/1.1 200 OK\r\nContent-Le", keep=False),
    "the body breaks off": writes(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", keep=False),
    "the body never ends": floods(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536),
    "the body hangs": hangs(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
    "the body is a bomb": answers(200, gzip.compress(bytes(20_000_000)), content_encoding="gzip"),
    "the packing is unknown": answers(200, b"x", content_encoding="br"),
    "the packing is damaged": answers(200, b"x", content_encoding="gzip"),
    "a 400 breaks off before its code": writes(
        b"HTTP/1.1 400 No\r\nContent-Length: 99\r\n\r\n{", keep=False
    ),
    "a 302 leads elsewhere": answers(302, location="http://127.0.0.1:1/"),
    "a 307 leads elsewhere": answers(307, location="http://127.0.0.1:1/"),
    "a redirect has an unreadable target": answers(308, location="https://["),
    "a redirect has another protocol": answers(308, location="gopher://x/"),
    "a 200 without an id": answers(200, {}),
    "a 500": answers(500, {"error": {"code": "internal_error", "message": "no"}}),
}


@pytest.mark.parametrize("case", UNKNOWN)
async def test_any_failure_after_the_purchase_has_left_is_an_unknown_outcome(case: str) -> None:
    async with serving(UNKNOWN[case]) as server, client_for(server, timeout_s=0.3) as client:
        assert type(await failed_purchase(client)) is OutcomeUnknown
    assert len(server.seen) == 1


async def test_a_purchase_whose_deadline_passes_is_an_unknown_outcome() -> None:
    async with serving(hangs()) as server, client_for(server, deadline_s=0.2) as client:
        error = await failed_purchase(client)
    assert type(error) is OutcomeUnknown
    assert "0.2 s" in error.message


async def test_a_kept_connection_that_the_server_closes_on_the_next_purchase_is_unknown() -> None:
    purchases = iter([answers(200, CREATED), writes(keep=False)])

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(purchases)(seen, writer)

    async with serving(behave) as server, client_for(server) as client:
        await buy(client)
        assert type(await failed_purchase(client)) is OutcomeUnknown
    assert server.connections == 1


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (answers(429, retry_after="7"), TurnedAway),
        (answers(400, {"error": {"code": "channel_busy"}}), NoCapacity),
        (answers(400, {"error": {"code": "content_filter"}}), ContentRefused),
        (answers(409, {"error": {"code": "paid_outcome_unknown"}}), PurchasePending),
        (writes(b"HTTP/1.1 429 No\r\nContent-Length: 99\r\n\r\n{", keep=False), TurnedAway),
    ],
)
async def test_an_answer_is_classified_by_the_tables(
    behaviour: Behaviour, error: type[SubmitError]
) -> None:
    async with serving(behaviour) as server, client_for(server) as client:
        assert type(await failed_purchase(client)) is error


async def test_a_cancellation_passes_through() -> None:
    reached = asyncio.Event()
    async with serving(hangs(reached=reached)) as server, client_for(server) as client:
        purchase = asyncio.ensure_future(buy(client))
        await reached.wait()
        purchase.cancel()
        with pytest.raises(asyncio.CancelledError):
            await purchase


# -- another transport ------------------------------------------------------------------------


class LyingTransport(httpx.AsyncBaseTransport):
    """Sends the whole request and then raises a wrong error, as real transports do."""

    def __init__(self, claim: Exception) -> None:
        self.claim = claim
        self.inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        await (await self.inner.handle_async_request(request)).aclose()
        raise self.claim

    async def aclose(self) -> None:
        await self.inner.aclose()


@pytest.mark.parametrize(
    "claim",
    [
        httpx.ConnectError("no"),
        httpx.ConnectTimeout("no"),
        httpx.PoolTimeout("no"),
        httpx.UnsupportedProtocol("no"),
        ZeroDivisionError("raw"),
        TimeoutError(),
    ],
)
async def test_a_transport_that_is_not_of_httpx_is_not_believed(claim: Exception) -> None:
    async with (
        serving(answers(200, CREATED)) as server,
        client_for(server, transport=LyingTransport(claim)) as client,
    ):
        assert type(await failed_purchase(client)) is OutcomeUnknown
    assert len(server.seen) == 1


class DeclaredTransport(httpx.AsyncBaseTransport):
    """Declares that it reports truthfully."""

    reports_unsent = True

    async def handle_async_request(self, _: httpx.Request) -> httpx.Response:
        raise httpx.ConnectTimeout("no")


class HttpxSubclass(httpx.AsyncHTTPTransport):
    """A subclass, which may behave differently."""


@pytest.mark.parametrize(
    ("transport", "error"),
    [
        (httpx.AsyncHTTPTransport, NotSent),
        (DeclaredTransport, NotSent),
        (HttpxSubclass, OutcomeUnknown),
    ],
)
async def test_a_transport_is_believed_if_it_is_of_httpx_or_declares_it(
    transport: type[httpx.AsyncBaseTransport], error: type[SubmitError]
) -> None:
    url = f"http://127.0.0.1:{closed_port()}"
    async with KreaClient(KEY, base_url=url, transport=transport()) as client:
        assert type(await failed_purchase(client)) is error


# -- reads ------------------------------------------------------------------------------------


async def test_a_task_is_read_by_its_id() -> None:
    async with serving(answers(200, status_of("t:1"))) as server, client_for(server) as client:
        assert (await client.task("t:1")).status == "processing"
    assert (server.seen[0].method, server.seen[0].target) == ("GET", "/v1/tasks/t:1")
    assert "idempotency-key" not in server.seen[0].headers


@pytest.mark.parametrize("task_id", ["", "..", "a/b", "a?b", "a\nb", "x" * 129])
async def test_a_text_that_is_not_a_task_id_is_not_sent(task_id: str) -> None:
    async with serving(answers(200)) as server, client_for(server) as client:
        with pytest.raises(InputError):
            await client.task(task_id)
    assert server.seen == []


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (writes(keep=False), NoUsableAnswer),
        (writes(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", keep=False), NoUsableAnswer),
        (writes(b"HTTP/1.1 404 No\r\nContent-Length: 99\r\n\r\n{", keep=False), NoUsableAnswer),
        (floods(b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65536), NoUsableAnswer),
        (answers(404, b"<html>"), NoUsableAnswer),
        (answers(404, {"error": {"code": "task_not_found"}}), TaskNotFound),
        (answers(401), Unauthorized),
        (answers(429, retry_after="7"), RateLimited),
    ],
)
async def test_a_read_without_a_usable_answer_raises_the_error_of_its_kind(
    behaviour: Behaviour, error: type[ApiError]
) -> None:
    async with serving(behaviour) as server, client_for(server) as client:
        with pytest.raises(ApiError) as caught:
            await client.task("t")
    assert type(caught.value) is error


async def test_credits_have_the_time_of_the_clients_clock() -> None:
    now = datetime(2025, 7, 1, tzinfo=timezone.utc)
    value = {"data": {"user": {"remaining_credits": 1, "used_credits": 2}}, "success": True}
    async with (
        serving(answers(200, value)) as server,
        client_for(server, now=lambda: now) as client,
    ):
        account = await client.credits()
    assert (account.user_remaining_units, account.read_at) == (10_000, now)
    assert server.seen[0].target == "/v1/credits"


async def test_a_path_in_the_base_url_is_kept() -> None:
    async with (
        serving(answers(200, status_of("t"))) as server,
        KreaClient(KEY, base_url=f"{server.url}/gate/") as client,
    ):
        await client.task("t")
    assert server.seen[0].target == "/gate/v1/tasks/t"


# -- many tasks -------------------------------------------------------------------------------


def fake_evolink(*, batch: Behaviour | None = None, single: Behaviour | None = None) -> Behaviour:
    """Return a server that knows every task whose id begins with t, by default."""

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        if seen.target == "/v1/tasks/batch":
            if batch is not None:
                return await batch(seen, writer)
            data = [status_of(i) for i in seen.json["task_ids"] if i.startswith("t")]
            return await answers(200, {"code": 200, "data": data})(seen, writer)
        task_id = seen.target.rpartition("/")[2]
        if single is not None:
            return await single(seen, writer)
        if task_id.startswith("t"):
            return await answers(200, status_of(task_id))(seen, writer)
        return await answers(404, {"error": {"code": "task_not_found"}})(seen, writer)

    return behave


async def test_many_tasks_are_read_fifty_at_a_time() -> None:
    ids = [f"t{n}" for n in range(120)]
    async with serving(fake_evolink()) as server, client_for(server) as client:
        before = client.batch_supported
        found = await client.tasks([*ids, "gone", ids[0], "no/id"])
        assert (before, client.batch_supported) == (None, True)
    assert list(found) == ids
    assert [len(seen.json["task_ids"]) for seen in server.seen] == [50, 50, 21]


async def test_one_task_is_read_at_the_documented_endpoint() -> None:
    async with serving(fake_evolink()) as server, client_for(server) as client:
        assert list(await client.tasks(["t1"])) == ["t1"]
        assert await client.tasks(["gone"]) == {}
        assert await client.tasks([]) == {}
    assert {seen.method for seen in server.seen} == {"GET"}


@pytest.mark.parametrize("missing", [answers(404, b"<html>"), answers(405), answers(200, b"hi")])
async def test_without_a_batch_endpoint_tasks_are_read_singly_from_then_on(
    missing: Behaviour,
) -> None:
    async with serving(fake_evolink(batch=missing)) as server, client_for(server) as client:
        for _ in range(2):
            assert list(await client.tasks(["t1", "gone", "t2"])) == ["t1", "t2"]
        assert client.batch_supported is False
    assert [seen.method for seen in server.seen].count("POST") == 1


async def test_single_reads_replace_a_batch_a_few_at_a_time() -> None:
    ids = [f"t{n}" for n in range(30)]
    behaviour = fake_evolink(batch=answers(404))
    async with serving(behaviour) as server, client_for(server, max_connections=3) as client:
        assert list(await client.tasks(ids)) == ids
    assert server.connections <= 3


async def test_a_batch_endpoint_that_never_worked_is_given_up() -> None:
    async with serving(fake_evolink(batch=answers(500))) as server, client_for(server) as client:
        for _ in range(BATCH_TRIES - 1):
            with pytest.raises(NoUsableAnswer):
                await client.tasks(["t1", "t2"])
        assert list(await client.tasks(["t1", "t2"])) == ["t1", "t2"]
        assert client.batch_supported is False


@pytest.mark.parametrize("away", [answers(404, b"<html>"), answers(403), answers(405)])
async def test_a_batch_endpoint_that_disappears_and_returns_is_paused_and_used_again(
    away: Behaviour,
) -> None:
    """The call that finds it missing reads its ids singly, so no id is left unread."""
    ids, clock = ["t1", "t2", "t3"], ManualClock()
    is_away = False

    async def batch(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        if is_away:
            return await away(seen, writer)
        data = [status_of(task_id) for task_id in seen.json["task_ids"]]
        return await answers(200, data)(seen, writer)

    async with (
        serving(fake_evolink(batch=batch)) as server,
        client_for(server, monotonic=clock) as client,
    ):

        async def read() -> tuple[int, bool | None]:
            """Return the number of batch requests, and what is known of the endpoint."""
            before = len(server.seen)
            assert list(await client.tasks(ids)) == ids
            posts = [seen.method for seen in server.seen[before:]].count("POST")
            return posts, client.batch_supported

        assert await read() == (1, True)
        is_away = True
        assert await read() == (1, False)
        assert await read() == (0, False)
        clock.now_s = 60.0
        assert client.batch_supported is None
        assert await read() == (1, False)
        clock.now_s = 179.0
        assert await read() == (0, False)
        clock.now_s = 180.0
        is_away = False
        assert await read() == (1, True)


async def test_a_batch_endpoint_that_breaks_is_not_used_for_a_while() -> None:
    batches = iter([answers(200, []), *[answers(500)] * BATCH_TRIES])

    async def batch(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(batches)(seen, writer)

    async with (
        serving(fake_evolink(batch=batch)) as server,
        client_for(server, monotonic=ManualClock()) as client,
    ):
        assert await client.tasks(["t1", "t2"]) == {}
        for _ in range(BATCH_TRIES - 1):
            with pytest.raises(NoUsableAnswer):
                await client.tasks(["t1", "t2"])
            assert client.batch_supported is True
        assert list(await client.tasks(["t1", "t2"])) == ["t1", "t2"]
        assert client.batch_supported is False


async def test_a_failed_connection_does_not_count_against_the_batch_endpoint() -> None:
    async with KreaClient(KEY, base_url=f"http://127.0.0.1:{closed_port()}") as client:
        for _ in range(BATCH_TRIES + 1):
            with pytest.raises(NoUsableAnswer) as caught:
                await client.tasks(["t1", "t2"])
            assert caught.value.cause == "connection"
        assert client.batch_supported is None


async def test_tasks_that_were_read_are_returned_despite_a_later_failure() -> None:
    batches = iter([answers(200, [status_of("t0")]), answers(429)])

    async def batch(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(batches)(seen, writer)

    async with serving(fake_evolink(batch=batch)) as server, client_for(server) as client:
        assert list(await client.tasks([f"t{n}" for n in range(60)])) == ["t0"]


@pytest.mark.parametrize(("status", "error"), [(429, RateLimited), (401, Unauthorized)])
async def test_single_reads_stop_at_an_error_of_the_key_or_the_account(
    status: int, error: type[ApiError]
) -> None:
    behaviour = fake_evolink(batch=answers(404), single=answers(status))
    async with serving(behaviour) as server, client_for(server, max_connections=1) as client:
        with pytest.raises(ApiError) as caught:
            await client.tasks([f"t{n}" for n in range(20)])
    assert type(caught.value) is error
    assert len(server.seen) == 2


# -- the key ----------------------------------------------------------------------------------


def shown(error: BaseException) -> str:
    """Return a traceback of an error and its causes, with local variables."""
    text = ""
    told: BaseException | None = error
    while told is not None:
        trace = traceback.TracebackException.from_exception(told, capture_locals=True)
        beyond_this_test = [frame for frame in trace.stack if frame.filename != __file__]
        # Python 3.10 raises a new cancellation in the waiting task, without these frames.
        has_none = isinstance(told, asyncio.CancelledError) and sys.version_info < (3, 11)
        assert beyond_this_test or has_none
        text += repr([frame.locals for frame in beyond_this_test]) + repr(vars(told)) + str(told)
        told = told.__cause__ or told.__context__
    return text


LEAKY: dict[str, Behaviour] = {
    "closes": writes(keep=False),
    "hangs": hangs(),
    "garbage": writes(b"garbage\r\n\r\n", keep=False),
    "echoes the key": answers(
        400,
        {"error": {"code": KEY, "type": KEY, "message": f"bad key {KEY} (request id: {KEY})"}},
        x_request_id=KEY,
    ),
    "echoes the key in a page": answers(500, f"<html><title>{KEY}</title>".encode()),
    "echoes the key at the cut": answers(400, {"error": {"message": "x" * 490 + KEY}}),
    "echoes the key in a status line": writes(f"HTTP/9 {KEY}\r\n\r\n".encode(), keep=False),
}


@pytest.mark.parametrize("case", LEAKY)
async def test_no_error_shows_the_key(case: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    errors: list[KreaError] = []
    async with serving(LEAKY[case]) as server, client_for(server, timeout_s=0.2) as client:
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: buy(client),
            lambda: client.task("t"),
            lambda: client.tasks(["t", "u"]),
            client.credits,
        ]
        for call in calls:
            with pytest.raises(KreaError) as caught:
                await call()
            errors.append(caught.value)
    for error in errors:
        assert error.__cause__ is None
        assert error.__context__ is None
        assert KEY[:12] not in shown(error)
    ours = [record for record in caplog.records if not record.name.startswith("httpcore")]
    assert KEY not in "".join(record.getMessage() for record in ours)


async def test_a_cancellation_shows_no_key() -> None:
    """Its traceback contains frames of the HTTP library, whose variables hold the headers."""
    reached = asyncio.Event()
    async with serving(hangs(reached=reached)) as server, client_for(server) as client:
        purchase = asyncio.ensure_future(buy(client))
        await reached.wait()
        purchase.cancel()
        with pytest.raises(asyncio.CancelledError) as caught:
            await purchase
    assert KEY[:12] not in shown(caught.value)


async def test_the_kept_answer_of_a_purchase_does_not_contain_the_key() -> None:
    async with (
        serving(answers(200, {**CREATED, "debug": {"token": [KEY]}})) as server,
        client_for(server) as client,
    ):
        assert KEY not in json.dumps(dict((await buy(client)).answer))


async def test_the_repr_shows_the_base_url_and_no_key() -> None:
    async with KreaClient(KEY) as client:
        assert repr(client) == "KreaClient(base_url='https://api.evolink.ai', api_key=***)"
        assert KEY not in repr(vars(client))
        assert KEY not in f"{client} {client._key}"


@pytest.mark.parametrize(
    "key", ["", " ", f"{KEY}\n", f"{KEY} x", f"{KEY}\x00", f"é{KEY}", "k" * 513]
)
def test_a_key_that_cannot_be_sent_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KreaClient(key)
    assert KEY not in shown(caught.value)


async def test_cookies_of_the_api_are_not_kept() -> None:
    async with (
        serving(answers(200, status_of("t"), set_cookie="a=b; Path=/")) as server,
        client_for(server) as client,
    ):
        await client.task("t")
        await client.task("t")
    assert len(server.seen) == 2
    assert all("cookie" not in seen.headers for seen in server.seen)


async def test_a_redirect_of_the_api_is_not_followed_so_the_key_stays() -> None:
    async with serving(answers(200, status_of("t"))) as other:
        moved = answers(307, location=f"{other.url}/v1/tasks/t")
        async with serving(moved) as server, client_for(server) as client:
            with pytest.raises(NoUsableAnswer):
                await client.task("t")
            with pytest.raises(OutcomeUnknown):
                await buy(client)
    assert other.seen == []


async def test_credentials_of_netrc_are_not_sent(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    behaviour = by_path(v1=answers(200, status_of("t")), file=answers(200, b"image"))
    async with serving(behaviour) as server, client_for(server) as client:
        await client.task("t")
        await client.download(f"{server.url}/file", sink=bytearray().extend, max_bytes=100)
    assert server.seen[0].headers["authorization"] == f"Bearer {KEY}"
    assert "authorization" not in server.seen[1].headers


# -- settings ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "https://api.evolink.ai",
        "https://api.evolink.ai/",
        "https://gateway.example.com/evolink",
        "https://10.0.0.1:8443",
        "http://127.0.0.1:8000",
        "http://[::1]:8000",
        "http://192.168.1.5",
        "http://localhost:8000",
        "http://emulator:8000",
        "http://host.docker.internal:8000",
    ],
)
def test_a_base_url_is_https_or_local(url: str) -> None:
    assert str(check_base_url(url)).rstrip("/") == url.rstrip("/")


@pytest.mark.parametrize(
    "url",
    [
        "",
        "api.evolink.ai",
        "http://api.evolink.ai",
        "http://8.8.8.8",
        "http://134744072",
        "http://[::ffff:8.8.8.8]",
        "http://169.254.169.254",
        "https://169.254.169.254",
        "ftp://localhost",
        "file:///tmp/x",
        "https://user:secret@api.evolink.ai",
        "https://api.evolink.ai?x=1",
        "https://api.evolink.ai/?",
        "https://api.evolink.ai#x",
        "https://api.evolink.ai/v1",
        "https://api.evolink.ai/v1/",
        "https://a..b",
        "https://" + "x" * 64 + ".ai",
        "https://api.evolink.ai:0",
        "https://api.evolink.ai\n",
    ],
)
def test_a_base_url_that_would_expose_the_key_or_cannot_work_is_refused(url: str) -> None:
    with pytest.raises(ConfigError) as caught:
        KreaClient(KEY, base_url=url)
    assert KEY not in str(caught.value)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "setting",
    [
        {"timeout_s": 0.0},
        {"timeout_s": float("nan")},
        {"connect_timeout_s": -1.0},
        {"deadline_s": float("inf")},
        {"download_timeout_s": 0.0},
        {"max_connections": 0},
    ],
)
def test_a_limit_that_is_not_positive_and_finite_is_refused(setting: dict[str, float]) -> None:
    settings: dict[str, Any] = setting
    with pytest.raises(ConfigError, match=next(iter(setting))):
        KreaClient(KEY, **settings)


@pytest.mark.parametrize("proxy", ["bogus://u:secret@h", "socks5://u:secret@h:1"])
def test_a_proxy_that_cannot_be_used_is_refused_without_its_password(
    proxy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    with pytest.raises(ConfigError) as caught:
        KreaClient(KEY)
    assert "secret" not in str(caught.value)


def test_the_longest_answer_has_room_for_a_whole_batch() -> None:
    task = {"id": "x" * 128, "status": "completed", "results": ["https://h/" + "x" * 8192]}
    assert len(json.dumps([task] * 50)) < ANSWER_MAX_BYTES


# -- the key in answers of the server ---------------------------------------------------------

_ENCODED = quote("".join(f"%{ord(one):02X}" for one in KEY[:4]) + KEY[4:], safe="%")
#: What a server may make of the key that it was sent.
FORMS = [
    KEY,
    KEY.upper(),
    _ENCODED,
    b64encode(KEY.encode()).decode(),
    b64encode(f"Bearer {KEY}".encode()).decode(),
]


def forms_in(text: str) -> list[str]:
    return [form for form in FORMS if form.lower() in text.lower()]


@pytest.mark.parametrize("form", FORMS)
async def test_no_error_contains_the_key_in_its_code_type_message_or_request_id(form: str) -> None:
    error = {
        "code": f"invalid_key_{form}",
        "type": f"Type {form}",
        "message": f"the key {form} is wrong (request id: {form})",
        "request_id": form,
    }
    for status in (200, 400, 401, 402, 403, 404, 409, 429, 500):
        headers = {"x_request_id": f"id-{form}", "content_type": f"application/json; k={form}"}
        behaviour = answers(status, {"error": error, "success": False}, **headers)
        async with serving(behaviour) as server, client_for(server) as client:
            failures: list[KreaError] = [await failed_purchase(client)]
            for ask in (partial(client.task, "t"), client.credits):
                with pytest.raises(ApiError) as caught:
                    await ask()
                failures.append(caught.value)
        for failure in failures:
            told = f"{shown(failure)} {vars(failure)}"
            assert forms_in(told) == [], (status, type(failure))
            assert "***" in told or not getattr(failure, "code", ""), (status, type(failure))


@pytest.mark.parametrize("form", FORMS)
async def test_an_encoding_named_like_the_key_is_not_shown(form: str) -> None:
    behaviour = answers(400, b"x", content_encoding=form)
    async with serving(behaviour) as server, client_for(server) as client:
        assert forms_in(shown(await failed_purchase(client))) == []
        with pytest.raises(KreaError) as caught:
            await client.download(f"{server.url}/file", sink=bytearray().extend, max_bytes=100)
    assert forms_in(shown(caught.value)) == []


@pytest.mark.parametrize("form", FORMS)
async def test_the_kept_answer_does_not_contain_the_key_in_a_name_or_a_value(form: str) -> None:
    answer = {**CREATED, form: 1, "deep": [{f"x{form}": {"y": f"<{form}>"}}], "status": f"s-{form}"}
    answer["usage"] = {"billing_rule": form, "user_group": f"g {form}", "credits_reserved": 0.45}
    async with serving(answers(200, answer)) as server, client_for(server) as client:
        bought = await buy(client)
    assert forms_in(json.dumps(dict(bought.answer)) + f"{vars(bought)}") == []
    assert bought.answer["id"] == bought.task_id == CREATED["id"]
    assert bought.credits_reserved_units == 4_500


async def test_a_task_id_with_the_key_leaves_the_purchase_unknown() -> None:
    answer = {**CREATED, "id": f"task-{KEY.upper()}"}
    async with serving(answers(200, answer)) as server, client_for(server) as client:
        failure = await failed_purchase(client)
    assert type(failure) is OutcomeUnknown
    assert forms_in(shown(failure)) == []


@pytest.mark.parametrize("form", FORMS)
async def test_a_result_link_with_the_key_is_not_used_and_the_task_is_read_again(form: str) -> None:
    def done(task_id: str, link: str) -> dict[str, Any]:
        return {"id": task_id, "status": "completed", "results": [link]}

    both = [done("t", f"https://files.test/{form}.png"), done("u", "https://files.test/u.png")]
    behaviour = by_path(v1=answers(200, both[0]))
    async with serving(behaviour) as server, client_for(server) as client:
        with pytest.raises(NoUsableAnswer, match="the result link contains the API key") as caught:
            await client.task("t")
    assert forms_in(shown(caught.value)) == []
    async with serving(answers(200, both)) as server, client_for(server) as client:
        assert list(await client.tasks(["t", "u"])) == ["u"]
        with pytest.raises(LinkRefused) as refused:
            await client.download(both[0]["results"][0], sink=bytearray().extend, max_bytes=9)
    assert forms_in(shown(refused.value)) == []


@pytest.mark.parametrize("form", FORMS)
async def test_a_failed_or_unfinished_task_is_read_without_the_key(form: str) -> None:
    failed = {"id": "t", "status": "failed", "error": {"code": f"c_{form}", "message": form}}
    for answer in (failed, {"id": "t", "status": f"state {form}"}):
        async with serving(answers(200, answer)) as server, client_for(server) as client:
            assert forms_in(repr(await client.task("t"))) == []
    other = answers(200, {"id": f"x{KEY}", "status": "x"})
    async with serving(other) as server, client_for(server) as client:
        with pytest.raises(NoUsableAnswer) as caught:
            await client.task("t")
    assert forms_in(shown(caught.value)) == []


async def test_a_redirect_to_a_path_with_the_key_does_not_show_it() -> None:
    behaviour = by_path(file=answers(302, location=f"http://user@files.test/{KEY}"))
    async with serving(behaviour) as server, client_for(server) as client:
        with pytest.raises(LinkRefused) as caught:
            await client.download(f"{server.url}/file", sink=bytearray().extend, max_bytes=9)
    assert forms_in(shown(caught.value)) == []

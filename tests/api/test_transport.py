"""What a failure means for the purchase, for each transport, on a real socket.

The same event is another exception in every HTTP library. What counts is whether a byte of the
purchase may have left: it may be sent again only if certainly none has.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import anyio
import httpx
import psutil
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.api.transport import AiohttpTransport
from krea_dagster.errors import NotSent, OutcomeUnknown, SubmitError
from tests.api.loopback_server import (
    CREATED,
    IDEMPOTENCY_KEY,
    KEY,
    REQUEST,
    Behaviour,
    ReceivedRequest,
    answers,
    closed_port,
    drips,
    hangs,
    listening,
    serving,
    writes,
)

pytestmark = pytest.mark.anyio

LONG_REQUEST = replace(REQUEST, prompt="a red cube " * 90)

MakeClient = Callable[..., KreaClient]


@pytest.fixture(params=["aiohttp", "httpx"])
def make_client(request: pytest.FixtureRequest) -> MakeClient:
    """Return clients with the default transport, and with httpx's own."""

    def make(url: str, *, max_connections: int = 16, **settings: Any) -> KreaClient:
        if request.param == "httpx":
            most = httpx.Limits(max_connections=max_connections)
            settings["transport"] = httpx.AsyncHTTPTransport(limits=most)
        return KreaClient(KEY, base_url=url, max_connections=max_connections, **settings)

    return make


async def failed(client: KreaClient) -> type[SubmitError]:
    with pytest.raises(SubmitError) as caught:
        await client.submit(LONG_REQUEST, idempotency_key=IDEMPOTENCY_KEY)
    return type(caught.value)


# -- certainly not sent -----------------------------------------------------------------------


async def test_a_refused_connection(make_client: MakeClient) -> None:
    async with make_client(f"http://127.0.0.1:{closed_port()}") as client:
        assert await failed(client) is NotSent


async def test_a_name_that_does_not_resolve(make_client: MakeClient) -> None:
    async with make_client("https://api.evolink.invalid") as client:
        assert await failed(client) is NotSent


async def test_a_connection_that_is_not_accepted_in_time(make_client: MakeClient) -> None:
    """The queue of the listener is full, so the system does not answer."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        fillers = [socket.socket() for _ in range(8)]
        for filler in fillers:
            filler.setblocking(False)
            filler.connect_ex(listener.getsockname())
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        async with make_client(url, connect_timeout_s=0.1, timeout_s=5.0) as client:
            assert await failed(client) is NotSent
        for filler in fillers:
            filler.close()


async def test_a_tls_handshake_that_fails(make_client: MakeClient) -> None:
    async def hangs_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 No\r\n\r\n")
        writer.close()

    async with listening(hangs_up) as port, make_client(f"https://127.0.0.1:{port}") as client:
        assert await failed(client) is NotSent


async def test_a_tls_handshake_that_hangs(make_client: MakeClient) -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with (
        listening(silent) as port,
        make_client(f"https://127.0.0.1:{port}", connect_timeout_s=0.1) as client,
    ):
        assert await failed(client) is NotSent


async def test_no_free_connection_in_time(make_client: MakeClient) -> None:
    found: list[type[SubmitError]] = []
    until = asyncio.Event()
    async with (
        serving(drips(until=until)) as server,
        make_client(server.url, max_connections=1, timeout_s=0.3) as client,
    ):

        async def buy() -> None:
            found.append(await failed(client))
            until.set()

        async with anyio.create_task_group() as group:
            group.start_soon(buy)
            group.start_soon(buy)
    assert len(server.seen) == 1
    assert {kind.__name__ for kind in found} == {"NotSent", "OutcomeUnknown"}


async def test_a_proxy_that_opens_no_tunnel(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(answers(407)) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:secret@"))
        async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
            assert await failed(client) is NotSent
    (seen,) = proxy.seen
    assert seen.method == "CONNECT"
    assert seen.headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"
    assert "authorization" not in seen.headers


async def test_a_proxy_that_is_unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{closed_port()}")
    async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
        assert await failed(client) is NotSent


async def test_a_deadline_that_passes_while_connecting() -> None:
    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    async with (
        listening(silent) as port,
        KreaClient(KEY, base_url=f"https://127.0.0.1:{port}", deadline_s=0.2) as client,
    ):
        assert await failed(client) is NotSent


# -- sent, or in doubt ------------------------------------------------------------------------


def _reset(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> None:
    """Close with a reset."""
    linger = struct.pack("ii", 1, 0)
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    writer.transport.abort()


async def resets(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
    _reset(seen, writer)
    return False


IN_DOUBT: dict[str, Behaviour] = {
    "the server reads the purchase and closes in silence": writes(keep=False),
    "the server reads the purchase and resets the connection": resets,
    "the server never answers": hangs(),
    "the status line is garbage": writes(b"garbage\r\n\r\n", keep=False),
    "the head breaks off": writes(b"HTTP/1.1 200 OK\r\nContent-Le", keep=False),
    "the head is too long": writes(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 200_000, keep=False),
    "the body breaks off": writes(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", keep=False),
    "the chunks are damaged": writes(
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", keep=False
    ),
    "the body hangs": hangs(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"),
}


@pytest.mark.parametrize("case", IN_DOUBT)
async def test_in_doubt_if(make_client: MakeClient, case: str) -> None:
    async with serving(IN_DOUBT[case]) as server, make_client(server.url, timeout_s=0.3) as client:
        assert await failed(client) is OutcomeUnknown
    assert len(server.seen) == 1


async def test_in_doubt_if_the_connection_is_reset_while_the_purchase_is_sent(
    make_client: MakeClient,
) -> None:
    async def cut(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(20)
        _reset(None, writer)  # type: ignore[arg-type]  # no whole request was read

    async with listening(cut) as port, make_client(f"http://127.0.0.1:{port}") as client:
        assert await failed(client) is OutcomeUnknown


@pytest.mark.parametrize("ending", [writes(keep=False), resets])
async def test_a_purchase_on_a_kept_connection_that_ends_is_not_repeated(
    make_client: MakeClient, ending: Behaviour
) -> None:
    """Libraries repeat requests on closed connections. A purchase must not be repeated."""
    purchases = iter([answers(200, CREATED), ending])

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(purchases)(seen, writer)

    async with serving(behave) as server, make_client(server.url) as client:
        await client.submit(LONG_REQUEST, idempotency_key=IDEMPOTENCY_KEY)
        assert await failed(client) is OutcomeUnknown
    assert len(server.seen) == 2
    assert server.connections == 1


async def test_a_library_that_bypasses_the_connector_is_not_believed() -> None:
    """Nothing is certain if the connector was not used."""
    async with KreaClient(KEY, base_url="http://127.0.0.1:1") as client:

        class Other:
            async def request(self, *_: object, **__: object) -> None:
                raise ConnectionRefusedError("no connection, it says")

            async def close(self) -> None: ...

        client._transport._direct = Other()  # type: ignore[attr-defined]
        assert await failed(client) is OutcomeUnknown


# -- requests ---------------------------------------------------------------------------------


async def test_an_http_request_through_a_proxy_has_the_proxys_password(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with serving(answers(200, CREATED)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:secret@"))
        async with KreaClient(KEY, base_url="http://api.evolink.internal") as client:
            await client.submit(LONG_REQUEST, idempotency_key=IDEMPOTENCY_KEY)
    (seen,) = proxy.seen
    assert seen.target == "http://api.evolink.internal/v1/images/generations"
    assert seen.headers["proxy-authorization"] == "Basic bWU6c2VjcmV0"


async def test_a_purchase_over_tls_whose_answer_is_cut_is_in_doubt(
    tls: ssl.SSLContext, make_client: MakeClient
) -> None:
    async with serving(writes(keep=False), tls) as server, make_client(server.url) as client:
        assert await failed(client) is OutcomeUnknown
    assert len(server.seen) == 1


async def test_cut_answers_over_tls_leave_no_connection_open(
    tls: ssl.SSLContext, make_client: MakeClient
) -> None:
    async with serving(writes(keep=False), tls) as server, make_client(server.url) as client:
        for _ in range(10):
            assert await failed(client) is OutcomeUnknown
        with anyio.fail_after(30):
            while _connected_to(server.port):  # noqa: ASYNC110 - nothing announces it
                await anyio.sleep(0.01)


def _connected_to(port: int) -> list[object]:
    open_ones = psutil.Process().net_connections("tcp4")
    return [one for one in open_ones if one.raddr and port in (one.laddr.port, one.raddr.port)]


async def test_an_untrusted_certificate(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    async with (
        serving(answers(200, CREATED), tls) as server,
        KreaClient(KEY, base_url=server.url) as client,
    ):
        assert await failed(client) is NotSent
    assert server.seen == []


# -- the transport under httpx.AsyncClient ------------------------------------------------------

FAILURES: dict[str, tuple[Behaviour, type[httpx.TransportError]]] = {
    "closes in silence": (writes(keep=False), httpx.RemoteProtocolError),
    "never answers": (hangs(), httpx.ReadTimeout),
    "answers garbage": (writes(b"garbage\r\n\r\n", keep=False), httpx.RemoteProtocolError),
    "breaks off": (
        writes(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx", keep=False),
        httpx.RemoteProtocolError,
    ),
    "stops": (hangs(b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nx"), httpx.ReadTimeout),
}


@pytest.mark.parametrize("case", FAILURES)
async def test_a_request_that_was_sent_is_never_a_failure_to_connect(case: str) -> None:
    behaviour, error = FAILURES[case]
    # Only a server that never answers is waited for in vain. On a busy machine, a connection and an
    # answer may take longer.
    timeout = httpx.Timeout(60, read=0.3 if error is httpx.ReadTimeout else 60)
    async with (
        serving(behaviour) as server,
        httpx.AsyncClient(transport=AiohttpTransport(), timeout=timeout) as http,
    ):
        with pytest.raises(httpx.TransportError) as caught:
            await http.post(server.url, content=b"purchase")
    assert type(caught.value) is error


async def test_an_httpx_client_can_use_the_transport() -> None:
    async with (
        serving(answers(200, {"a": 1}, set_cookie="a=b")) as server,
        httpx.AsyncClient(transport=AiohttpTransport()) as http,
    ):
        response = await http.post(server.url, json={"b": 2}, headers={"X-Own": "1"})
        assert (response.status_code, response.json()) == (200, {"a": 1})
        async with http.stream("GET", server.url) as streamed:
            assert await streamed.aread() == b'{"a": 1}'
    assert server.seen[0].json == {"b": 2}
    assert server.seen[0].headers["x-own"] == "1"
    assert server.connections == 1


async def test_a_connection_is_released_for_any_end_of_a_request() -> None:
    endings = iter([writes(keep=False), hangs(), answers(200, b"x" * 100_000), answers(200, b"x")])

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(endings)(seen, writer)

    transport = AiohttpTransport(max_connections=1)
    async with (
        serving(behave) as server,
        httpx.AsyncClient(transport=transport, timeout=60) as http,
    ):
        for _ in range(2):
            with pytest.raises(httpx.TransportError):
                await http.get(server.url, timeout=httpx.Timeout(60, read=0.2))
        async with http.stream("GET", server.url):
            pass  # the body is left unread
        assert (await http.get(server.url)).content == b"x"


async def test_a_get_is_repeated_if_a_kept_connection_was_closed_and_a_post_is_not() -> None:
    endings = iter([answers(200), writes(keep=False), answers(200), writes(keep=False)])

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await next(endings)(seen, writer)

    async with serving(behave) as server, httpx.AsyncClient(transport=AiohttpTransport()) as http:
        await http.get(server.url)
        assert (await http.get(server.url)).status_code == 200
        with pytest.raises(httpx.RemoteProtocolError):
            await http.post(server.url, content=b"purchase")
    assert [seen.method for seen in server.seen] == ["GET", "GET", "GET", "POST"]

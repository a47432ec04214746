"""Why no connection was made: the attribute ``cause``, and a message with advice."""

from __future__ import annotations

import asyncio
import io
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import anyio
import httpx
import pytest
import trustme

from krea_dagster.api import KreaClient
from krea_dagster.errors import Cause, NotSent, NoUsableAnswer, NoUsableBody, OutcomeUnknown
from tests.api.loopback_server import (
    IDEMPOTENCY_KEY,
    KEY,
    REQUEST,
    Behaviour,
    ReceivedRequest,
    answers,
    closed_port,
    drips,
    hangs,
    serving,
    writes,
)

pytestmark = pytest.mark.anyio


async def not_sent(client: KreaClient) -> NotSent:
    """Return the failure of a purchase, and check that a read fails for the same cause."""
    with pytest.raises(NotSent) as caught:
        await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
    with pytest.raises(NoUsableAnswer) as asked:
        await client.credits()
    assert asked.value.cause == caught.value.cause
    assert asked.value.message == caught.value.message
    return caught.value


@pytest.fixture
def untrusted() -> ssl.SSLContext:
    """Return the server's side of TLS, with a certificate that the client does not trust."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    trustme.CA().issue_cert("127.0.0.1", "localhost").configure_cert(context)
    return context


# -- certificates -----------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [None, httpx.AsyncHTTPTransport])
async def test_a_certificate_that_is_not_trusted(
    untrusted: ssl.SSLContext, transport: Callable[[], httpx.AsyncBaseTransport] | None
) -> None:
    settings: dict[str, Any] = {} if transport is None else {"transport": transport()}
    async with (
        serving(answers(200, {}), untrusted) as server,
        KreaClient(KEY, base_url=server.url, **settings) as client,
    ):
        error = await not_sent(client)
    assert error.cause == "certificate"
    assert "the certificate of 127.0.0.1 was refused: " in error.message
    assert "certificate" in error.message.partition("refused: ")[2].partition(";")[0]
    assert "set SSL_CERT_FILE" in error.message
    assert server.seen == []


async def test_a_certificate_of_a_file_host_that_is_not_trusted(untrusted: ssl.SSLContext) -> None:
    async with (
        serving(answers(200, b"x"), untrusted) as server,
        KreaClient(KEY, base_url="http://127.0.0.1:1") as client,
    ):
        with pytest.raises(NoUsableBody, match=r"certificate of 127\.0\.0\.1 was refused"):
            await client.download(server.url, sink=io.BytesIO(), max_bytes=9)


async def test_the_error_for_a_certificate_of_another_name_says_so(
    tls: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(answers(200, {}), tls) as server:
        url = server.url.replace("127.0.0.1", "localhost")
        async with KreaClient(KEY, base_url=url) as client:
            error = await not_sent(client)
    assert error.cause == "certificate"
    assert "localhost" in error.message


# -- proxies ----------------------------------------------------------------------------------


BROKEN: dict[str, Behaviour] = {
    "wants another password": answers(407),
    "may not go there": answers(403, b"<html>"),
    "answers garbage": writes(b"garbage\r\n\r\n", keep=False),
    "closes in silence": writes(keep=False),
    "never answers": hangs(),
    "echoes the password": writes(b"HTTP/1.1 502 \x1b[31mhunter2\r\nContent-Length: 0\r\n\r\n"),
}


@pytest.mark.parametrize("case", BROKEN)
async def test_a_proxy_that_fails_is_shown_without_its_password(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(BROKEN[case]) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//me:s3cretword@"))
        async with KreaClient(
            KEY, base_url="https://api.evolink.invalid", connect_timeout_s=0.2, timeout_s=0.6
        ) as client:
            error = await not_sent(client)
    assert error.cause == "proxy"
    assert f"the proxy {proxy.url}" in error.message
    assert "check HTTPS_PROXY, ALL_PROXY and NO_PROXY" in error.message
    assert "s3cretword" not in f"{error} {vars(error)}"
    assert "\x1b" not in str(error)
    assert {seen.method for seen in proxy.seen} == {"CONNECT"}


@pytest.mark.parametrize("host", ["127.0.0.1", "proxy.invalid"])
async def test_a_proxy_that_is_unreachable(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port = closed_port()
    monkeypatch.setenv("ALL_PROXY", f"http://me:s3cretword@{host}:{port}")
    async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
        error = await not_sent(client)
    assert error.cause == "proxy"
    assert f"the proxy http://{host}:{port}" in error.message
    assert "s3cretword" not in str(error)


async def test_a_proxy_that_reads_an_http_purchase_and_closes_leaves_it_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without a tunnel the proxy receives the purchase, and may have forwarded it."""
    async with serving(writes(keep=False)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        async with KreaClient(KEY, base_url="http://api.evolink.internal") as client:
            with pytest.raises(OutcomeUnknown):
                await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
    assert len(proxy.seen) == 1


async def test_a_certificate_refused_behind_a_proxy_is_a_certificate_error(
    untrusted: ssl.SSLContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(answers(200, {}), untrusted) as server:

        async def tunnel(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
            """Forward bytes both ways, without the stream that has read the CONNECT."""
            loop = asyncio.get_running_loop()
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            inward = writer.get_extra_info("socket").dup()
            there = socket.create_connection(("127.0.0.1", server.port))
            there.setblocking(False)

            async def pump(source: socket.socket, target: socket.socket) -> None:
                with suppress(OSError):
                    while data := await loop.sock_recv(source, 65536):
                        await loop.sock_sendall(target, data)
                group.cancel_scope.cancel()

            with inward, there:
                async with anyio.create_task_group() as group:
                    group.start_soon(pump, there, inward)
                    group.start_soon(pump, inward, there)
            return False

        async with serving(tunnel) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", proxy.url)
            async with KreaClient(KEY, base_url="https://api.evolink.invalid") as client:
                error = await not_sent(client)
    assert error.cause == "certificate"
    assert "the certificate of api.evolink.invalid was refused" in error.message


# -- other causes -----------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [None, httpx.AsyncHTTPTransport])
@pytest.mark.parametrize(
    ("url", "cause", "words"),
    [
        ("https://api.evolink.invalid", "name", "the name api.evolink.invalid was not found"),
        ("http://127.0.0.1:PORT", "connection", "no connection to 127.0.0.1"),
        ("https://127.0.0.1:PORT", "connection", "no connection to 127.0.0.1"),
    ],
)
async def test_an_unknown_name_or_an_unreachable_host(
    transport: Callable[[], httpx.AsyncBaseTransport] | None, url: str, cause: Cause, words: str
) -> None:
    settings: dict[str, Any] = {} if transport is None else {"transport": transport()}
    url = url.replace("PORT", str(closed_port()))
    async with KreaClient(KEY, base_url=url, **settings) as client:
        error = await not_sent(client)
    assert error.cause == cause
    assert words in error.message


async def test_no_connection_becomes_free() -> None:
    reached, until = asyncio.Event(), asyncio.Event()
    async with (
        serving(drips(reached=reached, until=until)) as server,
        KreaClient(KEY, base_url=server.url, max_connections=1, timeout_s=0.2) as client,
    ):
        holder = asyncio.ensure_future(client._get_answer("GET", "/v1/credits"))
        await reached.wait()
        with pytest.raises(NotSent, match=r"no connection was free for 0\.2 s") as caught:
            await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
        assert caught.value.cause == "pool"
        until.set()
        with pytest.raises(NoUsableAnswer) as asked:
            await holder
        assert asked.value.cause is None

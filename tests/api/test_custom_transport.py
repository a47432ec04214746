"""A client over a custom transport, which sends all requests to the API and to file hosts."""

from __future__ import annotations

import asyncio
import io
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.errors import LinkRefused, NotSent, NoUsableBody, OutcomeUnknown
from tests.api.loopback_server import IDEMPOTENCY_KEY, KEY, REQUEST

pytestmark = pytest.mark.anyio

IMAGE = bytes(range(256)) * 1000
LINK = "https://files.evolink.ai/a.png?sign=secret"


class FakeEvoLink:
    """EvoLink and its file host as a request handler."""

    def __init__(self) -> None:
        self.seen: list[httpx.Request] = []

    def __call__(self, request: httpx.Request) -> httpx.Response:
        self.seen.append(request)
        match (request.url.host, request.method):
            case ("api.evolink.ai", "POST"):
                return httpx.Response(200, json={"id": "t", "status": "pending"})
            case ("api.evolink.ai", _):
                done = {"id": "t", "status": "completed", "results": [LINK]}
                return httpx.Response(200, json=done)
        return httpx.Response(200, content=IMAGE, headers={"Content-Type": "image/png"})


def over(handler: Callable[[httpx.Request], Any], **settings: Any) -> KreaClient:
    return KreaClient(KEY, transport=httpx.MockTransport(handler), **settings)


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every lookup of a name and every thread fail."""

    def forbidden(*_: object, **__: object) -> None:
        raise AssertionError("the network or a thread was used")

    monkeypatch.setattr(socket, "getaddrinfo", forbidden)
    monkeypatch.setattr(threading.Thread, "start", forbidden)


async def test_an_image_is_bought_read_and_downloaded_without_network_or_threads(
    no_network: None, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    world, got = FakeEvoLink(), io.BytesIO()
    async with over(world) as client:
        bought = await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
        task = await client.task(bought.task_id)
        download = await client.download(task.results[0], sink=got, max_bytes=1_000_000)
    assert got.getvalue() == IMAGE
    assert (download.size_bytes, download.content_type) == (len(IMAGE), "image/png")
    *api, file = world.seen
    assert [request.headers["authorization"] for request in api] == [f"Bearer {KEY}"] * 2
    assert "authorization" not in file.headers
    assert KEY not in str(file.headers.raw)
    assert "secret" not in caplog.text
    assert KEY not in caplog.text


async def test_errors_of_a_mock_are_believed_like_those_of_httpx() -> None:
    errors = {httpx.ConnectError: NotSent, httpx.ReadError: OutcomeUnknown, OSError: OutcomeUnknown}
    for raised, meant in errors.items():

        def fails(_: httpx.Request, raised: type[Exception] = raised) -> httpx.Response:
            raise raised("no")

        async with over(fails) as client:
            with pytest.raises(meant):
                await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
            with pytest.raises(NoUsableBody):
                await client.download(LINK, sink=io.BytesIO(), max_bytes=9)


@pytest.mark.parametrize(
    "host", ["169.254.169.254", "10.0.0.1", "2130706433", "[::1]", "meta.test"]
)
async def test_an_address_that_this_machine_can_resolve_is_checked_before(host: str) -> None:
    async def names(name: str, _port: int) -> list[str]:
        known = {"api.evolink.ai": "8.8.8.8", "2130706433": "127.0.0.1", "meta.test": "10.0.0.9"}
        return [known[name]]

    world = FakeEvoLink()
    async with over(world, resolve=names) as client:
        with pytest.raises(LinkRefused):
            await client.download(f"https://{host}/a.png", sink=io.BytesIO(), max_bytes=9)
    assert world.seen == []


async def test_a_written_out_private_address_is_not_fetched_if_names_cannot_be_resolved() -> None:
    world = FakeEvoLink()
    async with over(world) as client:
        with pytest.raises(NoUsableBody):
            await client.download("https://169.254.169.254/", sink=io.BytesIO(), max_bytes=9)
    assert world.seen == []


async def test_the_body_of_a_mock_may_be_a_stream_and_too_short() -> None:
    async def parts() -> AsyncIterator[bytes]:
        yield IMAGE[:1000]

    def short(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, headers={"Content-Length": "2000"}, content=parts())

    async with over(short) as client:
        with pytest.raises(NoUsableBody, match="1000 of 2000"):
            await client.download(LINK, sink=io.BytesIO(), max_bytes=9000)


async def test_silence_of_a_mock_without_time_limits_ends_a_download() -> None:
    async def silent(_: httpx.Request) -> httpx.Response:
        await asyncio.Event().wait()
        raise AssertionError

    async with over(silent, download_timeout_s=0.05) as client:
        with pytest.raises(NoUsableBody, match=r"no byte came for 0\.05 s"):
            await client.download(LINK, sink=io.BytesIO(), max_bytes=9000)


async def test_a_transport_that_serves_the_api_and_the_files_is_closed_once() -> None:
    closed: list[object] = []

    class Counted(httpx.MockTransport):
        async def aclose(self) -> None:
            closed.append(self)

    async with KreaClient(KEY, transport=Counted(FakeEvoLink())) as client:
        await client.task("t")
    assert len(closed) == 1

"""Slow downloads: silence and too low a speed end one, its length does not; it is resumed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import httpx
import pytest

from krea_dagster.api import Download, KreaClient
from krea_dagster.api.download import RESUMED_MAX
from krea_dagster.errors import LinkExpired, NoUsableBody
from tests.api.loopback_server import KEY, Behaviour, ReceivedRequest, answers, message, serving

pytestmark = pytest.mark.anyio

LOCAL_API = "http://127.0.0.1:1"
IMAGE = bytes(range(256)) * 1000

# -- a slow line ------------------------------------------------------------------------------


class SharedConnection:
    """A shared connection with a limited number of bytes a second."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at_s = 0.0

    async def carry(self, writer: asyncio.StreamWriter, data: bytes, piece_bytes: int) -> None:
        for start in range(0, len(data), piece_bytes):
            piece = data[start : start + piece_bytes]
            self._free_at_s = max(self._free_at_s, time.monotonic())
            self._free_at_s += len(piece) / self._bytes_per_s
            await asyncio.sleep(self._free_at_s - time.monotonic())
            writer.write(piece)
            await writer.drain()


async def test_64_files_of_6_mb_arrive_over_half_a_megabyte_a_second() -> None:
    """Bytes and times are both 1/100: files of 60 KB, and silence of 0.6 s instead of 60 s."""
    scale = 100
    image = IMAGE[: 6_000_000 // scale]
    line = SharedConnection(500_000)

    async def behave(_: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        writer.write(message(200, image)[: -len(image)])
        await line.carry(writer, image, piece_bytes=500)
        return True

    async with (
        serving(behave) as server,
        KreaClient(KEY, base_url=LOCAL_API, download_timeout_s=60 / scale) as client,
    ):
        done = await asyncio.gather(*(download(client, server.url) for _ in range(64)))
    assert [data for data, _ in done] == [image] * 64
    assert len(server.seen) == 64


async def download(client: KreaClient, url: str) -> tuple[bytes, Download]:
    got = io.BytesIO()
    done = await client.download(url, sink=got, max_bytes=1_000_000)
    return got.getvalue(), done


# -- silence and low speed, on a clock that the test moves --------------------------------------


class FakeHost:
    """A file host as a request handler, and a clock that its bytes move."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.running = 0
        self.most_running = 0

    def monotonic(self) -> float:
        return self.now_s

    async def trickle(self, pieces: int, piece_bytes: int, each_s: float) -> AsyncIterator[bytes]:
        for _ in range(pieces):
            self.now_s += each_s
            yield b"x" * piece_bytes

    def client(self, handler: Callable[[httpx.Request], Any], **settings: Any) -> KreaClient:
        return KreaClient(
            KEY, transport=httpx.MockTransport(handler), monotonic=self.monotonic, **settings
        )


LINK = "https://files.evolink.ai/a.png"


async def test_a_body_that_keeps_coming_has_no_deadline() -> None:
    """Nine hours, at 2 KB/s."""
    host = FakeHost()

    def slow(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=host.trickle(540, 120_000, each_s=60.0))

    async with host.client(slow) as client:
        done = await client.download(LINK, sink=len, max_bytes=100_000_000)
    assert done.size_bytes == 540 * 120_000
    assert host.now_s == 9 * 3600


async def test_a_body_that_is_too_slow_ends_and_halves_the_limit() -> None:
    host = FakeHost()

    def crawl(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=host.trickle(10_000, 1, each_s=1.0))

    async with host.client(crawl, max_connections=4) as client:
        with pytest.raises(NoUsableBody, match="fewer than 1024 bytes a second"):
            await client.download(LINK, sink=len, max_bytes=1_000_000)
        assert client._files._limit.number == 2
    assert host.now_s == 60


async def test_a_slow_sink_is_neither_silence_nor_too_slow() -> None:
    host = FakeHost()

    def quick(_: httpx.Request) -> httpx.Response:
        return httpx.Response(200, content=host.trickle(3, 100_000, each_s=0.1))

    async def sink(_: bytes) -> None:
        host.now_s += 600.0
        await asyncio.sleep(0.15)

    async with host.client(quick, download_timeout_s=0.1) as client:
        done = await client.download(LINK, sink=sink, max_bytes=10_000_000)
    assert done.size_bytes == 300_000


async def test_silence_halves_the_limit_and_each_success_adds_one() -> None:
    host = FakeHost()
    silent = True

    async def answer(_: httpx.Request) -> httpx.Response:
        host.running += 1
        host.most_running = max(host.most_running, host.running)
        try:
            if silent:
                await asyncio.Event().wait()
            await anyio.lowlevel.checkpoint()
            return httpx.Response(200, content=b"x")
        finally:
            host.running -= 1

    async def fetch(client: KreaClient) -> bool:
        try:
            await client.download(LINK, sink=len, max_bytes=9)
        except NoUsableBody:
            return False
        return True

    async with host.client(answer, max_connections=8, download_timeout_s=0.02) as client:
        assert not any(await asyncio.gather(*(fetch(client) for _ in range(8))))
        assert (host.most_running, client._files._limit.number) == (8, 4)
        silent, host.most_running = False, 0
        assert all(await asyncio.gather(*(fetch(client) for _ in range(4))))
        assert (host.most_running, client._files._limit.number) == (4, 8)


async def test_waiting_for_a_place_does_not_count_as_download_time() -> None:
    """Five downloads one after another, each of which takes most of the allowed time."""

    async def slowish(_: httpx.Request) -> httpx.Response:
        await asyncio.sleep(0.06)
        return httpx.Response(200, content=b"x")

    async with FakeHost().client(slowish, max_connections=1, download_timeout_s=0.25) as client:
        calls = (client.download(LINK, sink=len, max_bytes=9) for _ in range(5))
        assert len(await asyncio.gather(*calls)) == 5


# -- resuming ---------------------------------------------------------------------------------


class ResumingHost:
    """A host that cuts each answer after a number of bytes, and answers range requests."""

    def __init__(self, cut_after: list[int], **headers: str) -> None:
        self.cuts = iter(cut_after)
        self.headers = headers
        self.taken = asyncio.Event()

    async def __call__(self, seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        start = int(seen.headers.get("range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        rest = IMAGE[start:]
        headers = dict(self.headers)
        if "range" in seen.headers:
            headers["content_range"] = f"bytes {start}-{len(IMAGE) - 1}/{len(IMAGE)}"
        whole = message(206 if start else 200, rest, **headers)
        head = len(whole) - len(rest)
        cut = next(self.cuts, len(rest))
        self.taken.clear()
        writer.write(whole[: head + cut])
        await writer.drain()
        if cut == len(rest):
            return True
        await self.taken.wait()  # else the reset could overtake the sent bytes
        return False

    async def fetch(self, url: str, **settings: Any) -> tuple[bytes, Download]:
        """Fetch the image, and let the host continue once a piece has come."""
        got = bytearray()

        def sink(piece: bytes) -> None:
            got.extend(piece)
            self.taken.set()

        async with KreaClient(KEY, base_url=LOCAL_API, **settings) as client:
            done = await client.download(url, sink=sink, max_bytes=1_000_000)
        return bytes(got), done


TAG = '"v1"'


@pytest.mark.parametrize("accept_ranges", [{"accept_ranges": "bytes"}, {}])
async def test_a_download_is_resumed_where_it_broke_off(accept_ranges: dict[str, str]) -> None:
    host = ResumingHost([70_000, 80_000], etag=TAG, **accept_ranges)
    async with serving(host) as server:
        got, done = await host.fetch(server.url)
    assert got == IMAGE
    assert done.size_bytes == len(IMAGE)
    assert done.sha256 == hashlib.sha256(IMAGE).hexdigest()
    first, *others = server.seen
    assert "range" not in first.headers
    assert [seen.headers["if-range"] for seen in others] == [TAG, TAG]
    assert [seen.headers["range"] for seen in others] == ["bytes=70000-", "bytes=150000-"]


async def test_a_download_that_went_silent_is_resumed_too() -> None:
    async def silent(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        if "range" in seen.headers:
            return await host(seen, writer)
        whole = message(200, IMAGE, etag=TAG)
        writer.write(whole[: len(whole) - len(IMAGE) + 70_000])
        await asyncio.Event().wait()
        return False

    host = ResumingHost([], etag=TAG)
    async with serving(silent) as server:
        got, _ = await host.fetch(server.url, download_timeout_s=0.2)
    assert got == IMAGE


async def test_a_download_is_resumed_a_limited_number_of_times() -> None:
    host = ResumingHost([66_000] + [20_000] * 20, etag=TAG)
    host.taken.set()

    async def cuts(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        await host(seen, writer)
        return False

    host.taken.wait = lambda: asyncio.sleep(0.02)  # type: ignore[assignment, method-assign, return-value]  # pieces below 64 KiB wait
    async with serving(cuts) as server:
        with pytest.raises(NoUsableBody):
            await host.fetch(server.url)
    assert len(server.seen) == 1 + RESUMED_MAX


@pytest.mark.parametrize(
    "headers", [{}, {"etag": 'W/"v1"'}, {"etag": TAG, "accept_ranges": "none"}]
)
async def test_a_host_that_cannot_resume_gets_one_request(headers: dict[str, str]) -> None:
    host = ResumingHost([70_000], **headers)
    async with serving(host) as server:
        with pytest.raises(NoUsableBody):
            await host.fetch(server.url)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    ("rest", "error"),
    [
        (answers(200, IMAGE, etag=TAG), NoUsableBody),
        (
            answers(206, IMAGE[70_000:], etag='"v2"', content_range="bytes 70000-255999/256000"),
            NoUsableBody,
        ),
        (
            answers(206, IMAGE[70_000:], etag=TAG, content_range="bytes 0-255999/256000"),
            NoUsableBody,
        ),
        (
            answers(206, IMAGE[70_000:], etag=TAG, content_range="bytes 70000-256000/256001"),
            NoUsableBody,
        ),
        (answers(206, IMAGE[70_000:], etag=TAG), NoUsableBody),
        (answers(416), NoUsableBody),
        (answers(503), NoUsableBody),
        (answers(403), LinkExpired),
    ],
)
async def test_a_rest_of_another_file_is_not_used(rest: Behaviour, error: type[Exception]) -> None:
    host = ResumingHost([70_000], etag=TAG)

    async def behave(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        return await (rest if "range" in seen.headers else host)(seen, writer)

    async with serving(behave) as server:
        with pytest.raises(error):
            await host.fetch(server.url)
    assert len(server.seen) == 2

"""Downloads over real sockets: every limit is enforced, and a body arrives as it was sent."""

from __future__ import annotations

import asyncio
import gzip
import hashlib
import io
import socket
import ssl
import zlib
from collections.abc import Sequence
from typing import Any

import pytest

from krea_dagster.api import Download, KreaClient
from krea_dagster.api.decompress import CHUNK_BYTES, Decompressor
from krea_dagster.errors import ConfigError, DownloadError, LinkExpired, LinkRefused, NoUsableBody
from tests.api.loopback_server import (
    KEY,
    Behaviour,
    ReceivedRequest,
    answers,
    by_path,
    closed_port,
    floods,
    hangs,
    message,
    serving,
    writes,
)

pytestmark = pytest.mark.anyio

LOCAL_API = "http://127.0.0.1:1"
PUBLIC_API = "https://api.evolink.ai"
IMAGE = bytes(range(256)) * 1000


class FakeResolver:
    """A resolver with fixed names that counts its calls."""

    def __init__(self, **known: list[str]) -> None:
        self.known = {name.replace("_", "."): found for name, found in known.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, _port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.known:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        return self.known[host]


async def fetch(
    url: str, base_url: str = LOCAL_API, max_bytes: int = 1_000_000, **settings: Any
) -> tuple[bytes, Download]:
    got = io.BytesIO()
    async with KreaClient(KEY, base_url=base_url, **settings) as client:
        download = await client.download(url, sink=got, max_bytes=max_bytes)
    return got.getvalue(), download


async def failed_fetch(
    url: str, base_url: str = LOCAL_API, max_bytes: int = 1_000_000, **settings: Any
) -> DownloadError:
    with pytest.raises(DownloadError) as caught:
        await fetch(url, base_url, max_bytes, **settings)
    return caught.value


# -- a whole body -----------------------------------------------------------------------------


async def test_a_body_arrives_as_it_was_sent_with_its_hash() -> None:
    behaviour = answers(200, IMAGE, content_type="Image/PNG; x=y")
    async with serving(behaviour) as server:
        got, download = await fetch(f"{server.url}/a/b.png?sig=1#top")
    assert got == IMAGE
    assert download == Download(
        size_bytes=len(IMAGE),
        sha256=hashlib.sha256(IMAGE).hexdigest(),
        content_type="image/png",
        url=f"{server.url}/a/b.png?sig=1",
    )


async def test_the_sink_gets_few_and_large_pieces() -> None:
    pieces: list[bytes] = []
    slices = [IMAGE[start : start + 1000] for start in range(0, len(IMAGE), 1000)]
    behaviour = writes(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n", *slices, keep=False)
    async with serving(behaviour) as server, KreaClient(KEY, base_url=LOCAL_API) as client:
        await client.download(server.url, sink=pieces.append, max_bytes=1_000_000)
    assert b"".join(pieces) == IMAGE
    assert all(len(piece) >= CHUNK_BYTES for piece in pieces[:-1])


async def test_neither_key_nor_cookie_is_sent_to_a_file_host() -> None:
    async with (
        serving(answers(200, b"x", set_cookie="a=b")) as server,
        KreaClient(KEY, base_url=server.url) as client,
    ):
        for _ in range(2):
            await client.download(f"{server.url}/f", sink=io.BytesIO(), max_bytes=9)
    for seen in server.seen:
        agent = seen.headers.pop("user-agent")
        assert agent.startswith("Mozilla/5.0 (compatible; krea-dagster/")
        assert seen.headers == {
            "host": f"127.0.0.1:{server.port}",
            "accept": "*/*",
            "accept-encoding": "identity",
        }
    assert server.connections == 1


async def test_errors_of_the_sink_pass_through() -> None:
    def full(_: bytes) -> None:
        raise OSError(28, "No space left on device")

    async with serving(answers(200, IMAGE)) as server, KreaClient(KEY, base_url=LOCAL_API) as api:
        with pytest.raises(OSError, match="No space left"):
            await api.download(server.url, sink=full, max_bytes=1_000_000)


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress(IMAGE)),
        ("x-gzip", gzip.compress(IMAGE)),
        ("deflate", zlib.compress(IMAGE)),
        ("identity", IMAGE),
    ],
)
async def test_a_compressed_body_that_was_not_requested_is_decompressed(
    encoding: str, packed: bytes
) -> None:
    async with serving(answers(200, packed, content_encoding=encoding)) as server:
        got, download = await fetch(server.url)
    assert got == IMAGE
    assert download.sha256 == hashlib.sha256(IMAGE).hexdigest()


def test_a_compressed_body_is_decompressed_in_pieces_of_bounded_size() -> None:
    packed = gzip.compress(bytes(5_000_000))
    decompressor = Decompressor("gzip")
    sizes: list[int] = []
    for start in range(0, len(packed), 1000):
        assert not decompressor.finished
        sizes += map(len, decompressor.feed(packed[start : start + 1000]))
    assert decompressor.finished
    assert (sum(sizes), max(sizes)) == (5_000_000, CHUNK_BYTES)


# -- bodies that are not usable ---------------------------------------------------------------


@pytest.mark.parametrize("status", [403, 404, 410])
async def test_an_expired_link_is_dead(status: int) -> None:
    async with serving(answers(status, b"<html>")) as server:
        assert type(await failed_fetch(server.url)) is LinkExpired


HEAD = b"HTTP/1.1 200 OK\r\n"
UNUSABLE: dict[str, Behaviour] = {
    "500": answers(500),
    "401": answers(401),
    "206": answers(206, b"x"),
    "204": answers(204),
    "302 to nowhere": answers(302),
    "empty": answers(200, b""),
    "truncated": writes(HEAD + b"Content-Length: 99\r\n\r\nx", keep=False),
    "truncated between chunks": writes(
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n1\r\nx\r\n", keep=False
    ),
    "closed in silence": writes(keep=False),
    "garbage": writes(b"garbage\r\n\r\n", keep=False),
    "silent": hangs(),
    "silent within": hangs(HEAD + b"Content-Length: 99\r\n\r\nx"),
    "unknown packing": answers(200, b"x", content_encoding="br"),
    "damaged packing": answers(200, b"xyz", content_encoding="gzip"),
    "cut packing": answers(200, gzip.compress(IMAGE)[:-9], content_encoding="gzip"),
}


@pytest.mark.parametrize("case", UNUSABLE)
async def test_an_incomplete_body_is_not_usable(case: str) -> None:
    async with serving(UNUSABLE[case]) as server:
        error = await failed_fetch(server.url, download_timeout_s=0.3)
    assert type(error) is NoUsableBody


async def test_a_refused_connection_is_not_a_usable_body() -> None:
    url = f"http://127.0.0.1:{closed_port()}/"
    assert type(await failed_fetch(url)) is NoUsableBody


async def test_a_name_without_addresses_is_not_a_usable_body() -> None:
    error = await failed_fetch("https://files.test/", PUBLIC_API, resolve=FakeResolver())
    assert type(error) is NoUsableBody
    error = await failed_fetch(
        "https://files.test/", PUBLIC_API, resolve=FakeResolver(files_test=[])
    )
    assert type(error) is NoUsableBody


async def test_an_unresolvable_name_is_not_a_usable_body_with_the_systems_resolver() -> None:
    for url in ("https://files.evolink.invalid/", f"https://{'x' * 70}.test/", "https://a..b/"):
        assert type(await failed_fetch(url, PUBLIC_API)) in (NoUsableBody, LinkRefused)


@pytest.mark.parametrize(
    "behaviour",
    [
        answers(200, b"x" * 101),
        writes(HEAD + b"\r\n", b"x" * 101, keep=False),
        floods(HEAD + b"\r\n", b"x" * 1000),
        floods(HEAD + b"Content-Length: 999999999999\r\n\r\n", b"x" * 1000),
        answers(200, gzip.compress(bytes(50_000_000)), content_encoding="gzip"),
    ],
)
async def test_a_body_longer_than_the_limit_is_not_read_further(behaviour: Behaviour) -> None:
    got = bytearray()
    async with serving(behaviour) as server, KreaClient(KEY, base_url=LOCAL_API) as client:
        with pytest.raises(NoUsableBody):
            await client.download(server.url, sink=got.extend, max_bytes=100)
    assert len(got) <= 100


async def test_a_body_of_exactly_the_limit_is_accepted() -> None:
    async with serving(answers(200, b"x" * 100)) as server:
        assert (await fetch(server.url, max_bytes=100))[0] == b"x" * 100


async def test_a_download_ends_after_silence() -> None:
    async with serving(hangs(HEAD + b"Content-Length: 99\r\n\r\nx")) as server:
        error = await failed_fetch(server.url, download_timeout_s=0.2)
    assert type(error) is NoUsableBody
    assert "no byte came for 0.2 s" in str(error)


# -- addresses --------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["127.0.0.1", "2130706433", "127.1", "[::ffff:127.0.0.1]"])
async def test_a_link_to_this_machine_is_refused_if_the_api_is_public(host: str) -> None:
    names = FakeResolver(
        api_evolink_ai=["8.8.8.8"], **{"2130706433": ["127.0.0.1"], "127_1": ["127.0.0.1"]}
    )
    async with serving(answers(200, b"x")) as server:
        for scheme in ("http", "https"):
            url = f"{scheme}://{host}:{server.port}/"
            assert type(await failed_fetch(url, PUBLIC_API, resolve=names)) is LinkRefused
    assert server.connections == 0


async def test_a_name_with_one_local_address_is_refused() -> None:
    names = FakeResolver(api_evolink_ai=["8.8.8.8"], files_test=["8.8.8.8", "10.0.0.1"])
    error = await failed_fetch("https://files.test/a.png", PUBLIC_API, resolve=names)
    assert type(error) is LinkRefused
    assert "10.0.0.1" in str(error)


async def test_a_metadata_address_is_refused_even_if_the_api_is_local() -> None:
    assert type(await failed_fetch("http://169.254.169.254/latest")) is LinkRefused


async def test_addresses_that_a_proxy_invents_are_allowed_if_the_api_has_one_too() -> None:
    """Some proxies resolve every name to an address of 198.18.0.0/15."""
    base = FakeResolver(api_evolink_ai=["198.18.0.1"], files_test=["198.18.0.2"])
    error = await failed_fetch(
        f"https://files.test:{closed_port()}/", PUBLIC_API, resolve=base, connect_timeout_s=0.2
    )
    assert type(error) is NoUsableBody
    public = FakeResolver(api_evolink_ai=["8.8.8.8"], files_test=["198.18.0.2"])
    assert (
        type(await failed_fetch("https://files.test/", PUBLIC_API, resolve=public)) is LinkRefused
    )


async def test_the_checked_address_is_the_one_that_is_connected_to() -> None:
    """The name exists in this resolver only, and is resolved once."""
    names = FakeResolver(files_test=["127.0.0.1"])
    async with serving(answers(200, b"x")) as server:
        url = f"http://files.test:{server.port}/a.png"
        got, download = await fetch(url, resolve=names)
    assert (got, download.url) == (b"x", url)
    assert names.asked == ["files.test"]
    assert server.seen[0].headers["host"] == f"files.test:{server.port}"


async def test_the_next_address_is_tried_if_one_does_not_answer() -> None:
    names = FakeResolver(files_test=["127.0.0.2", "127.0.0.1"])
    async with serving(answers(200, b"x")) as server:
        assert (await fetch(f"http://files.test:{server.port}/", resolve=names))[0] == b"x"


@pytest.mark.parametrize("link", ["file:///etc/passwd", "data:,x", "ftp://h/", "http://u:p@h/", ""])
async def test_a_link_that_is_not_a_plain_web_link_is_refused(link: str) -> None:
    assert type(await failed_fetch(link)) is LinkRefused


# -- redirects --------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_a_redirect_is_followed(status: int) -> None:
    async with serving(answers(200, IMAGE)) as target:
        moved = answers(status, location=f"{target.url}/b.png")
        async with serving(moved) as server:
            got, download = await fetch(f"{server.url}/a.png")
    assert got == IMAGE
    assert download.url == f"{target.url}/b.png"


@pytest.mark.parametrize(
    "location",
    [
        "http://169.254.169.254/",
        "file:///etc/passwd",
        "data:,x",
        "http://u:p@127.0.0.1/",
        "http://[",
    ],
)
async def test_a_redirect_to_something_unsafe_is_refused(location: str) -> None:
    async with serving(answers(302, location=location)) as server:
        assert type(await failed_fetch(server.url)) is LinkRefused


@pytest.mark.parametrize("turns", [5, 6])
async def test_redirects_are_followed_five_times(turns: int) -> None:
    async def turn(seen: ReceivedRequest, writer: asyncio.StreamWriter) -> bool:
        count = int(seen.target.strip("/") or "0")
        writer.write(
            message(200, b"x") if count == turns else message(302, location=f"/{count + 1}")
        )
        return True

    async with serving(turn) as server:
        if turns == 5:
            assert (await fetch(server.url))[0] == b"x"
        else:
            assert type(await failed_fetch(server.url)) is NoUsableBody
    assert len(server.seen) == 6


# -- TLS --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ["https", "http"])
async def test_an_http_link_is_fetched_by_https_and_the_name_is_verified(
    scheme: str, tls: ssl.SSLContext
) -> None:
    names = FakeResolver(files_test=["127.0.0.1"])
    async with serving(answers(200, b"x"), tls) as server:
        url = f"{scheme}://files.test:{server.port}/a.png"
        got, download = await fetch(url, "https://127.0.0.1", resolve=names)
    assert got == b"x"
    assert download.url == f"https://files.test:{server.port}/a.png"


async def test_a_certificate_for_another_name_is_not_accepted(tls: ssl.SSLContext) -> None:
    names = FakeResolver(other_test=["127.0.0.1"])
    async with serving(answers(200, b"x"), tls) as server:
        url = f"https://other.test:{server.port}/"
        error = await failed_fetch(url, "https://127.0.0.1", resolve=names)
    assert type(error) is NoUsableBody
    assert server.seen == []


async def test_a_redirect_from_https_to_http_is_refused(tls: ssl.SSLContext) -> None:
    names = FakeResolver(files_test=["127.0.0.1"])
    async with serving(answers(200, b"x")) as plain:
        moved = answers(302, location=plain.url)
        async with serving(moved, tls) as server:
            url = f"https://files.test:{server.port}/"
            assert type(await failed_fetch(url, LOCAL_API, resolve=names)) is LinkRefused
    assert plain.seen == []


# -- proxies ----------------------------------------------------------------------------------


async def test_a_proxy_of_the_environment_gets_the_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(by_path(**{"http:": answers(200, b"x")})) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url.replace("//", "//me:secret@"))
        got, _ = await fetch("http://files.test/a.png", resolve=FakeResolver())
    assert got == b"x"
    (seen,) = proxy.seen
    assert seen.target == "http://files.test/a.png"
    assert seen.headers["proxy-authorization"].startswith("Basic ")


async def test_a_host_in_no_proxy_is_reached_directly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", f"http://127.0.0.1:{closed_port()}")
    monkeypatch.setenv("NO_PROXY", "files.test")
    names = FakeResolver(files_test=["127.0.0.1"])
    async with serving(answers(200, b"x")) as server:
        assert (await fetch(f"http://files.test:{server.port}/", resolve=names))[0] == b"x"


async def test_a_metadata_address_is_refused_behind_a_proxy_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = FakeResolver(meta_test=["169.254.169.254"])
    async with serving(answers(200, b"x")) as proxy:
        monkeypatch.setenv("HTTP_PROXY", proxy.url)
        for url in ("http://169.254.169.254/", "http://meta.test/"):
            assert type(await failed_fetch(url, resolve=names)) is LinkRefused
    assert proxy.connections == 0


async def test_behind_a_proxy_a_private_address_is_not_fetched_if_names_cannot_be_resolved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Only the proxy resolves names there, so the kind of the API's host is not known."""
    async with serving(answers(200, b"x")) as proxy:
        monkeypatch.setenv("ALL_PROXY", proxy.url)
        for url in ("https://100.100.100.200/", "https://203.0.113.7/"):
            error = await failed_fetch(url, PUBLIC_API, resolve=FakeResolver())
            assert type(error) in (LinkRefused, NoUsableBody)
    assert proxy.connections == 0


async def test_an_unusable_proxy_url_is_a_config_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "bogus://127.0.0.1")
    with pytest.raises(ConfigError):
        await fetch("http://127.0.0.1/")

"""The proxies of the environment, and the hosts that are reached without one."""

from __future__ import annotations

import httpx
import pytest

from krea_dagster.api import KreaClient
from krea_dagster.api.proxies import Proxies
from tests.api.loopback_server import (
    CREATED,
    IDEMPOTENCY_KEY,
    KEY,
    REQUEST,
    answers,
    by_path,
    serving,
)


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "127.8.9.10", "127.1", "2130706433", "0x7f.1", "localhost"),
        *("LOCALHOST", "localhost.", "a.localhost", "10.1.2.3", "172.16.0.1", "172.31.255.255"),
        *("192.168.7.7", "169.254.1.1", "[::1]", "[fe80::1]", "[fd12::1]", "[fc00::1]", "[::]"),
        *("[::ffff:127.0.0.1]", "[::ffff:10.0.0.1]", "[::ffff:a9fe:101]", "[fe80::1%25eth0]", "0"),
    ],
)
def test_a_private_host_is_reached_without_a_proxy(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy"):
        monkeypatch.setenv(name, "http://proxy.test:3128")
    for no_proxy in ("", "example.com", "*.test"):
        monkeypatch.setenv("NO_PROXY", no_proxy)
        for scheme in ("http", "https"):
            assert Proxies().for_url(httpx.URL(f"{scheme}://{host}:8080/v1")) is None


@pytest.mark.parametrize(
    "host", ["api.evolink.ai", "8.8.8.8", "172.32.0.1", "[2606:4700::1111]", "localhost.test"]
)
def test_a_public_host_is_reached_through_the_proxy(
    host: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy.test:3128")
    assert Proxies().for_url(httpx.URL(f"https://{host}/v1")) is not None
    monkeypatch.setenv("NO_PROXY", host.strip("[]"))
    if not host.startswith("["):
        assert Proxies().for_url(httpx.URL(f"https://{host}/v1")) is None


@pytest.mark.anyio
async def test_the_key_for_a_server_on_this_machine_is_not_seen_by_a_proxy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    behaviour = by_path(v1=answers(200, CREATED), file=answers(200, b"image"))
    async with serving(answers(200, CREATED)) as proxy, serving(behaviour) as server:
        for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.url)
        async with KreaClient(KEY, base_url=server.url) as client:
            await client.submit(REQUEST, idempotency_key=IDEMPOTENCY_KEY)
            await client.download(f"{server.url}/file", sink=bytearray().extend, max_bytes=100)
    assert proxy.connections == 0
    assert len(server.seen) == 2

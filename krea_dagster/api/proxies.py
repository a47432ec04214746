"""The proxies of the environment: ``HTTPS_PROXY``, ``HTTP_PROXY``, ``ALL_PROXY``, ``NO_PROXY``.

None is used for an address of this machine or of a private network, even if the environment names
one: http is allowed to such a host, and a proxy would see the API key.

``.netrc``, which HTTP libraries read too, is not read: its credentials would go to any host that a
link names.
"""

from __future__ import annotations

import base64
import ipaddress
import socket
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote_to_bytes

import httpx
import yarl

from krea_dagster.api.links import AddressKind, address_kind
from krea_dagster.errors import ConfigError


class Secret(str):
    """A header value with a key or a password. Its repr is ``***``."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True)
class Proxy:
    """The URL of a proxy, and the headers that authenticate with it."""

    url: yarl.URL
    headers: Mapping[str, str]

    def options(self, url: yarl.URL, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return aiohttp's options for a request to a URL.

        The proxy reads the headers of an http request. For https it opens a tunnel and sees only
        the headers of that request.
        """
        if url.scheme == "http":
            return {"proxy": self.url, "headers": {**headers, **self.headers}}
        return {"proxy": self.url, "headers": headers, "proxy_headers": self.headers}


class Proxies:
    """The proxies of the environment, read once. Raises ConfigError if one cannot be used."""

    def __init__(self) -> None:
        named = urllib.request.getproxies()
        self._by_scheme = {
            scheme: _proxy(text)
            for scheme in ("http", "https")
            if (text := named.get(scheme) or named.get("all"))
        }

    def for_url(self, url: httpx.URL) -> Proxy | None:
        """Return the proxy for a URL, None if there is none or the host is reached directly."""
        proxy = self._by_scheme.get(url.scheme)
        if proxy is None or is_private_host(url.raw_host.decode("ascii")):
            return None
        if urllib.request.proxy_bypass(url.netloc.decode("ascii")):
            return None
        return proxy


def is_private_host(host: str) -> bool:
    """Return whether a host is this machine or an address of a private network."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        try:
            # 127.1, 2130706433 and 0x7f.1 are other ways to write 127.0.0.1.
            address = ipaddress.IPv4Address(socket.inet_aton(host.rstrip(".")))
        except (OSError, ValueError):
            name = host.lower().rstrip(".")
            return name == "localhost" or name.endswith(".localhost")
    address = getattr(address, "ipv4_mapped", None) or address
    return (
        address_kind(str(address)) is AddressKind.LOCAL
        or address.is_link_local
        or address.is_unspecified
    )


def _proxy(text: str) -> Proxy:
    try:
        url = httpx.URL(text if "://" in text else f"http://{text}")
        usable = url.scheme in ("http", "https") and bool(url.host)
    except (httpx.InvalidURL, ValueError):
        usable = False
    if not usable:
        # The proxy's URL may contain a password, so it is not shown.
        raise ConfigError("a proxy in the environment has a URL that cannot be used") from None
    headers: dict[str, str] = {}
    if url.userinfo:
        secret = base64.b64encode(unquote_to_bytes(url.userinfo)).decode("ascii")
        headers["Proxy-Authorization"] = Secret(f"Basic {secret}")
    bare = url.copy_with(userinfo=b"", path="/", query=None, fragment=None)
    return Proxy(yarl.URL(str(bare), encoded=True), headers)

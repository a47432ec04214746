"""The proxies that the environment names: ``HTTPS_PROXY``, ``ALL_PROXY``, ``NO_PROXY``.

None is used for an address of this machine or of a private network, whatever the environment says:
such a host may be spoken to in clear text, and a proxy would read the API key along.

Only these are read, and not ``.netrc``, which HTTP libraries read along with them: its
credentials would go to whatever host a link names.
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
    """A header's text with a key or a password: it prints as ``***`` wherever a value is shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True)
class Proxy:
    """Where requests go instead, and what the proxy wants to know of who sends them."""

    url: yarl.URL
    headers: Mapping[str, str]

    def options(self, url: yarl.URL, headers: Mapping[str, str]) -> dict[str, Any]:
        """What aiohttp is told for a request to a URL.

        The proxy reads the headers of an http request itself. For https it is asked for a
        tunnel first, and sees those of that only.
        """
        if url.scheme == "http":
            return {"proxy": self.url, "headers": {**headers, **self.headers}}
        return {"proxy": self.url, "headers": headers, "proxy_headers": self.headers}


class Proxies:
    """The environment's proxies, read once. Raises ConfigError where one cannot be used."""

    def __init__(self) -> None:
        named = urllib.request.getproxies()
        self._by_scheme = {
            scheme: _proxy(text)
            for scheme in ("http", "https")
            if (text := named.get(scheme) or named.get("all"))
        }

    def of(self, url: httpx.URL) -> Proxy | None:
        """The proxy for a URL, or None where there is none or the host goes without."""
        proxy = self._by_scheme.get(url.scheme)
        if proxy is None or is_private_host(url.raw_host.decode("ascii")):
            return None
        if urllib.request.proxy_bypass(url.netloc.decode("ascii")):
            return None
        return proxy


def is_private_host(host: str) -> bool:
    """Whether a host is this machine, or an address of a private network."""
    try:
        address = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        try:
            # 127.1, 2130706433 and 0x7f.1 are 127.0.0.1 to those who connect.
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
        # The proxy's URL may hold a password, so it is not named.
        raise ConfigError("a proxy in the environment has a URL that cannot be used") from None
    headers: dict[str, str] = {}
    if url.userinfo:
        secret = base64.b64encode(unquote_to_bytes(url.userinfo)).decode("ascii")
        headers["Proxy-Authorization"] = Secret(f"Basic {secret}")
    bare = url.copy_with(userinfo=b"", path="/", query=None, fragment=None)
    return Proxy(yarl.URL(str(bare), encoded=True), headers)

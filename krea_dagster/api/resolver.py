"""Resolve the names of file hosts, and refuse addresses that a result link may not lead to.

The rules are in :mod:`krea_dagster.api.links`. Connections are made to the very addresses that
were checked.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

import aiohttp
import aiohttp.abc
import anyio
import httpx

from krea_dagster.api.links import AddressKind, address_kind, check_addresses, is_address
from krea_dagster.errors import LinkRefused

#: Resolves a host and port to IP addresses. Raises OSError if there are none.
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]


async def resolve_host(host: str, port: int) -> Sequence[str]:
    """Return the addresses of a host by the system's resolver, in its order of preference."""
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return tuple(dict.fromkeys(entry[4][0] for entry in found))


async def refuse_lookup(_host: str, _port: int) -> Sequence[str]:
    """Raise OSError. For a mock transport: a lookup would be the only use of the network."""
    raise OSError("names are not resolved")


class CheckedResolver(aiohttp.abc.AbstractResolver):
    """Resolves file hosts for aiohttp to addresses that were checked.

    Args:
        base_url: the API's; its host decides whether local addresses are allowed.
        resolve: resolves a name.
        longest_s: the longest time in seconds for one lookup.
    """

    def __init__(self, base_url: httpx.URL, *, resolve: Resolve, longest_s: float) -> None:
        self._base_url = base_url
        self._base_kinds: frozenset[AddressKind] | None = None
        self._resolve_name = resolve
        self._longest_s = longest_s

    @property
    def connector(self) -> Mapping[str, Any]:
        """Options that make aiohttp's connector use checked addresses only."""
        return {"resolver": self, "use_dns_cache": False, "socket_factory": self._checked_socket}

    async def check_url(self, url: httpx.URL, *, by_connector: bool) -> None:
        """Check what can be checked before a request is sent.

        ``by_connector``: the connector checks the names it resolves, so only hosts are checked
        here that it would connect to without resolving: those that look like an address, such as
        2130706433 and 127.1. Otherwise (behind a proxy, or with a custom transport) names often
        resolve only there. So written-out addresses are checked, and names if this machine can
        resolve them.

        Raises LinkRefused for an address that is not allowed, OSError if the host is not resolved.
        """
        host = url.raw_host.decode("ascii")
        if by_connector and not (":" in host or host.replace(".", "").isdigit()):
            return
        try:
            addresses = await self._addresses(host, port_of(url))
        except OSError:
            if by_connector:
                raise
            return
        await self._check(host, addresses)

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[aiohttp.abc.ResolveResult]:
        """Return the addresses for aiohttp. Raises OSError if there are none."""
        addresses = await self._addresses(host, port)
        await self._check(host, addresses)
        found = [
            aiohttp.abc.ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST,
            )
            for address in addresses
            if family in (socket.AF_UNSPEC, socket.AF_INET6 if ":" in address else socket.AF_INET)
        ]
        if not found:
            raise OSError("the host has no address")
        return found

    async def close(self) -> None:
        """Release nothing: aiohttp requires this method."""

    def _checked_socket(self, address_info: Any) -> socket.socket:
        """Return a socket for an address that may be connected to.

        Addresses were checked before, when names were resolved and links were read. This is the
        last place before the connection, and it gets the very address that is used.
        """
        family, kind, protocol, _, (address, *_) = address_info
        found = address_kind(address)
        allowed = found is AddressKind.PUBLIC or found in (self._base_kinds or ())
        if not allowed or found is AddressKind.NEVER:
            raise LinkRefused(f"a result link may not lead to the address {address}")
        return socket.socket(family, kind, protocol)

    async def _check(self, host: str, addresses: Sequence[str]) -> None:
        if any(address_kind(address) is not AddressKind.PUBLIC for address in addresses):
            check_addresses(host, addresses, await self._kinds_of_base())

    async def _kinds_of_base(self) -> frozenset[AddressKind]:
        # Resolved only if a link is not public, and then remembered.
        if self._base_kinds is None:
            addresses = await self._addresses(self._base_url.host, port_of(self._base_url))
            self._base_kinds = frozenset(address_kind(address) for address in addresses)
        return self._base_kinds

    async def _addresses(self, host: str, port: int) -> Sequence[str]:
        if is_address(host):
            return (host,)
        with anyio.move_on_after(self._longest_s):
            try:
                return await self._resolve_name(host, port)
            except (OSError, UnicodeError) as error:
                raise OSError(f"the host has no address: {error}") from error
        raise OSError("the name was not resolved in time")


def port_of(url: httpx.URL) -> int:
    """Return the port of a URL."""
    return url.port or (80 if url.scheme == "http" else 443)

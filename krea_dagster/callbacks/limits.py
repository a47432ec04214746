"""Limit the calls and the connections of each client. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

#: Clients that are remembered; the one that was idle for the longest time is forgotten first.
MAX_CLIENTS: Final = 4096


class RateLimiter:
    """Token buckets by name: each fills at ``rate_per_s`` up to ``burst`` tokens.

    Memory is bounded: above ``max_clients`` the client that was idle longest is forgotten, and
    starts with a full bucket again.
    """

    def __init__(
        self,
        rate_per_s: float,
        burst: float,
        *,
        monotonic: Callable[[], float],
        max_clients: int = MAX_CLIENTS,
    ) -> None:
        self._rate_per_s = rate_per_s
        self._burst = burst
        self._monotonic = monotonic
        self._max_clients = max_clients
        # name → (tokens, seconds of the last change), the longest idle first
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, name: str) -> bool:
        """Take a token of a bucket; return False if there is none."""
        now_s = self._monotonic()
        tokens, then_s = self._buckets.pop(name, (self._burst, now_s))
        tokens = min(self._burst, tokens + max(0.0, now_s - then_s) * self._rate_per_s)
        admitted = tokens >= 1
        self._buckets[name] = (tokens - 1 if admitted else tokens, now_s)
        if len(self._buckets) > self._max_clients:
            self._buckets.popitem(last=False)
        return admitted


@lru_cache(maxsize=1024)
def client_name(host: str) -> str:
    """Return the name that a client is counted under: its IPv4 address or its IPv6 /64.

    One IPv6 host commonly has a whole /64.
    """
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return host[:64]
    if isinstance(address, ipaddress.IPv6Address):
        if address.ipv4_mapped is not None:
            return str(address.ipv4_mapped)
        return str(ipaddress.IPv6Network((address, 64), strict=False))
    return host


class ConnectionLimit:
    """Limits the connections of each client to ``most``.

    ``exempt`` clients may hold any number: addresses, networks, or ``*`` for all, in the form of
    uvicorn's trusted proxies.
    """

    def __init__(self, most: int, *, exempt: Sequence[str] = ()) -> None:
        self._most = most
        self._all = "*" in exempt
        self._networks = [found for one in exempt if (found := _network(one)) is not None]
        self._held: Counter[str] = Counter()

    def admit(self, host: str) -> str | None:
        """Count a connection of a host. Return its client name, None if it has too many."""
        name = client_name(host)
        limited = not self._all and not any(_within(host, one) for one in self._networks)
        if limited and self._held[name] >= self._most:
            return None
        self._held[name] += 1
        return name

    def leave(self, name: str) -> None:
        """Stop counting a connection of a client name."""
        self._held[name] -= 1
        if self._held[name] <= 0:
            del self._held[name]


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text, strict=False)
    except ValueError:
        return None


def _within(host: str, network: ipaddress.IPv4Network | ipaddress.IPv6Network) -> bool:
    try:
        return ipaddress.ip_address(host) in network
    except ValueError:
        return False

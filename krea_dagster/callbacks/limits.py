"""Says how many calls a client may make, and how many connections it may hold. Pure."""

from __future__ import annotations

import ipaddress
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

#: Clients that are remembered; the one that was silent for longest is forgotten first.
MAX_CLIENTS: Final = 4096


class RateLimiter:
    """Token buckets by name: ``rate_per_s`` flows into each, and ``burst`` is what it holds.

    Memory is bounded: beyond ``max_clients`` the one longest silent is forgotten, and begins
    with a full bucket again.
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
        # name → (tokens, seconds when that was so), the longest silent first
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def admit(self, name: str) -> bool:
        """Take a token of a bucket; False where there is none."""
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
    """What a client is counted under: its address, or its network where one host has many.

    A host of IPv6 commonly has a whole /64 for itself.
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
    """How many connections each client holds, ``most`` at a time.

    ``free`` clients may hold any number: addresses, networks, or ``*`` for all, as uvicorn takes
    the proxies that it trusts.
    """

    def __init__(self, most: int, *, free: Sequence[str] = ()) -> None:
        self._most = most
        self._all = "*" in free
        self._networks = [found for one in free if (found := _network(one)) is not None]
        self._held: Counter[str] = Counter()

    def admit(self, host: str) -> str | None:
        """Count a connection of a host; returns the name to ``leave`` by, None for one too many."""
        name = client_name(host)
        limited = not self._all and not any(_within(host, one) for one in self._networks)
        if limited and self._held[name] >= self._most:
            return None
        self._held[name] += 1
        return name

    def leave(self, name: str) -> None:
        """Count a connection no more."""
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

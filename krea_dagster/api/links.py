"""Which result links may be followed, and to which network addresses. Pure.

A link comes from an answer, so it is not trusted: followed blindly, it could make this machine
read its own disk, its neighbours, or a cloud's metadata service. The rules:

* ``https`` only; ``http`` only if the API's base URL is http (the local emulator). Otherwise an
  ``http:`` link is tried as https on the same host, since it is a paid image.
* No user name or password in the link, at most 8192 characters. Any port, since every address
  is checked.
* A redirect must follow the same rules, and never leads from https to http.
* Addresses must be public. Local ones (loopback, private, shared) are allowed only if the host of
  the base URL is local, and those of the benchmarking range, which some proxies return for every
  name, only if the base URL's host has one too. All others are never allowed: link-local,
  multicast, reserved, documentation, and the metadata addresses of clouds.

The address tables follow the IANA special-purpose address registries for IPv4 and IPv6. They are
written out because ``ipaddress.is_private`` differs between Python releases.
"""

from __future__ import annotations

import enum
import ipaddress
import re
from collections.abc import Collection
from functools import lru_cache
from typing import Final

import httpx

from krea_dagster import redact
from krea_dagster.api.untrusted import safe_text
from krea_dagster.errors import LinkRefused

LINK_MAX_CHARS: Final = 8192
MAX_REDIRECTS: Final = 5

_LABEL = re.compile(r"[A-Za-z0-9_-]{1,63}", re.ASCII)
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network


class AddressKind(enum.Enum):
    """The kinds of network addresses that the rules distinguish."""

    PUBLIC = "public"
    LOCAL = "local"
    BENCHMARKING = "benchmarking"
    NEVER = "never"


def _networks(*texts: str) -> tuple[_Network, ...]:
    return tuple(ipaddress.ip_network(text) for text in texts)


#: First match wins; an IPv4 address in none of these is public.
IPV4_KINDS: Final[tuple[tuple[AddressKind, tuple[_Network, ...]], ...]] = (
    # Metadata and host services of Alibaba Cloud, Azure and Oracle Cloud.
    (AddressKind.NEVER, _networks("100.100.100.200/32", "168.63.129.16/32", "192.0.0.192/32")),
    (AddressKind.BENCHMARKING, _networks("198.18.0.0/15")),
    (
        AddressKind.LOCAL,
        _networks("127.0.0.0/8", "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "100.64.0.0/10"),
    ),
    (
        AddressKind.NEVER,
        _networks(
            "0.0.0.0/8",
            "169.254.0.0/16",
            "192.0.0.0/24",
            "192.0.2.0/24",
            "192.88.99.0/24",
            "198.51.100.0/24",
            "203.0.113.0/24",
            "224.0.0.0/4",
            "240.0.0.0/4",
        ),
    ),
)

#: First match wins; an IPv6 address in none of these is public within 2000::/3, else never.
IPV6_KINDS: Final[tuple[tuple[AddressKind, tuple[_Network, ...]], ...]] = (
    # The metadata services of Amazon and Google, within the private range.
    (AddressKind.NEVER, _networks("fd00:ec2::254/128", "fd20:ce::254/128")),
    (AddressKind.LOCAL, _networks("::1/128", "fc00::/7")),
    (AddressKind.NEVER, _networks("2001::/23", "2001:db8::/32", "3fff::/20")),
)
_GLOBAL_UNICAST: Final = ipaddress.IPv6Network("2000::/3")

#: IPv6 ranges that contain an IPv4 address, and its shift in bits. That address is checked.
IPV4_WITHIN: Final = (
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # mapped
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)


@lru_cache(maxsize=1024)
def address_kind(text: str) -> AddressKind:
    """Return the kind of an IP address, NEVER for a text that is not one."""
    try:
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return AddressKind.NEVER
    if isinstance(address, ipaddress.IPv6Address):
        for network, shift in IPV4_WITHIN:
            if address in network:
                within = ipaddress.IPv4Address((int(address) >> shift) & 0xFFFF_FFFF)
                return address_kind(str(within))
        otherwise = AddressKind.PUBLIC if address in _GLOBAL_UNICAST else AddressKind.NEVER
        table = IPV6_KINDS
    else:
        otherwise = AddressKind.PUBLIC
        table = IPV4_KINDS
    for kind, networks in table:
        if any(address in network for network in networks):
            return kind
    return otherwise


@lru_cache(maxsize=1024)
def is_address(host: str) -> bool:
    """Return whether a host is written as an IP address and not as a name."""
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def is_host_and_port(url: httpx.URL) -> bool:
    """Return whether a URL has an IP address or a possible DNS name, and a possible port.

    A name in another script is checked in its ASCII form, which is resolved.
    """
    host = url.raw_host.decode("ascii")
    labels = host.removesuffix(".").split(".")
    named = len(host) <= 254 and all(_LABEL.fullmatch(label) for label in labels)
    return (named or is_address(host)) and (url.port is None or 0 < url.port < 65536)


def is_local_name(host: str) -> bool:
    """Return whether public DNS does not resolve a name: localhost, or without a dot.

    This covers the names of containers and of ``.internal``, ``.local`` and ``.home.arpa``.
    """
    name = host.lower().rstrip(".")
    if "." in name:
        return name.endswith((".localhost", ".internal", ".local", ".home.arpa"))
    # 134744072 and 0x8080808 are ways to write 8.8.8.8.
    return name[:1].isalpha()


def check_addresses(
    host: str, addresses: Collection[str], local_kinds: Collection[AddressKind]
) -> None:
    """Raise LinkRefused if any address of a host may not be reached.

    Any, not all: a name with a public and a private address is either broken or an attack.
    ``local_kinds`` are the kinds besides PUBLIC that the base URL's own host has.
    """
    for address in addresses:
        kind = address_kind(address)
        if kind is AddressKind.PUBLIC:
            continue
        if kind is AddressKind.NEVER or kind not in local_kinds:
            raise LinkRefused(
                f"{safe_text(host, max_chars=200)} has the address {address}, which a result"
                " link may not lead to"
            )


def check_link(link: str, *, http_allowed: bool) -> httpx.URL:
    """Return the URL to fetch for a link, without its fragment.

    Raises LinkRefused if the link is too long, unreadable, not http or https, without a host, or
    contains a user name or password.
    """
    if len(link) > LINK_MAX_CHARS:
        raise LinkRefused(f"the link is longer than {LINK_MAX_CHARS} characters")
    try:
        url = httpx.URL(link)
        usable = is_host_and_port(url)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise LinkRefused(f"the link {printable_link(link)} cannot be read") from None
    if url.scheme not in ("http", "https") or not usable:
        raise LinkRefused(f"the link {printable_link(link)} is not an https link to a host")
    if url.userinfo:
        raise LinkRefused("the link contains a user name or a password")
    if url.scheme == "http" and not http_allowed:
        url = url.copy_with(scheme="https")
    return url.copy_with(fragment=None) if "#" in link else url


def check_redirect(from_url: httpx.URL, location: str, *, http_allowed: bool) -> httpx.URL:
    """Return the URL that a redirect leads to.

    Raises LinkRefused as :func:`check_link` does, and for a step from https to http.
    """
    if len(location) > LINK_MAX_CHARS:
        raise LinkRefused(f"a redirect is longer than {LINK_MAX_CHARS} characters")
    try:
        target = from_url.join(location)
    except (httpx.InvalidURL, UnicodeError, ValueError):
        raise LinkRefused(f"a redirect to {printable_link(location)} cannot be read") from None
    if from_url.scheme == "https" and target.scheme == "http":
        raise LinkRefused(f"a redirect from https to {printable_link(str(target))}")
    return check_link(str(target), http_allowed=http_allowed)


def printable_link(link: str) -> str:
    """Return a link for a message: shortened, and without credentials and signatures."""
    return safe_text(redact.location(link), max_chars=200) or "(empty)"

"""Describe why no connection was made, and what a person can do about it. Pure."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterator
from typing import Final

import aiohttp
import httpx

from krea_dagster.errors import Cause

# The first match counts: a certificate refused through a proxy is a certificate error, and the name
# of a proxy that is not found is a proxy error.
_CAUSES: Final[tuple[tuple[Cause, tuple[type[BaseException], ...]], ...]] = (
    ("certificate", (ssl.SSLCertVerificationError,)),
    ("proxy", (httpx.ProxyError, aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)),
    ("pool", (httpx.PoolTimeout,)),
    ("name", (socket.gaierror, aiohttp.ClientConnectorDNSError)),
)

_ADVICE: Final[dict[Cause, str]] = {
    "certificate": (
        "if its issuer is to be trusted, such as a proxy that inspects TLS or an authority of "
        "your own, set SSL_CERT_FILE to a file with the issuer's certificate, in PEM"
    ),
    "proxy": "check HTTPS_PROXY, ALL_PROXY and NO_PROXY",
    "name": "check the network, its DNS, and the URL",
}


def cause_of(error: BaseException) -> Cause:
    """Return the cause of a failure to connect, from an exception and its causes."""
    chain = tuple(_chain(error))
    for cause, kinds in _CAUSES:
        if any(isinstance(one, kinds) for one in chain):
            return cause
    return "connection"


def describe_connect_error(error: BaseException, host: str) -> str:
    """Return a sentence about a failure to connect to a host, with advice if there is any."""
    cause = cause_of(error)
    detail = str(error)
    match cause:
        case "certificate":
            text = f"the certificate of {host} was refused: {_certificate_trouble(error)}"
        case "proxy" if "proxy" not in detail:
            text = f"the proxy could not be used: {detail or type(error).__name__}"
        case "pool" | "proxy":
            text = detail or "no connection was free in time"
        case "name":
            text = f"the name {host} was not found: {detail}"
        case _:
            text = f"no connection to {host}: {detail or type(error).__name__}"
    return f"{text}; {_ADVICE[cause]}" if cause in _ADVICE else text


def _certificate_trouble(error: BaseException) -> str:
    for one in _chain(error):
        if isinstance(one, ssl.SSLCertVerificationError):
            return getattr(one, "verify_message", "") or str(one)
    return str(error)


def _chain(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and its causes."""
    seen: set[int] = set()
    one: BaseException | None = error
    while one is not None and id(one) not in seen:
        seen.add(id(one))
        yield one
        inner = getattr(one, "os_error", None)  # of aiohttp, which does not always chain it
        if isinstance(inner, BaseException):
            yield inner
        one = one.__cause__ or one.__context__

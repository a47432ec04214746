"""POST a body over HTTPS, to public addresses only unless told otherwise."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

import anyio
import httpcore

from krea_dagster.emulator.contract import is_public_address, is_public_https

_HEADERS: Final[Mapping[bytes | str, bytes | str]] = {
    "content-type": "application/json",
    "user-agent": "EvoLink-emulator",
}
_MAX_ANSWER_BYTES: Final = 64 * 1024
_NO_ANSWER: Final = (
    httpcore.NetworkError,
    httpcore.ProtocolError,
    httpcore.TimeoutException,
    httpcore.UnsupportedProtocol,
    OSError,  # TimeoutError and ssl.SSLError are
    UnicodeError,
)


class HttpPoster:
    """Posts bodies, ``most`` at a time, with ``timeout_s`` for each. In one event loop.

    ``ca`` is a file of certificates (PEM) that are trusted besides the machine's. Redirects are
    not followed. Raises OSError where ``ca`` cannot be read.
    """

    def __init__(self, ca: Path | None, *, to_private: bool, most: int, timeout_s: float) -> None:
        self._to_private = to_private
        self._timeout_s = timeout_s
        context = ssl.create_default_context()
        if ca is not None:
            context.load_verify_locations(ca)
        self._pool = httpcore.AsyncConnectionPool(
            ssl_context=context,
            max_connections=most,
            keepalive_expiry=30.0,
            network_backend=_Network(to_private=to_private),
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._pool.aclose()

    async def post(self, url: str, body: bytes) -> int:
        """Return the status of the answer, 0 where there was none or the address is private."""
        if not is_public_https(url, private_too=self._to_private):
            return 0
        try:
            with anyio.fail_after(self._timeout_s):
                return await self._status(url.partition("#")[0], body)
        except _NO_ANSWER:
            return 0

    async def _status(self, url: str, body: bytes) -> int:
        async with self._pool.stream("POST", url, headers=_HEADERS, content=body) as answer:
            size = 0
            async for piece in answer.aiter_stream():  # to the end, so that the connection is kept
                size += len(piece)
                if size > _MAX_ANSWER_BYTES:
                    break
            return answer.status


class _Network(httpcore.AsyncNetworkBackend):
    """Connects to names of which every address is public, or to any where ``to_private``."""

    def __init__(self, *, to_private: bool) -> None:
        self._to_private = to_private
        self._network = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Connect to the first address that answers. Raises httpcore.ConnectError."""
        for address in await self._addresses(host, port):
            try:
                stream = await self._network.connect_tcp(
                    address, port, timeout, local_address, socket_options
                )
            except httpcore.ConnectError:
                continue
            return _Stream(stream)
        raise httpcore.ConnectError(f"no address of {host} answers")

    async def sleep(self, seconds: float) -> None:
        """Pause."""
        await self._network.sleep(seconds)

    async def _addresses(self, host: str, port: int) -> list[str]:
        if self._to_private:
            return [host]
        found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = list(dict.fromkeys(str(where[0]) for *_, where in found))
        for address in addresses:
            if not is_public_address(address):
                raise httpcore.ConnectError(f"{host} leads to the private address {address}")
        return addresses


class _Stream(httpcore.AsyncNetworkStream):
    """A connection that is closed where its TLS handshake is cut.

    httpcore closes it on an error, but not where the handshake is cancelled, as it is here when
    the receiver's time is over or the emulator ends.
    """

    def __init__(self, stream: httpcore.AsyncNetworkStream) -> None:
        self._stream = stream

    async def read(
        self,
        max_bytes: int,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
    ) -> bytes:
        return await self._stream.read(max_bytes, timeout)

    async def write(
        self,
        buffer: bytes,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
    ) -> None:
        await self._stream.write(buffer, timeout)

    async def aclose(self) -> None:
        await self._stream.aclose()

    async def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,  # noqa: ASYNC109 - httpcore's signature
    ) -> httpcore.AsyncNetworkStream:
        try:
            return await self._stream.start_tls(ssl_context, server_hostname, timeout)
        except BaseException:
            with anyio.CancelScope(shield=True):
                await self._stream.aclose()
            raise

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)

"""POST callbacks over HTTPS, to public addresses only unless told otherwise.

It speaks HTTP/1.1 over asyncio itself: aiohttp and httpcore leave a connection open when a request
is cancelled within the TLS handshake or the TLS shutdown, and the emulator must stop at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from krea_dagster.emulator.contract import is_public_address, is_public_https


class HttpPoster:
    """Posts bodies, each within ``timeout_s`` and over its own connection. For one event loop.

    ``ca`` is a file of certificates (PEM) that are trusted in addition to the machine's.
    Redirects are not followed, and no proxy is used. Raises OSError if ``ca`` cannot be read.
    """

    def __init__(self, ca: Path | None, *, to_private: bool, timeout_s: float) -> None:
        self._to_private = to_private
        self._timeout_s = timeout_s
        self._ssl_context = ssl.create_default_context()
        if ca is not None:
            self._ssl_context.load_verify_locations(ca)

    async def post(self, url: str, body: bytes) -> int:
        """Return the status of the response, 0 if there was none or the address is private."""
        if not is_public_https(url, private_too=self._to_private):
            return 0
        try:
            return await asyncio.wait_for(self._post(urlsplit(url), body), self._timeout_s)
        except (OSError, ValueError, IndexError, asyncio.TimeoutError):
            return 0

    async def _post(self, url: SplitResult, body: bytes) -> int:
        host, port = url.hostname or "", url.port or 443
        address = await self._address(host, port)
        reader, writer = await asyncio.open_connection(
            address, port, ssl=self._ssl_context, server_hostname=host
        )
        try:
            target = (url.path or "/") + (f"?{url.query}" if url.query else "")
            head = (
                f"POST {target} HTTP/1.1\r\nhost: {url.netloc.rpartition('@')[2]}\r\n"
                "content-type: application/json\r\nuser-agent: EvoLink-emulator\r\n"
                f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
            )
            writer.write(head.encode("ascii") + body)
            await writer.drain()
            return int((await reader.readline()).split()[1])
        finally:
            writer.transport.abort()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _address(self, host: str, port: int) -> str:
        """Resolve a host. Raises OSError if any of its addresses is private."""
        loop = asyncio.get_running_loop()
        found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(entry[4][0]) for entry in found]
        if not self._to_private and not all(map(is_public_address, addresses)):
            raise OSError(f"{host} has a private address")
        return addresses[0]

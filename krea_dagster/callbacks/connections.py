"""Connections to the receiver: bounded for each client, and closed where no request comes.

Rates count requests. A client that opens connections and never ends a request's headers is seen by
none of them, and uvicorn itself has neither of these limits; it takes a protocol of ours.
"""

from __future__ import annotations

import asyncio
from typing import ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

from krea_dagster.callbacks.limits import ConnectionLimit


class LimitedProtocol(H11Protocol):
    """uvicorn's HTTP protocol, held to ``limit`` and to ``request_within_s``."""

    limit: ClassVar[ConnectionLimit]
    request_within_s: ClassVar[float]

    _name: str | None = None
    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn has it
        """Take a connection, or close it where its client has too many."""
        super().connection_made(transport)
        self._name = self.limit.admit(str(self.client[0]) if self.client else "")
        if self._name is None:
            transport.abort()
        else:
            self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        """Count it no more."""
        super().connection_lost(exc)
        self._await_nothing()
        if self._name is not None:
            self.limit.leave(self._name)

    def data_received(self, data: bytes) -> None:
        """Take what has come, and wait for a request's end only so long."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._await_nothing()  # for its body the receiver has a time limit
        elif self._deadline is None:
            self._await_request()

    def _await_request(self) -> None:
        self._deadline = self.loop.call_later(self.request_within_s, self.transport.abort)

    def _await_nothing(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def limited_protocol(connections: ConnectionLimit, within_s: float) -> type[LimitedProtocol]:
    """Return a protocol for uvicorn that is held to these limits.

    A connection is closed where its client takes longer than ``within_s`` to its first byte, or
    from there to the end of a request's headers; also where it goes on sending what nobody reads
    after its answer.
    """

    class Held(LimitedProtocol):
        limit = connections
        request_within_s = within_s

    return Held

"""One HTTP request, sent once: what the server answered, or what is known of why it did not.

Two ways of sending stand behind the same interface: ``over_aiohttp``, the default, and
``over_httpx`` for a transport that the caller brings. What they must agree on is ``unsent``,
because a purchase that has certainly not left may be sent again, and any other may not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final, Protocol

#: The most that is read of a JSON answer; a batch of 50 tasks has about 30 KB.
ANSWER_MAX_BYTES: Final = 1024 * 1024


@dataclass(frozen=True)
class Answer:
    """What the server answered. ``whole`` is false where the body broke off or was too long.

    The server may have echoed the key, so the repr leaves out what it wrote.
    """

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)
    whole: bool
    trouble: str


@dataclass(frozen=True)
class NoAnswer:
    """No status line came. ``unsent``: certainly no byte of the request has left."""

    unsent: bool
    trouble: str


class Secret(str):
    """A header's text with a key or a password: it prints as ``***`` wherever a value is shown."""

    __slots__ = ()

    def __repr__(self) -> str:
        return "'***'"


@dataclass(frozen=True)
class Limits:
    """In seconds: the longest silence, of TCP and of TLS each, and of one whole exchange.

    ``connections`` are open at a time.
    """

    silence_s: float
    connect_s: float
    deadline_s: float
    connections: int


class Exchange(Protocol):
    """Sends requests to the API's host."""

    @property
    def is_closed(self) -> bool:
        """Whether it sends nothing any more."""

    async def send(
        self, method: str, url: str, headers: Mapping[str, str], content: bytes | None
    ) -> Answer | NoAnswer:
        """Send one request once. Returns every failure, and raises only a cancellation."""

    async def aclose(self) -> None:
        """Close the connections."""


class Describe(Protocol):
    """Says what an exception means, without the key."""

    def __call__(self, error: Exception) -> str:
        """One line."""


def broken_off(status: int, headers: Mapping[str, str], trouble: str) -> Answer:
    """An answer whose status came, and whose body did not."""
    return Answer(status, headers, b"", whole=False, trouble=f"the answer broke off: {trouble}")


def unusable(status: int, headers: Mapping[str, str], trouble: str) -> Answer:
    """An answer whose body is not one that can be read."""
    return Answer(status, headers, b"", whole=False, trouble=trouble)

"""Callbacks: EvoLink reports the end of a task, and the task is then read.

A callback has no signature, so its content is not trusted. It is trusted by its address: a path
that only this deployment can make, with a token that names the request. A call to it is a hint to
read this one task, and nothing else.

``CallbackUrls``
    makes the address of a request
``url_trouble``
    what is wrong with an address that EvoLink is to call
``Receiver``
    the ASGI application that takes the calls; to be mounted, or served by the command
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from krea_dagster.callbacks.urls import CallbackUrls, url_trouble

if TYPE_CHECKING:
    from krea_dagster.callbacks.receiver import Receiver

__all__ = ["CallbackUrls", "Receiver", "url_trouble"]


def __getattr__(name: str) -> Any:
    """Import the receiver when it is first used: the command's --help does not need it."""
    if name == "Receiver":
        from krea_dagster.callbacks.receiver import Receiver  # noqa: PLC0415 - see above

        return Receiver
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

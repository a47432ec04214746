"""Callbacks: EvoLink says that a task has ended, and the row it belongs to is asked about.

A callback has no signature, so what it claims is never believed. What it is worth is its address:
a path that only this deployment knows, and in it a token that names the request. Whoever calls
it gives a hint that this one task should be asked about, and nothing else.

``CallbackUrls``, ``callback_url``, ``request_key_of``
    the address of a request, and the request of an address
``url_trouble``
    what is wrong with an address that EvoLink is to call
``Receiver``
    the ASGI application that takes the calls; to be mounted, or served by the command
``callbacks_command``
    the command line
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from krea_dagster.callbacks.command import callbacks_command
    from krea_dagster.callbacks.receiver import Receiver
    from krea_dagster.callbacks.urls import (
        CallbackUrls,
        callback_url,
        request_key_of,
        url_trouble,
    )

__all__ = [
    "CallbackUrls",
    "Receiver",
    "callback_url",
    "callbacks_command",
    "request_key_of",
    "url_trouble",
]

_HOMES: Final = {
    "CallbackUrls": "urls",
    "Receiver": "receiver",
    "callback_url": "urls",
    "callbacks_command": "command",
    "request_key_of": "urls",
    "url_trouble": "urls",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command's --help needs no server."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # noqa: PLC0415 - only needed here

    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

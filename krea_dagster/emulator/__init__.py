"""EvoLink's API for ``krea-2-turbo`` on this machine: synthetic images, and nothing is charged.

For tests, crash drills and a demo without a key. It imports nothing else of ``krea_dagster``,
so that it cannot share a mistake with the client that it tests.

``Emulator``
    the server in a background thread, with its ``world`` and its ``stats()``
``World``
    the state behind it: accounts, tasks, scripted faults; usable without HTTP
``FAULTS``
    every fault that it can produce, by name
``emulator_command``
    the command line
``OPENAPI``
    the path of the OpenAPI description of its responses
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from krea_dagster.emulator.command import emulator_command
    from krea_dagster.emulator.faults import FAULTS, Fault, UnknownFaultError
    from krea_dagster.emulator.foreground import serve
    from krea_dagster.emulator.server import Emulator
    from krea_dagster.emulator.state_file import StateInUseError
    from krea_dagster.emulator.world import World

__all__ = [
    "FAULTS",
    "OPENAPI",
    "Emulator",
    "Fault",
    "StateInUseError",
    "UnknownFaultError",
    "World",
    "emulator_command",
    "serve",
]

OPENAPI: Final = Path(__file__).with_name("openapi.yaml")

_MODULES: Final = {
    "FAULTS": "faults",
    "Emulator": "server",
    "Fault": "faults",
    "StateInUseError": "state_file",
    "UnknownFaultError": "faults",
    "World": "world",
    "emulator_command": "command",
    "serve": "foreground",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used: the command's --help needs no server."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)

"""When Python looks for cycles of objects that it can free. A start makes none."""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

#: The objects after which Python looks. A short command has fewer, Dagster alone as many.
_COLLECT_AFTER_OBJECTS: Final = 200_000


def collect_seldom() -> None:
    """Look for cycles after 200,000 objects instead of 700, and not at the end of the process.

    The system takes everything back then. Both take a third of the time of a short command.
    """
    gc.set_threshold(_COLLECT_AFTER_OBJECTS)
    atexit.register(gc.freeze)


@contextmanager
def importing() -> Iterator[None]:
    """Collect nothing while much is imported, and never look at what was imported again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()

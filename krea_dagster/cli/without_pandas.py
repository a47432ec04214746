"""Keeps pandas from being imported by a command that has no use for it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder


@contextmanager
def without_pandas() -> Iterator[None]:
    """Let ``import pandas`` fail within this block, unless it is imported already.

    Arrow and DuckDB import it with the first value that they convert, to recognize objects of
    pandas; without it they go on. It takes a third of the time of a short command. Afterwards both
    import it when a DataFrame is asked for.
    """
    finder = _NoPandas()
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)


class _NoPandas(MetaPathFinder):
    def find_spec(self, name: str, path: object, target: object = None) -> None:  # noqa: ARG002 - Python's signature
        if name == "pandas":
            raise ModuleNotFoundError("pandas is not used by this command", name=name)

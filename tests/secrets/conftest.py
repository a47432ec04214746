"""The tests of secrets run without the machine's proxies."""

from __future__ import annotations

from tests.engine.conftest import _no_proxies

__all__ = ["_no_proxies"]

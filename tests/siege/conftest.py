"""What the siege's tests share with the engine's: asyncio, no proxies, and each database."""

from __future__ import annotations

from tests.engine.conftest import _no_proxies, anyio_backend, journal_url

__all__ = ["_no_proxies", "anyio_backend", "journal_url"]

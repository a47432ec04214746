"""What the tests of callbacks share with the engine's: each database, and no proxies."""

from __future__ import annotations

from tests.engine.conftest import _no_proxies, journal, journal_url

__all__ = ["_no_proxies", "journal", "journal_url"]

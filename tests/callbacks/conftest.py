"""Fixtures shared with the engine's tests: each database, and no proxies."""

from __future__ import annotations

from tests.engine.conftest import _no_proxies, journal, journal_url

__all__ = ["_no_proxies", "journal", "journal_url"]

"""Runs on asyncio, against each database."""

from __future__ import annotations

from tests.engine.conftest import anyio_backend, journal_url

__all__ = ["anyio_backend", "journal_url"]

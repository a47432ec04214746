"""Fixtures: no proxies, and the databases."""

from __future__ import annotations

import pytest

from tests.engine.conftest import journal_url

__all__ = ["journal_url"]


@pytest.fixture(autouse=True)
def _no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)

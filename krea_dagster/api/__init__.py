"""EvoLink's API: requests, the meaning of the answers, and downloads of results."""

from __future__ import annotations

from krea_dagster.api.client import DEFAULT_BASE_URL, KreaClient
from krea_dagster.api.download import Download

__all__ = ["DEFAULT_BASE_URL", "Download", "KreaClient"]

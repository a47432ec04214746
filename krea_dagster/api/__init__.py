"""EvoLink's API: what is sent, what its answers mean, and how a result is fetched."""

from __future__ import annotations

from krea_dagster.api.client import DEFAULT_BASE_URL, KreaClient
from krea_dagster.api.download import Download

__all__ = ["DEFAULT_BASE_URL", "Download", "KreaClient"]

"""A storage root for the checks."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.plugin.checks.stored_manifests import StoredManifests


@pytest.fixture
def stored(tmp_path: Path) -> StoredManifests:
    return StoredManifests(str(tmp_path / "krea"))

"""The servers that the tests share, each started once. PostgreSQL does not run as root."""

from __future__ import annotations

import importlib.util
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.servers import (
    Azurite,
    FakeGcs,
    Postgres,
    SeaweedFS,
    Server,
    Store,
    Valkey,
    running,
)

#: `make test` does not install the group cluster, and pytest imports what it does not run.
collect_ignore = [] if importlib.util.find_spec("dagster_k8s") else ["test_kubernetes.py"]


@pytest.fixture(scope="session")
def servers_folder() -> Iterator[Path]:
    """Make a folder that other users may read, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(prefix="krea-cluster-"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


def _server(kind: type[Server]) -> Any:
    @pytest.fixture(scope="session")
    def started(servers_folder: Path) -> Iterator[Server]:
        with running(kind(servers_folder / kind.__name__.lower())) as server:
            yield server

    return started


s3 = _server(SeaweedFS)
azure = _server(Azurite)
gcs = _server(FakeGcs)
postgres = _server(Postgres)
broker = _server(Valkey)


@pytest.fixture(params=["s3", "azure", "gcs"])
def store(request: pytest.FixtureRequest) -> Store:
    """Each object store in turn."""
    found: Store = request.getfixturevalue(request.param)
    return found

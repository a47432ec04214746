"""Each object store as the storage root: bought once, and found again by the next run."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Final

import pytest

from krea_dagster.emulator import Emulator
from tests.cluster.cluster import ROOT, write_prompts
from tests.cluster.servers import SCRIPTS, Postgres, Store

pytestmark = pytest.mark.cluster

ROWS: Final = 20


def test_a_bucket_holds_the_table_the_images_and_the_manifests(
    tmp_path: Path, store: Store, postgres: Postgres
) -> None:
    write_prompts(store, ROWS)
    database = postgres.create(f"journal_{store.protocol}")

    def krea(*arguments: str) -> str:
        home = tmp_path / "home"
        home.mkdir(exist_ok=True)
        done = subprocess.run(
            [str(SCRIPTS / "krea-dagster"), *arguments],
            cwd=home,
            env={
                **os.environ,
                **store.environment(),
                "KREA_STORAGE": f"{store.url}/made",
                "KREA_PROMPTS": f"{store.url}/prompts.parquet",
                "KREA_JOURNAL_URL": database,
                "KREA_PARTITION_BY": "hash:2",
                "EVOLINK_BASE_URL": emulator.url,
                "DAGSTER_HOME": str(home),
                "PYTHONPATH": str(ROOT),
            },
            check=False,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    with Emulator(state=tmp_path / "emulator", latency_s=0.1) as emulator:
        krea("materialize")
        assert emulator.stats()["creates"] == ROWS
        assert "Nothing was bought" in krea("materialize")
        assert "Every credit is accounted for" in krea("verify")
        assert emulator.stats()["creates"] == ROWS
    with store.client() as client:
        assert len(client.find(f"{store.url}/made/images")) == ROWS
        manifests = client.find(f"{store.url}/made/manifest")
    assert [Path(one).name for one in manifests] == ["bucket-000.parquet", "bucket-001.parquet"]

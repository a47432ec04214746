"""Two hosts share a bucket: nothing is falsely missing, and nothing is listed that nobody wants."""

from __future__ import annotations

import os
import re
import subprocess
import urllib.request
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.emulator import Emulator
from tests.cluster.servers import SCRIPTS, Postgres, SeaweedFS, Store

pytestmark = pytest.mark.cluster

ROOT: Final = Path(__file__).parents[2]
BEFORE: Final = 200
SHARED: Final = 120

_COUNTER: Final = re.compile(r'SeaweedFS_s3_request_total\{.*type="(\w+)"\S* (\S+)')


def requests_of(store: SeaweedFS) -> Counter[str]:
    """Return how many requests of each kind the server has counted."""
    url = f"http://127.0.0.1:{store._ports['metrics']}/metrics"
    with urllib.request.urlopen(url, timeout=10) as answer:
        found: Counter[str] = Counter()
        for kind, number in _COUNTER.findall(answer.read().decode()):
            found[kind] += int(float(number))
        return found


def write_table(store: Store, path: str) -> None:
    """Write 200 prompts of the partition ``before``, and 120 that both a and b have."""
    parts = [("before", number) for number in range(BEFORE)]
    parts += [(key, number) for key in "ab" for number in range(SHARED)]
    rows = [
        {
            "prompt_id": f"{key}{number}",
            "prompt": f"{'old' if key == 'before' else 'shared'} {number}",
            "seed": number + 1,
            "size": "1:2",
            "part": key,
        }
        for key, number in parts
    ]
    with store.client() as client, client.open(path, "wb") as file:
        pq.write_table(pa.Table.from_pylist(rows), file)


class Host:
    """A host: a working folder, a Dagster home and an environment of its own."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        folder.mkdir()
        self._folder = folder
        self._environment = {**os.environ, **environment, "DAGSTER_HOME": str(folder)}

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [str(SCRIPTS / "krea-dagster"), *arguments],
            cwd=self._folder,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self, *arguments: str) -> str:
        process = self.start(*arguments)
        said, _ = process.communicate()
        assert process.returncode == 0, said
        return said


@pytest.fixture
def database(tmp_path: Path) -> str:
    """The name of the journal's database."""
    return f"journal_{tmp_path.name}"


@pytest.fixture
def hosts(
    tmp_path: Path, database: str, s3: SeaweedFS, postgres: Postgres, emulator: Emulator
) -> Callable[[str], Host]:
    root = f"{s3.url}/{tmp_path.name}"
    write_table(s3, f"{root}/prompts.parquet")
    environment = {
        **s3.environment(),
        "KREA_STORAGE": f"{root}/made",
        "KREA_PROMPTS": f"{root}/prompts.parquet",
        "KREA_JOURNAL_URL": postgres.create(database),
        "KREA_PARTITION_BY": "column:part",
        "EVOLINK_BASE_URL": emulator.url,
        "EVOLINK_API_KEY": "emulator",
        "PYTHONPATH": str(ROOT),
    }
    return lambda name: Host(tmp_path / name, environment)


@pytest.fixture
def emulator(tmp_path: Path) -> Any:
    with Emulator(state=tmp_path / "emulator", latency_s=1.0) as started:
        yield started


def test_two_hosts_that_want_the_same_images_fetch_each_of_them_once(
    hosts: Callable[[str], Host],
    database: str,
    s3: SeaweedFS,
    postgres: Postgres,
    emulator: Emulator,
) -> None:
    one, two = hosts("one"), hosts("two")
    one.run("materialize", "--partition", "before")
    before, counted = emulator.stats(), requests_of(s3)
    both = [host.start("materialize", "--partition", key) for host, key in ((one, "a"), (two, "b"))]
    said = [process.communicate()[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    after, asked = emulator.stats(), requests_of(s3) - counted

    assert after["creates"] - before["creates"] == SHARED
    assert after["file_gets"] - before["file_gets"] == SHARED
    with closing(postgres.connect(database)) as connection:
        missing = connection.execute("SELECT 1 FROM events WHERE event = 'file_missing'")
        assert missing.fetchall() == []
    assert "Every credit is accounted for" in two.run("verify")
    # Apart from the images: the marker, the probe, the manifests and the measures of two runs.
    assert asked["PUT"] <= SHARED + 20
    assert asked["LIST"] <= 20
    # SeaweedFS counts HEAD as GET. A check reads up to 100 files of another run again.
    assert asked["GET"] <= 6 * 2 * SHARED


def test_a_new_journal_that_adopts_a_bucket_asks_once_for_each_image(
    hosts: Callable[[str], Host], s3: SeaweedFS, postgres: Postgres, emulator: Emulator
) -> None:
    hosts("one").run("materialize", "--partition", "before")
    other = postgres.create("another_journal")
    two = hosts("two")
    two.run("accept", "root", "--journal", other)
    counted, created = requests_of(s3), emulator.stats()["creates"]
    two.run("materialize", "--partition", "before", "--journal", other)
    asked = requests_of(s3) - counted
    assert emulator.stats()["creates"] == created
    # One listing finds an image. It is read, which takes two requests, and its size is asked for;
    # a check reads 100 of them again.
    assert asked["LIST"] <= BEFORE + 20
    assert asked["GET"] <= 5 * BEFORE

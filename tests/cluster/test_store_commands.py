"""Each command and each part of the plugin, on each object store."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dagster as dg
import httpx
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result

from krea_dagster import KreaManifestIOManager
from krea_dagster.cli.main import main
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import KreaError, StorageRefused
from krea_dagster.plugin.environment import definitions_from_environment
from tests.cluster.servers import Store
from tests.curation.review.review_harness import Server

pytestmark = pytest.mark.cluster

PROMPTS = [{"prompt": f"a lighthouse, number {number}", "size": "1:2"} for number in range(6)]


@dataclass
class Project:
    """A project whose table, images and exports are in a bucket, and the journal in a file."""

    store: Store
    root: str
    folder: Path
    emulator: Emulator

    def write_table(self, rows: list[dict[str, Any]]) -> None:
        with (
            self.store.client() as client,
            client.open(f"{self.root}/prompts.parquet", "wb") as file,
        ):
            pq.write_table(pa.Table.from_pylist(rows), file)

    def run(self, *arguments: str) -> str:
        found = self.invoke(*arguments)
        assert found.exit_code == 0, found.output + repr(found.exception)
        return found.output

    def invoke(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments)

    @property
    def storage(self) -> Storage:
        return Storage(f"{self.root}/made")

    def images(self) -> list[str]:
        return list(self.storage.names("images"))

    def events(self, event: str) -> int:
        with closing(sqlite3.connect(self.folder / "journal.db")) as database:
            query = "SELECT count(*) FROM events WHERE event = ?"
            return int(database.execute(query, [event]).fetchone()[0])


@pytest.fixture
def project(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Project]:
    root = f"{store.url}/{tmp_path.name}-{store.protocol}"
    with Emulator(state=tmp_path / "emulator", latency_s=0.1) as emulator:
        environment: Mapping[str, str] = {
            **store.environment(),
            "KREA_STORAGE": f"{root}/made",
            "KREA_PROMPTS": f"{root}/prompts.parquet",
            "KREA_JOURNAL_URL": f"sqlite:///{tmp_path / 'journal.db'}",
            "KREA_PARTITION_BY": "hash:2",
            "EVOLINK_BASE_URL": emulator.url,
            "EVOLINK_API_KEY": "emulator",
            "DAGSTER_HOME": str(tmp_path),
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        made = Project(store, root, tmp_path, emulator)
        made.write_table(PROMPTS)
        yield made


def test_images_are_bought_once_and_a_deleted_one_is_fetched_again(project: Project) -> None:
    project.run("materialize")
    assert len(project.images()) == len(PROMPTS)
    assert "Nothing was bought" in project.run("materialize")
    gone = project.images()[0]
    project.storage.remove(gone)
    assert "missing" in project.invoke("verify").output
    project.run("materialize")
    assert gone in project.images()
    assert project.events("file_missing") == 1
    assert "Every credit is accounted for" in project.run("verify")
    assert project.emulator.stats()["creates"] == len(PROMPTS)
    assert "6" in project.run("spend")
    assert project.run("quote")


def test_the_gallery_and_exports_are_made_of_a_bucket(project: Project) -> None:
    project.run("materialize")
    page = project.folder / "gallery.html"
    project.run("gallery", "-o", str(page))
    assert "a lighthouse, number 3" in page.read_text()
    for form in ("imagefolder", "parquet", "webdataset"):
        target = f"{project.root}/{form}"
        project.run("export", "--all", "--format", form, "--to", target)
        exported = Storage(target)
        (version,) = {name.partition("/")[0] for name in exported.names("") if "/" in name}
        with exported.open("LATEST") as file:
            assert file.read().decode().strip() == version
        again = project.run("export", "--all", "--format", form, "--to", target)
        assert "0 written" in again


def test_the_review_page_shows_the_images_of_a_bucket(project: Project) -> None:
    project.run("materialize")
    reviewed: Any = SimpleNamespace(folder=f"{project.root}/made")
    server = Server(reviewed)
    try:
        with httpx.Client(base_url=server.url, timeout=60) as page:
            selection = {"selection": '{"where": [["status", "is", "stored"]]}'}
            view = page.get("api/view", params=selection).json()
            part = {**selection, "number": view["number"], "generation": view["generation"]}
            rows = page.get("api/rows", params=part).json()["rows"]
            assert len(rows) == len(PROMPTS)
            for row in rows:
                assert page.get(f"small/{row['image_sha256']}").status_code == 200
    finally:
        assert server.stop()[0] == 0


def test_a_manifest_is_an_input_of_other_assets(project: Project) -> None:
    project.run("materialize")
    seen: list[int] = []

    @dg.asset(
        ins={"image_manifest": dg.AssetIn(input_manager_key="krea_manifest")},
    )
    def rows(image_manifest: pd.DataFrame) -> None:
        seen.append(len(image_manifest))

    spec = dg.AssetSpec(
        "image_manifest", partitions_def=dg.StaticPartitionsDefinition(["bucket-000", "bucket-001"])
    )
    manager = KreaManifestIOManager(storage=f"{project.root}/made")
    result = dg.materialize([rows, spec], selection=[rows], resources={"krea_manifest": manager})
    assert result.success
    assert seen == [len(PROMPTS)]


def test_salvage_collects_into_a_bucket(project: Project) -> None:
    project.run("materialize")
    project.storage.remove(project.images()[0])
    said = project.run("salvage")
    assert said
    assert project.emulator.stats()["creates"] == len(PROMPTS)


def test_the_sensor_sees_a_changed_table(project: Project) -> None:
    defs = definitions_from_environment()
    with dg.DagsterInstance.ephemeral() as instance:

        def tick(cursor: str | None) -> Any:
            context = dg.build_sensor_context(instance, cursor, resources=defs.resources)
            found = defs.resolve_sensor_def("krea_prompts").evaluate_tick(context)
            for event in found.asset_events:  # as the daemon does
                instance.report_runless_asset_event(event)
            return found

        time.sleep(2.1)  # a file that was written just now is read at every tick
        first = tick(None)
        assert first.asset_events
        same = tick(first.cursor)
        assert not same.asset_events
        project.write_table([*PROMPTS, {"prompt": "one more", "size": "1:2"}])
        changed = tick(same.cursor or first.cursor)
        assert len({event.partition for event in first.asset_events}) == 2
        assert len({event.partition for event in changed.asset_events}) == 1


def test_a_bucket_that_does_not_exist_is_one_line(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KREA_STORAGE", f"{project.store.protocol}://no-such-bucket/made")
    for command in ("materialize", "verify", "spend"):
        found = project.invoke(command)
        assert isinstance(found.exception, KreaError), found.output
    assert project.emulator.stats()["creates"] == 0


def test_wrong_credentials_are_one_line(project: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: dict[str, dict[str, Any]] = {
        "s3": {"key": "test", "secret": {"env": "A_WRONG_SECRET"}},
        "az": {"connection_string": {"env": "A_WRONG_SECRET"}},
    }
    if project.store.protocol not in wrong:
        pytest.skip("this server accepts everything")
    text = project.store.environment().get("AZURE_STORAGE_CONNECTION_STRING", "")
    key = "d3Jvbmctc2VjcmV0LXdyb25nLXNlY3JldA=="
    text = ";".join(
        f"AccountKey={key}" if part.startswith("AccountKey=") else part for part in text.split(";")
    )
    monkeypatch.setenv("A_WRONG_SECRET", text or "wrong-secret-1")
    storage = Storage(f"{project.root}/made", wrong[project.store.protocol])
    with pytest.raises(StorageRefused) as refused:
        storage.probe()
    said = str(refused.value)
    assert "access is refused" in said
    assert "http://127.0.0.1" in said
    assert "\n" not in said
    assert "wrong-secret-1" not in said
    assert key not in said

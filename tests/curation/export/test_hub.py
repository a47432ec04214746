"""Pushes to a server that speaks the Hub's API."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import huggingface_hub.constants
import pytest

from krea_dagster import ExportSpec, Krea
from krea_dagster.application.settings import ConnectionSettings
from krea_dagster.curation.export.export import Exported
from krea_dagster.errors import ConfigError, StorageError
from tests.curation.export.export_project import ExportProject
from tests.curation.export.hub_server import TOKEN, Hub
from tests.curation.export.test_export import FORMS, contents

# huggingface_hub calls its HTTP client in a way that is deprecated there.
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with Hub().served() as served:
        # As HF_ENDPOINT and HF_HUB_DISABLE_XET do before the library is imported.
        monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    project = ExportProject(str(tmp_path / "krea"))
    project.write_accepted(project.rows(8))
    return project


def krea_of(project: ExportProject) -> Krea:
    return Krea(ConnectionSettings(emulator=True, storage=project.root))


def pushed(project: ExportProject, **fields: Any) -> Exported:
    spec = ExportSpec.parse(push="ada/boats", splits=["train=0.5", "test=0.5"], **fields)
    return krea_of(project).export(spec)


@pytest.mark.parametrize("form", FORMS)
def test_a_private_repository_gets_the_files_of_the_version(
    project: ExportProject, hub: Hub, form: Any
) -> None:
    done = pushed(project, form=form, shard_images=3)
    repository = hub.repositories["ada/boats"]
    assert repository.visibility == "private"
    files = {name: data for name, data in repository.files.items() if name != ".gitattributes"}
    assert files == contents(Path(done.path))
    assert repository.commits == ["initial commit", f"Export {done.version}"]
    assert done.pushed is not None
    assert done.pushed.is_new
    assert done.pushed.url == f"{hub.url}/datasets/ada/boats"
    assert done.pushed.commit == repository.head


def test_a_push_without_changes_sends_nothing_and_makes_no_commit(
    project: ExportProject, hub: Hub
) -> None:
    pushed(project)
    sent = hub.uploads
    again = pushed(project)
    assert again.pushed is not None
    assert not again.pushed.is_new
    assert hub.uploads == sent
    assert len(hub.repositories["ada/boats"].commits) == 2


def test_the_next_version_replaces_the_last_one_and_leaves_other_files(
    project: ExportProject, hub: Hub
) -> None:
    pushed(project, form="imagefolder", shard_images=3)
    repository = hub.repositories["ada/boats"]
    repository.files["LICENSE"] = b"mine"
    sent = hub.uploads
    project.write_accepted(project.rows(7, 1))
    done = pushed(project, form="imagefolder", shard_images=3)
    others = {"LICENSE": b"mine", ".gitattributes": b"*.png lfs"}
    assert repository.files == contents(Path(done.path)) | others
    assert repository.commits[-1] == f"Export {done.version}"
    assert hub.uploads - sent <= 3, "images that it has already are not sent again"


def test_a_public_repository_is_made_only_on_request(project: ExportProject, hub: Hub) -> None:
    pushed(project, public=True)
    assert hub.repositories["ada/boats"].visibility == "public"


def test_a_failed_push_names_the_export_and_never_the_token(
    project: ExportProject, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.fails = True
    with pytest.raises(StorageError, match="the same command pushes it again") as caught:
        pushed(project)
    assert TOKEN not in str(caught.value)
    assert (Path(project.root) / "exports" / "parquet" / "LATEST").exists()
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(StorageError, match="ada/boats failed") as caught:
        pushed(project)
    assert "hf_wrong" not in str(caught.value)


def test_what_is_wrong_is_said_before_anything_is_exported(
    project: ExportProject, monkeypatch: pytest.MonkeyPatch
) -> None:
    krea = krea_of(project)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    with pytest.raises(ConfigError, match="use OWNER/NAME"):
        krea.export(ExportSpec(push="boats"))
    with pytest.raises(ConfigError, match="only an export to a folder"):
        krea.export(ExportSpec(push="ada/boats"), "memory://out")
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", "/nowhere")
    with pytest.raises(ConfigError, match="set HF_TOKEN"):
        krea.export(ExportSpec(push="ada/boats"))
    assert not (Path(project.root) / "exports").exists()

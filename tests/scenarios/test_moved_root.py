"""A storage root that was moved, again, and to another kind of store: everything goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

import fsspec
import polars as pl
import pytest
from click.testing import CliRunner

from krea_dagster import BuyOptions, ExportSpec, Krea, Settings
from krea_dagster.application.manifest_frames import Selection, load
from krea_dagster.cli.main import main
from krea_dagster.curation.gallery.filter import GalleryFilter
from tests.dagster_bench import SettingsOf, write_table

ROWS = {"prompt_id": ["a", "b", "c"], "prompt": ["a sail", "a mast", "a hull"], "size": ["1:2"] * 3}


@pytest.fixture
def krea(tmp_path: Path, settings_of: SettingsOf) -> Krea:
    settings = settings_of(
        "hash:2",
        storage=str(tmp_path / "first"),
        journal_url=f"sqlite:///{tmp_path / 'journal.db'}",
    )
    write_table(Path(settings.prompts), ROWS)
    krea = Krea(settings)
    krea.run()
    krea.run(options=BuyOptions(regenerate=["a"]))
    krea.curate()
    return krea


def moved(krea: Krea, storage: str) -> Krea:
    """Move the root, to a folder or a store in memory, and return the project there."""
    before = Path(krea.settings.storage)
    if "://" in storage:
        fsspec.filesystem("memory").put(str(before), storage, recursive=True)
        shutil.rmtree(before)
    else:
        shutil.move(before, storage)
    assert isinstance(krea.settings, Settings)
    return Krea(krea.settings.model_copy(update={"storage": storage}))


def contents(krea: Krea, paths: Sequence[str]) -> int:
    """Open every path as a reader of the manifest does; return the bytes."""
    found = [fsspec.open(path, "rb").open().read() for path in paths]
    return sum(map(len, found))


def adds_up_and_opens(krea: Krea, tmp_path: Path) -> None:
    rows = krea.manifest()
    size = int(rows["image_bytes"].sum())
    assert contents(krea, rows["image_path"].tolist()) == size
    keys = sorted(set(rows["partition_key"]))
    lazy = load(
        krea.open_storage(), keys, (), annotation=pl.LazyFrame, selection=Selection()
    ).collect()
    assert contents(krea, lazy["image_path"].to_list()) == size
    proof = krea.verify()
    assert (proof.adds_up, proof.figures.files, proof.figures.rows_agreeing) == (True, 4, 3)
    assert rows.set_index("prompt_id")["attempt"].to_dict() == {"a": 1, "b": 0, "c": 0}
    assert krea.gallery(tmp_path / "page.html", GalleryFilter()).shown == 3
    assert krea.export(ExportSpec(), str(tmp_path / "export")).summary()["images"] == 3
    assert krea.quote().total.to_buy == krea.quote().total.refetched == 0


def test_a_root_that_is_moved_twice_and_to_another_store_just_works(
    krea: Krea, tmp_path: Path
) -> None:
    places = ["second", "third $1 place", f"memory://{uuid4().hex}/krea"]
    for place in places:
        krea = moved(krea, place if "://" in place else str(tmp_path / place))
        adds_up_and_opens(krea, tmp_path)
        assert krea.run().report.progress.delivered == 0
        stored = krea.open_storage()
        for name in stored.names("manifest"):
            with stored.open(name) as file:
                paths = pl.read_parquet(file.read())["image_path"]
            assert paths.str.starts_with(stored.locate("images")).all()


def test_verify_is_clean_on_the_command_line_after_a_move(
    krea: Krea, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    krea = moved(krea, str(tmp_path / "second"))
    monkeypatch.setenv("KREA_STORAGE", krea.settings.storage)
    monkeypatch.setenv("KREA_JOURNAL_URL", krea.settings.journal_url)
    said = CliRunner().invoke(main, ["verify"])
    assert (said.exit_code, "Every credit is accounted for." in said.stdout) == (0, True)


def test_images_of_a_store_are_pruned(krea: Krea, tmp_path: Path) -> None:
    krea = moved(krea, f"memory://{uuid4().hex}/krea")
    rows = {name: values[:1] for name, values in ROWS.items()}
    write_table(tmp_path / "prompts.parquet", rows)
    krea.run()
    krea.curate()
    found = krea.prune(unlisted=True, dry_run=False)
    assert (found.files_before, found.files_after) == (4, 2)
    assert found.bytes_before > found.bytes_after > 0
    proof = krea.verify()
    assert (proof.adds_up, proof.figures.pruned) == (True, 2)

"""Pruning frees the files of images that nothing needs, and the books keep the images."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pandas as pd
import pyarrow as pa
import pytest
from click.testing import CliRunner

from krea_dagster import BuyOptions, ExportSpec, Krea, Settings
from krea_dagster.cli.main import main
from krea_dagster.curation.gallery.filter import GalleryFilter
from krea_dagster.emulator import Emulator
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import Verdict
from krea_dagster.errors import ConfigError, PromptTableError
from krea_dagster.spend.proof.findings import FindingKind
from tests.dagster_bench import SettingsOf, write_table

ROWS: dict[str, list[Any]] = {
    "prompt_id": ["changed", "removed", "again", "refused", "kept"],
    "prompt": ["a fox", "a wolf", "a bear", "a hare", "a lynx"],
    "size": ["1:2"] * 5,
    "seed": [9, None, None, 7, None],
}
EVERYTHING: dict[str, Any] = {"rejected": True, "replaced": True, "unlisted": True}


class Project:
    """A project whose rows change; in the end one image of each kind is not needed."""

    def __init__(self, settings: Settings, emulator: Emulator) -> None:
        self.krea = Krea(settings)
        self.emulator = emulator
        self.root = Path(settings.storage)

    def write(self, **changes: Callable[[list[Any]], list[Any]]) -> None:
        rows = {name: changes.get(name, list)(values) for name, values in ROWS.items()}
        write_table(Path(self.krea.table().place), rows)

    def buy(self, *again: str) -> None:
        self.krea.run(options=BuyOptions(regenerate=list(again)))

    def judge(self, prompt_id: str, verdict: str, *, earlier: bool = False) -> None:
        rows = self.krea.earlier() if earlier else self.krea.manifest()
        row = rows[rows["prompt_id"] == prompt_id].iloc[0]
        named = (row.request_key, prompt_id, int(row["sample"]), 0, row.partition_key)
        with self.krea.open_journal() as journal:
            name = f"{prompt_id}-{verdict}"
            journal.verdicts.add([Verdict(name, row.image_sha256, verdict, "ann", *named)])

    def files(self) -> set[str]:
        return {path.name for path in self.root.glob("images/*/*.*")}

    def bought(self) -> int:
        return int(self.emulator.stats(tasks=False)["creates"])


@pytest.fixture
def settings(settings_of: SettingsOf) -> Settings:
    settings = settings_of("hash:2")
    write_table(Path(settings.prompts), ROWS)
    return settings


@pytest.fixture
def project(settings: Settings, emulator: Emulator) -> Project:
    project = Project(settings, emulator)
    project.buy()
    project.judge("refused", "reject")

    def drop(values: list[Any]) -> list[Any]:
        """Leave out the row "removed"."""
        return [values[0], *values[2:]]

    project.write(
        prompt_id=drop, prompt=drop, seed=drop, size=lambda values: ["1:1", *drop(values)[1:]]
    )
    project.buy("again")
    return project


def names(found: pa.Table) -> dict[str, str]:
    rows = found.select(["prompt_id", "why"]).to_pylist()
    return {row["prompt_id"]: row["why"] for row in rows}


# -- what is removed ---------------------------------------------------------------------------


def test_it_says_first_what_it_would_remove_and_how_much_that_frees(project: Project) -> None:
    before = project.files()
    found = project.krea.prune(**EVERYTHING)
    assert names(found.images) == {
        "again": "replaced", "changed": "replaced", "removed": "unlisted", "refused": "rejected",
    }  # fmt: skip
    assert (found.files_before, found.files_after) == (7, 3)
    freed = sum(found.images["image_bytes"].to_pylist())
    assert found.bytes_before - found.bytes_after == freed > 0
    assert project.files() == before


@pytest.mark.parametrize(
    ("kind", "gone"),
    [("rejected", {"refused"}), ("replaced", {"again", "changed"}), ("unlisted", {"removed"})],
)
def test_each_kind_is_removed_alone(project: Project, kind: str, gone: set[str]) -> None:
    before = project.files()
    found = project.krea.prune(**cast("Any", {kind: True}), dry_run=False)
    assert set(names(found.images)) == gone
    removed = {Path(path).name for path in found.images["image_path"].to_pylist()}
    assert project.files() == before - removed
    assert found.files_after == 7 - len(gone)


def test_the_books_keep_them(project: Project, tmp_path: Path) -> None:
    spent = project.krea.spend()
    project.krea.prune(**EVERYTHING, dry_run=False)
    proof = project.krea.verify()
    assert (proof.adds_up, proof.figures.files, proof.figures.pruned) == (True, 3, 4)
    assert project.krea.spend() == spent
    row = project.krea.manifest().set_index("prompt_id").loc["refused"]
    assert (row["status"], row["error_code"]) == ("stored", "pruned")
    assert pd.isna(row["image_path"])
    assert project.krea.earlier().empty
    assert project.krea.prune(**EVERYTHING).images.num_rows == 0
    page = project.krea.gallery(tmp_path / "page.html", GalleryFilter(earlier=True))
    assert (page.shown, page.missing) == (3, 0)
    for everything in (True, False):
        spec = ExportSpec(form="jsonl", everything=everything)
        done = project.krea.export(spec, str(tmp_path / f"export-{everything}"))
        assert done.summary()["images"] == 3


def test_they_are_neither_fetched_nor_bought_again(project: Project) -> None:
    project.krea.prune(**EVERYTHING, dry_run=False)
    files, bought = project.files(), project.bought()
    quoted = project.krea.quote().total
    assert (quoted.to_buy, quoted.refetched) == (0, 0)
    assert project.krea.run().report.progress.delivered == 0
    project.krea.salvage()
    assert (project.files(), project.bought()) == (files, bought)
    assert project.krea.verify().adds_up


# -- a row that requests one again -------------------------------------------------------------


def test_a_row_that_requests_a_pruned_image_again_is_bought_only_when_a_person_says_so(
    project: Project,
) -> None:
    project.krea.prune(**EVERYTHING, dry_run=False)
    project.write()  # as it was: "changed" has its first size, and "removed" is there again
    bought = project.bought()
    quoted = project.krea.quote()
    assert (quoted.total.to_buy, quoted.pruned) == (0, 2)
    assert project.krea.run().pruned == 2
    assert project.bought() == bought
    assert project.krea.verify().adds_up
    project.buy("pruned")
    assert project.bought() == bought + 2
    assert project.krea.quote().pruned == 0
    rows = project.krea.manifest().set_index("prompt_id")
    assert list(rows.index[rows["image_path"].isna()]) == ["refused"]


def test_a_rejected_image_is_not_bought_a_second_time_with_its_seed(project: Project) -> None:
    project.krea.prune(rejected=True, dry_run=False)
    with pytest.raises(ConfigError, match="fixes the seed of row 'refused'"):
        project.buy("rejected")


# -- what is kept ------------------------------------------------------------------------------


def test_an_image_that_a_person_kept_or_accepted_stays(project: Project) -> None:
    project.judge("removed", "keep", earlier=True)
    project.krea.curate()
    project.judge("kept", "reject")
    found = project.krea.prune(**EVERYTHING, dry_run=False)
    assert set(names(found.images)) == {"again", "changed", "refused"}
    assert sorted(found.left) == [
        "a person kept it",
        "accepted: `krea-dagster curate` brings the accepted images up to date",
    ]
    assert project.krea.verify().adds_up


def test_an_image_that_the_table_requests_again_stays(project: Project) -> None:
    """Also if no run has written its manifest yet."""
    project.write()
    found = project.krea.prune(**EVERYTHING)
    assert set(names(found.images)) == {"again", "refused"}
    assert found.left == {"the prompt table requests it again: materialize first": 2}


def test_the_image_that_replaces_another_must_be_stored(project: Project) -> None:
    project.judge("again", "reject")
    found = project.krea.prune(**EVERYTHING, dry_run=False)
    assert names(found.images)["again"] == "rejected"
    assert found.left == {"its successor is not stored, or was rejected": 1}
    assert len(project.files()) == 3


def test_images_that_no_manifest_lists_yet_stay(settings: Settings, emulator: Emulator) -> None:
    """A run that was killed before it wrote a manifest has bought what the table requests."""
    project = Project(settings, emulator)
    project.buy()
    for path in project.root.glob("manifest/*.parquet"):
        path.unlink()
    assert project.krea.prune(**EVERYTHING, dry_run=False).images.num_rows == 0
    assert len(project.files()) == 5


@pytest.mark.parametrize("trouble", ["damaged", "errors", "removed"])
def test_if_the_table_cannot_be_read_nothing_is_removed(project: Project, trouble: str) -> None:
    source, before = Path(project.krea.table().place), project.files()
    chosen: dict[str, Any] = {"replaced": True, "unlisted": True, "dry_run": False}
    if trouble == "removed":
        source.unlink()
        left = project.krea.prune(**chosen).left
        assert left == {"of another prompt table: name it with --prompts": 3}
    elif trouble == "errors":
        project.write(size=lambda _: ["oblong"] * 5)
        with pytest.raises(PromptTableError):
            project.krea.prune(**chosen)
    else:
        source.write_bytes(source.read_bytes()[:100])
        with pytest.raises(ConfigError):
            project.krea.prune(**chosen)
    assert project.files() == before


# -- interrupted -------------------------------------------------------------------------------


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("removed", [0, 1, 3])
def test_a_killed_prune_is_continued_by_the_next(
    project: Project, monkeypatch: pytest.MonkeyPatch, removed: int
) -> None:
    remove, calls = Storage.remove, iter(range(100))

    def killed(storage: Storage, name: str) -> None:
        if name.startswith("images/") and next(calls) == removed:
            raise Killed
        remove(storage, name)

    with monkeypatch.context() as patched:
        patched.setattr(Storage, "remove", killed)
        with pytest.raises(Killed):
            project.krea.prune(**EVERYTHING, dry_run=False)
    proof = project.krea.verify()
    assert proof.adds_up
    assert proof.counts[FindingKind.FILE_PRUNED] == 4 - removed
    assert project.krea.quote().total.refetched == 0
    found = project.krea.prune(rejected=True, dry_run=False)
    assert (found.finished, len(project.files())) == (4 - removed, 3)
    assert project.krea.verify().counts.get(FindingKind.FILE_PRUNED, 0) == 0


def test_files_that_are_put_back_are_taken_back_by_accept_root(
    project: Project, tmp_path: Path
) -> None:
    removed = project.krea.earlier().set_index("prompt_id").loc["removed"]
    content = Path(removed["image_path"]).read_bytes()
    project.krea.prune(unlisted=True, dry_run=False)
    Path(removed["image_path"]).write_bytes(content)
    assert "1 that were pruned are there again" in project.krea.accept_root()
    assert list(project.krea.earlier()["prompt_id"]).count("removed") == 1
    assert project.krea.verify().figures.pruned == 0


# -- the command ---------------------------------------------------------------------------------


def test_the_command_lists_first_and_removes_with_yes(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = project.krea.settings
    for name in ("prompts", "storage", "partition_by"):
        monkeypatch.setenv(f"KREA_{name.upper()}", str(getattr(settings, name)))
    run = CliRunner().invoke
    said = run(main, ["prune", "--rejected", "--unlisted"])
    assert said.exit_code == 0, said.output
    assert "removed: 1:2 1K, attempt 0" in said.stdout
    assert "images/: 7 files" in said.stdout
    assert "Nothing was removed. Repeat the command with --yes" in said.stdout
    done = run(main, ["prune", "--rejected", "--unlisted", "--yes", "--json"])
    figures = json.loads(done.stdout)
    assert figures["counts"] == {"rejected": 1, "unlisted": 1}
    assert (figures["files_before"], figures["files_after"]) == (7, 5)
    assert len(project.files()) == 5
    assert run(main, ["prune"]).exit_code == 2

"""What was bought stays in sight after its row was changed or removed, or asked again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pandas as pd
import pytest

from krea_dagster import BuyOptions, ExportSpec, Krea, Settings
from krea_dagster.curation.gallery.filter import GalleryFilter
from krea_dagster.curation.review.index import build_index
from krea_dagster.engine.verdict import Verdict
from tests.dagster_bench import SettingsOf, write_table

ROWS = {
    "prompt_id": ["changed", "removed", "again", "same"],
    "prompt": ["a fox", "a wolf", "a bear", "a hare"],
    "animal": ["fox", "wolf", "bear", "hare"],
    "size": ["1:2"] * 4,
}


@pytest.fixture
def krea(settings_of: SettingsOf) -> Krea:
    """A project in which one row was changed, one removed, and one has another image."""
    settings = settings_of("hash:2")
    write_table(Path(settings.prompts), ROWS)
    krea = Krea(settings)
    krea.run()
    rows = {name: [values[0], *values[2:]] for name, values in ROWS.items()}
    rows["size"] = ["1:1", "1:2", "1:2"]
    write_table(Path(settings.prompts), rows)
    krea.run(options=BuyOptions(regenerate=["again"]))
    return krea


def test_each_is_listed_with_its_request_its_columns_and_its_successor(krea: Krea) -> None:
    found = krea.earlier().set_index("prompt_id")
    present = krea.manifest().set_index("prompt_id")
    assert sorted(found.index) == ["again", "changed", "removed"]
    assert found["size"].to_dict() == {"again": "1:2", "changed": "1:2", "removed": "1:2"}
    assert found["attempt"].to_dict() == {"again": 0, "changed": 0, "removed": 0}
    assert found["animal"].to_dict() == {"again": "bear", "changed": "fox", "removed": "wolf"}
    assert found["credits_charged"].tolist() == [0.45] * 3
    assert all(Path(path).is_file() for path in found["image_path"])
    for name in ("again", "changed"):
        assert found.loc[name, "successor"] == present.loc[name, "request_key"]
    assert pd.isna(found.loc["removed", "successor"])
    assert krea.verify().adds_up


def test_they_are_known_without_the_rows_that_left_the_manifests(krea: Krea) -> None:
    """As in a root of an older version: by the row's attempts, or by the prompt."""
    for path in Path(str(krea.settings.storage), "earlier").rglob("*.parquet"):
        path.unlink()
    found = krea.earlier().set_index("prompt")
    present = krea.manifest().set_index("prompt")
    assert found["prompt_id"].to_dict() == {"a bear": "again", "a fox": "", "a wolf": ""}
    assert found.loc["a fox", "successor"] == present.loc["a fox", "request_key"]
    assert pd.isna(found.loc["a wolf", "successor"])


def test_a_copy_of_the_root_has_them_too(krea: Krea, tmp_path: Path) -> None:
    assert isinstance(krea.settings, Settings)
    shutil.copytree(krea.settings.storage, tmp_path / "copy")
    copy = Krea(krea.settings.model_copy(update={"storage": str(tmp_path / "copy")}))
    for _ in range(2):
        found = copy.earlier()
        assert sorted(found["prompt_id"]) == ["again", "changed", "removed"]
        assert all(path.startswith(str(tmp_path / "copy")) for path in found["image_path"])
        assert copy.run().report.progress.delivered == 0  # it enters the copy as a root


@pytest.mark.parametrize("earlier", [False, True])
def test_gallery_and_export_have_them_on_request(
    krea: Krea, tmp_path: Path, *, earlier: bool
) -> None:
    shown = krea.gallery(tmp_path / "page.html", GalleryFilter(earlier=earlier))
    assert shown.shown == (6 if earlier else 3)
    assert ("Earlier images" in (tmp_path / "page.html").read_text()) == earlier
    for everything in (True, False):
        spec = ExportSpec(form="jsonl", everything=everything, earlier=earlier)
        done = krea.export(spec, str(tmp_path / f"export-{everything}"))
        assert done.summary()["images"] == (6 if earlier else 3)
    rows = exported_rows(Path(done.path))
    assert rows.count("changed") == (2 if earlier else 1)


def exported_rows(version: Path) -> list[str]:
    lines = [line for one in version.rglob("*.jsonl") for line in one.read_text().splitlines()]
    return [json.loads(line)["prompt_id"] for line in lines]


def test_an_earlier_image_that_was_rejected_is_exported_only_with_all(
    krea: Krea, tmp_path: Path
) -> None:
    image = krea.earlier().set_index("prompt_id").loc["removed"]
    with krea.open_journal() as journal:
        named = (image.request_key, "removed", 0, 0, image.partition_key)
        journal.verdicts.add([Verdict("id", image.image_sha256, "reject", "ann", *named)])
    for everything, count in ((True, 6), (False, 5)):
        spec = ExportSpec(form="jsonl", everything=everything, earlier=True)
        done = krea.export(spec, str(tmp_path / f"export-{everything}"))
        assert done.summary()["images"] == count


def test_the_review_shows_them_beside_their_successors(krea: Krea) -> None:
    with krea.open_journal() as journal:
        index = build_index(krea.open_storage(), journal)
    rows = index.table.to_pylist()
    changed = [at for at, row in enumerate(rows) if row["prompt_id"] == "changed"]
    for at in changed:
        assert sorted(index.of_prompt(at)) == changed
    assert [rows[at]["size"] for at in index.of_prompt(changed[0])] == ["1:2", "1:1"]
    assert sum(row["earlier"] for row in rows) == 3
    assert index.to_review.sum() == 3

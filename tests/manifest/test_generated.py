"""What ``generate`` buys is in each view, also where no asset exists, as in a notebook."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from krea_dagster import ExportSpec, Krea, Settings
from krea_dagster.curation.gallery.filter import GalleryFilter
from krea_dagster.curation.review.index import build_index
from tests.dagster_bench import SettingsOf, write_table


@pytest.fixture
def krea(tmp_path: Path, settings_of: SettingsOf) -> Krea:
    settings = settings_of("hash:8", prompts=str(tmp_path / "none.parquet"))
    return Krea(settings)


def prompts(krea: Krea) -> list[str]:
    return sorted(krea.manifest()["prompt"])


def credits_spent(krea: Krea) -> tuple[int, float]:
    """Return the purchases and their credits."""
    (row,) = krea.spend_sql(
        "SELECT count(*) AS purchases, sum(credits_charged) AS credits FROM ledger"
    ).to_pylist()
    return row["purchases"], round(float(row["credits"]), 6)


def test_each_view_has_what_was_generated(krea: Krea, tmp_path: Path) -> None:
    krea.generate(["a reef", "a wave"])
    krea.generate([{"prompt": "a dune", "mood": "calm"}], name="desert")
    assert prompts(krea) == ["a dune", "a reef", "a wave"]
    assert sorted({*krea.manifest()["partition_key"]}) == ["generate:desert", "generate:generate"]
    assert len(pd.read_parquet(tmp_path / "krea" / "manifest")) == 3
    assert krea.gallery(tmp_path / "page.html", GalleryFilter()).shown == 3
    for everything in (True, False):
        spec = ExportSpec(form="jsonl", everything=everything)
        assert krea.export(spec, str(tmp_path / f"{everything}")).summary()["images"] == 3
    with krea.open_journal() as journal:
        index = build_index(krea.open_storage(), journal)
    assert (len(index), index.to_review.sum()) == (3, 3)
    proof = krea.verify()
    assert (proof.adds_up, proof.figures.rows, proof.figures.rows_agreeing) == (True, 3, 3)
    assert credits_spent(krea) == (3, 1.35)


def test_a_later_call_adds_to_the_manifest_of_its_name(krea: Krea) -> None:
    krea.generate(["a reef"])
    krea.generate(["a wave"])
    again = krea.generate(["a wave"])
    assert again["reused"].to_pylist() == [True]
    assert prompts(krea) == ["a reef", "a wave"]


def test_a_changed_row_replaces_the_earlier_one_which_stays_in_sight(krea: Krea) -> None:
    krea.generate([{"prompt_id": "hero", "prompt": "a reef", "size": "1:2"}])
    krea.generate([{"prompt_id": "hero", "prompt": "a reef", "size": "1:1"}])
    assert krea.manifest()["size"].tolist() == ["1:1"]
    earlier = krea.earlier()
    assert earlier[["prompt_id", "size"]].to_numpy().tolist() == [["hero", "1:2"]]
    assert earlier["successor"].tolist() == krea.manifest()["request_key"].tolist()
    assert krea.prune(replaced=True, dry_run=False).counts == {"replaced": 1}
    assert krea.verify().adds_up


def test_a_table_and_a_call_leave_each_others_manifests_alone(krea: Krea, tmp_path: Path) -> None:
    krea.generate(["a reef"])
    write_table(tmp_path / "none.parquet", {"prompt": ["a reef", "a kite"]})
    krea.run()
    krea.run()
    krea.generate(["a wave"])
    partitions = krea.manifest().groupby("prompt")["partition_key"].nunique().to_dict()
    assert partitions == {"a reef": 2, "a kite": 1, "a wave": 1}
    assert credits_spent(krea) == (3, 1.35)
    assert krea.verify().adds_up


def test_in_a_moved_root_a_run_writes_the_present_paths(krea: Krea, tmp_path: Path) -> None:
    krea.generate(["a reef"])
    write_table(tmp_path / "none.parquet", {"prompt": ["a kite"]})
    (tmp_path / "krea").rename(tmp_path / "moved")
    assert isinstance(krea.settings, Settings)
    there = Krea(krea.settings.model_copy(update={"storage": str(tmp_path / "moved")}))
    there.run()
    paths = pd.read_parquet(tmp_path / "moved" / "manifest")["image_path"]
    assert [Path(path).is_file() for path in paths] == [True, True]

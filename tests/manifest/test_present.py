"""Views read the present partitions only: another way to cut a table, and rows that left it."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from krea_dagster import Curation, ExportSpec, Krea, PromptTable
from krea_dagster.application.buy_options import BuyOptions
from krea_dagster.application.present_partitions import origin_of
from krea_dagster.curation.gallery.filter import GalleryFilter
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import retire_manifests
from krea_dagster.prompts import parse_partition_by
from krea_dagster.spend.proof.findings import FindingKind
from tests.dagster_bench import SettingsOf, write_table

ROWS = {
    "prompt_id": ["p1", "p2", "p3"],
    "prompt": ["a pine", "a palm", "a plum"],
    "campaign": ["x", "x", "y"],
    "size": ["1:2"] * 3,
}


@pytest.fixture
def krea(settings_of: SettingsOf) -> Krea:
    settings = settings_of("column:campaign")
    write_table(Path(settings.prompts), ROWS)
    return Krea(settings)


def cut(krea: Krea, by: str) -> PromptTable:
    return replace(krea.table(), partition_by=parse_partition_by(by))


def without_campaign_y(krea: Krea) -> PromptTable:
    rows = {name: values[:2] for name, values in ROWS.items()}
    write_table(Path(str(krea.table().source)), rows)
    return krea.table()


def in_each_view(krea: Krea, tmp_path: Path) -> dict[str, Any]:
    """Return what each view has: prompt_ids, or the rows that share an image."""
    everything = krea.export(ExportSpec(form="jsonl", everything=True), str(tmp_path / "all"))
    curated = krea.curate(Curation())
    accepted = krea.export(ExportSpec(form="jsonl"), str(tmp_path / "accepted"), fresh=True)
    gallery = krea.gallery(tmp_path / "gallery.html", GalleryFilter())
    by_campaign = krea.spend(["campaign"]).lines
    return {
        "Krea.manifest": sorted(krea.manifest()["prompt_id"]),
        "pandas": sorted(pd.read_parquet(tmp_path / "krea" / "manifest")["prompt_id"]),
        "gallery": gallery.shown,
        "export of all": everything.summary()["images"],
        "accepted": sum(one.accepted for one in curated.accepted),
        "export": accepted.summary()["images"],
        "by campaign": {line.of[0]: line.purchases for line in by_campaign},
        "verify": (krea.verify().adds_up, krea.verify().figures.rows),
    }


@pytest.mark.parametrize("by", ["hash:2", "hash:3", "column:size"])
def test_a_table_that_is_cut_in_another_way_is_counted_once_in_each_view(
    krea: Krea, tmp_path: Path, by: str
) -> None:
    krea.run()
    before = in_each_view(krea, tmp_path)
    krea.run(cut(krea, by))
    assert in_each_view(krea, tmp_path) == before
    saved = krea.spend_sql("SELECT sum(reused) AS n, sum(credits_saved_by_reuse) AS c FROM daily")
    assert saved.to_pylist() == [{"n": 0, "c": 0}]
    asked = (
        "SELECT campaign, count(*) AS n FROM ledger LEFT JOIN manifest USING (prompt_id, sample)"
    )
    found = krea.spend_sql(f"{asked} GROUP BY campaign ORDER BY campaign").to_pylist()
    assert found == [{"campaign": "x", "n": 2}, {"campaign": "y", "n": 1}]


def test_a_partition_whose_rows_all_left_the_table_is_in_no_view(
    krea: Krea, tmp_path: Path
) -> None:
    krea.run()
    krea.curate()
    krea.run(without_campaign_y(krea))
    found = in_each_view(krea, tmp_path)
    assert found["Krea.manifest"] == found["pandas"] == ["p1", "p2"]
    assert found["gallery"] == found["export of all"] == found["export"] == found["accepted"] == 2
    assert found["verify"] == (True, 2)
    notes = [one for one in krea.verify().findings if one.kind is FindingKind.NOT_ASKED_ANY_MORE]
    texts = [one.text for one in notes]
    assert len(texts) == 1
    assert texts == ["p3 (y): 0.45 credits paid, and no row requests it any more"]


def test_an_image_whose_row_requests_another_one_is_said_to_be_so(krea: Krea) -> None:
    krea.run()
    krea.run(options=BuyOptions(regenerate=["p3"]))
    (note,) = krea.verify().findings
    assert note.kind is FindingKind.NOT_ASKED_ANY_MORE
    assert note.text == "p3 (y): 0.45 credits paid, and its row requests another one now"


def test_a_row_that_left_its_partition_is_no_longer_among_the_accepted_images(
    krea: Krea, tmp_path: Path
) -> None:
    """Also before images are accepted again, and if no row of the partition is left."""
    table = cut(krea, "hash:3")
    krea.run(table)
    krea.curate()
    krea.run(replace(without_campaign_y(krea), partition_by=table.partition_by))
    done = krea.export(ExportSpec(form="jsonl"), str(tmp_path / "accepted"))
    assert done.summary()["images"] == 2


def test_a_run_of_one_partition_leaves_out_what_was_cut_in_another_way(krea: Krea) -> None:
    """The rest is shown again once its partitions are made: no row is ever in two of them."""
    krea.run(cut(krea, "hash:3"))
    table = cut(krea, "hash:2")
    with krea.plan(table) as plan:
        first, second = plan.keys
        ids = [image.prompt_id for image in plan.named(ROWS["prompt_id"])]
    krea.run(table, [first])
    assert set(krea.manifest()["partition_key"]) <= {first}
    krea.run(table, [second])
    assert sorted(krea.manifest()["prompt_id"]) == sorted(ids) == ["p1", "p2", "p3"]


def test_a_partition_that_comes_back_is_shown_again(krea: Krea) -> None:
    krea.run()
    krea.run(without_campaign_y(krea))
    write_table(Path(str(krea.table().source)), ROWS)
    assert krea.run().report.progress.delivered == 0
    assert sorted(krea.manifest()["prompt_id"]) == ["p1", "p2", "p3"]
    assert krea.verify().adds_up


def test_tables_that_share_a_root_leave_each_others_partitions_alone(
    krea: Krea, tmp_path: Path
) -> None:
    krea.run()
    other = {"prompt_id": ["q1"], "prompt": ["a quince"], "campaign": ["z"], "size": ["1:2"]}
    source = write_table(tmp_path / "other.parquet", other)
    krea.run(replace(krea.table(), source=source))
    assert sorted(krea.manifest()["prompt_id"]) == ["p1", "p2", "p3", "q1"]
    krea.run(without_campaign_y(krea))
    assert sorted(krea.manifest()["prompt_id"]) == ["p1", "p2", "q1"]


@pytest.mark.parametrize("trouble", ["removed", "damaged", "empty"])
def test_a_table_that_cannot_be_read_or_is_empty_leaves_out_nothing(
    krea: Krea, trouble: str
) -> None:
    krea.run()
    source = Path(str(krea.table().source))
    if trouble == "removed":
        source.unlink()
    elif trouble == "damaged":
        source.write_bytes(source.read_bytes()[:200])
    else:
        write_table(source, {name: values[:0] for name, values in ROWS.items()})
    if trouble == "empty":
        krea.run()
    else:
        with pytest.raises(ConfigError):
            krea.run()
    assert sorted(krea.manifest()["prompt_id"]) == ["p1", "p2", "p3"]


def test_a_manifest_that_was_written_since_the_table_was_read_stays(
    krea: Krea,
) -> None:
    """It may be of a partition that the table has gained meanwhile."""
    old = without_campaign_y(krea)
    keys = old.partition_keys()
    write_table(Path(str(old.source)), ROWS)
    krea.run()
    newest = Path(str(krea.settings.storage), "manifest", "y.parquet")
    then = newest.stat().st_mtime
    read_at = datetime.fromtimestamp(then, timezone.utc)
    storage, origin = krea.open_storage(), origin_of(krea, old)
    names = ["manifest/x.parquet", "manifest/y.parquet"]
    for moment, gone in ((read_at - timedelta(seconds=1), []), (read_at, ["manifest/y.parquet"])):
        assert retire_manifests(storage, (), origin, keys, names=names, read_at=moment) == gone

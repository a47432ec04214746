"""The index of a review: the joined tables, and the verdicts on their images."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from krea_dagster.application.runner import open_runner
from krea_dagster.curation.measures.cache import MeasureCache
from krea_dagster.curation.review.index import ReviewIndex, build_index, files_version
from krea_dagster.curation.review.measured_rows import words_on_similar
from krea_dagster.curation.review.verdict_cache import VerdictView
from krea_dagster.curation.similarity.near_duplicates import update_near_duplicates
from krea_dagster.emulator import Emulator
from krea_dagster.engine.journal.journal import Journal
from krea_dagster.engine.journal.verdict_log import VERDICTS, Verdict
from krea_dagster.engine.run.requested_image import RequestedImage
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError
from krea_dagster.manifest import read_manifests, write_manifest
from tests.curation.review.review_harness import (
    PARTITIONS,
    SAMPLES,
    ReviewProject,
    make_project,
    sha256,
)
from tests.prompts.reference import images_of
from tests.spend.project_harness import LEARNED, ProjectHarness

ROWS = 844  # four of them without an image


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> ReviewProject:
    return make_project(tmp_path_factory.mktemp("index") / "krea", rows=ROWS, subjects=1)


def read(project: ReviewProject) -> ReviewIndex:
    with closing(Journal(project.journal_url)) as journal:
        return build_index(Storage(str(project.folder)), journal)


def test_every_row_of_every_manifest_is_joined_with_the_other_tables(
    project: ReviewProject,
) -> None:
    index = read(project)
    assert len(index) == ROWS
    assert len(index.partitions) == 8
    assert index.to_review.sum() == ROWS - 4
    row = index.table["image_sha256"].to_pylist().index(sha256(97))
    whole = index.whole_row(row)
    assert whole["sharpness"] > 0
    assert whole["width"] == 1024, "the manifest's own column is not overwritten"
    assert (whole["cluster"], whole["duplicate"], whole["duplicate_to_keep"]) == (
        sha256(97), "near", True,
    )  # fmt: skip
    assert whole["campaign"] == "campaign 3"
    similar = [index.whole_row(one)["image_sha256"] for one in index.of_cluster(row)]
    assert sorted(similar) == sorted([sha256(97), sha256(98)])
    assert [index.whole_row(one)["sample"] for one in index.of_prompt(row)] == list(range(SAMPLES))


def test_what_was_accepted_is_marked(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    accepted = pa.table({"image_sha256": [sha256(3)]})
    storage = Storage(str(project.folder))
    storage.write("accepted/bucket-000.parquet", lambda file: pq.write_table(accepted, file))
    index = read(project)
    chosen = index.table.filter(index.table["accepted"])
    assert chosen["image_sha256"].to_pylist() == [sha256(3)]
    assert index.of_cluster(0) == [0], "nothing is known of likeness"


def test_prompt_columns_with_a_name_of_the_index_are_renamed(
    tmp_path: Path,
) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1)
    storage = Storage(str(project.folder))
    for at in range(PARTITIONS):
        table = read_manifests(storage, [f"bucket-{at:03d}"])
        for name in ("earlier", "accepted"):
            table = table.append_column(name, pa.array(["said"] * len(table)))
        table = table.append_column("half", pa.array(np.ones(len(table), np.float16)))
        # A column that is whole in one partition and text in the others.
        kind = pa.int64() if at == 0 else pa.string()
        table = table.append_column("mixed", pa.array(["7"] * len(table)).cast(kind))
        write_manifest(storage, f"bucket-{at:03d}", table)
    accepted = pa.table({"image_sha256": [sha256(3)]})
    storage.write("accepted/bucket-000.parquet", lambda file: pq.write_table(accepted, file))
    index = read(project)
    said = {one["name"]: one for one in index.columns()}
    assert (said["accepted"]["kind"], said["accepted (table)"]["kind"]) == ("truth", "text")
    assert index.table["earlier (table)"].to_pylist() == ["said"] * 16
    assert set(index.table["mixed"].to_pylist()) == {"7"}
    assert said["half"]["range"] == [1.0, 1.0]


def test_of_a_file_that_was_bought_twice_one_purchase_is_to_be_kept(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    keys = read(project).table["request_key"].to_pylist()[:2]
    similar = pa.table(
        {
            "image_sha256": [sha256(0)] * 2,
            "request_key": keys,
            "cluster": [sha256(0)] * 2,
            "kind": ["exact"] * 2,
            "keep": [True, False],
        }
    )
    storage = Storage(str(project.folder))
    storage.write("near_duplicates/clusters.parquet", lambda file: pq.write_table(similar, file))
    index = read(project)
    kept = index.table["duplicate_to_keep"].to_pylist()
    assert kept == [True, False, *[None] * 14]
    assert index.of_cluster(1) == [0, 1]


def test_columns_have_their_operators_and_values(project: ReviewProject) -> None:
    columns = {one["name"]: one for one in read(project).columns()}
    assert columns["status"]["values"] == [("failed", 4), ("stored", ROWS - 4)]
    assert columns["sharpness"]["kind"] == "number"
    low, high = columns["sharpness"]["range"]
    assert 0 < low < high
    assert "values" not in columns["prompt_id"]
    assert columns["stored_at"]["kind"] == "time"
    assert columns["earlier"]["kind"] == "truth"


def test_an_image_s_path_comes_from_the_index(project: ReviewProject) -> None:
    index = read(project)
    found = index.file_of(sha256(1))
    assert found is not None
    assert found[0] == str(project.folder / "images/00/000-1.png")
    assert found[1] == "PNG"
    assert index.file_of("0" * 64) is None


def test_the_files_version_changes_only_with_the_files(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    storage = Storage(str(project.folder))
    before = read(project).generation
    assert files_version(storage) == before == read(project).generation
    (project.folder / "manifest" / "bucket-000.parquet").unlink()
    assert files_version(storage) != before
    assert len(read(project)) < 16


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    (project.folder / "manifest" / "bucket-003.parquet").write_bytes(b"no parquet")
    with pytest.raises(ConfigError, match=r"manifest/bucket-003\.parquet cannot be read"):
        read(project)


def test_an_empty_root_has_an_empty_index(tmp_path: Path) -> None:
    with closing(Journal(f"sqlite:///{tmp_path / 'journal.db'}")) as journal:
        index = build_index(Storage(str(tmp_path)), journal)
        assert len(index) == 0
        assert VerdictView(journal.verdicts).progress(index) == []


def test_images_of_earlier_attempts_have_rows(
    tmp_path: Path, emulator: Emulator, open_account: Callable[..., str]
) -> None:
    shop = ProjectHarness(tmp_path, emulator, open_account()).with_rows(
        "first", "second", campaign="spring"
    )
    shop.buy()
    krea = shop.krea
    krea.raise_attempts(shop.table, [("first", 0)], raised_by="a person")
    with krea.open_journal() as journal:
        planned = images_of(shop.table, krea.attempts(shop.table))
        wanted = [RequestedImage(one.request, one.partition_key) for one in planned]
        policy = replace(krea.policy([]), wait_scale=0.01)
        with open_runner(krea, "run-2", lambda _: None, shop.table) as runner:
            asyncio.run(replace(runner, policy=policy, latencies=LEARNED).run(wanted))
        shop.write_manifests("run-2")
        index = build_index(krea.open_storage(), journal)
        earlier = index.table.filter(index.table["earlier"]).to_pylist()
        assert len(index) == 3
        assert [(one["prompt_id"], one["attempt"]) for one in earlier] == [("first", 0)]
        assert earlier[0]["status"] == "stored"
        assert earlier[0]["campaign"] == "spring"
        assert Path(earlier[0]["image_path"]).is_file()
        row = index.table["prompt_id"].to_pylist().index("first")
        assert [index.whole_row(one)["attempt"] for one in index.of_prompt(row)] == [0, 1]
        assert index.to_review.sum() == 2


# -- verdicts ---------------------------------------------------------------------------------


def on(number: int, verdict: str) -> Verdict:
    return Verdict(uuid4().hex, sha256(number), verdict, "ada", "key", "prompt", 0, 0, "bucket")


def test_a_list_can_have_the_verdicts_of_an_earlier_number(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    with closing(Journal(project.journal_url)) as journal:
        log = journal.verdicts
        log.add([on(0, "keep"), on(1, "reject")])
        judged = VerdictView(log)
        index = build_index(Storage(str(project.folder)), journal)
        places = [index.table["image_sha256"].to_pylist().index(sha256(one)) for one in range(3)]

        def words(at_number: int | None = None) -> list[str]:
            return [VERDICTS[code] for code in judged.codes(index, at_number)[places]]

        assert words() == ["keep", "reject", "none"]
        log.add([on(0, "flag"), on(0, "none"), on(2, "keep"), on(9999, "keep")])
        assert words() == ["keep", "reject", "none"], "nothing moves before it is asked for"
        assert judged.catch_up() == 6
        assert words() == ["none", "reject", "keep"]
        assert words(3) == ["flag", "reject", "none"]
        assert words(2) == ["keep", "reject", "none"]
        assert words(0) == ["none", "none", "none"]
        assert words() == ["none", "reject", "keep"]
        assert words()[0] == "none"
        assert judged.last_of(sha256(0)) == log.history(image_sha256=sha256(0))[-1]
        assert [one.number for one in judged.since(4)] == [5, 6]
        sums = judged.progress(index)
        assert sum(one["images"] for one in sums) == 16
        assert sum(one["keep"] for one in sums) == sum(one["reject"] for one in sums) == 1
        other = build_index(Storage(str(project.folder)), journal)
        assert np.array_equal(judged.codes(other), judged.codes(index))


# -- measures and similar images before any table of them --------------------------------------


def measured(project: ReviewProject, hashes: dict[int, tuple[bytes, int]]) -> None:
    """Put measures into the cache, as a run does while it verifies images."""
    cache = MeasureCache.builtin(Storage(str(project.folder)))
    rows = [
        (bytes.fromhex(sha256(number)), bits, quality, 100.0 + number, 0.5, 0.2, 7.0, 0.1, 0.0)
        for number, (bits, quality) in hashes.items()
    ]
    columns = zip(*rows, strict=True)
    arrays = [pa.array(one, field.type) for one, field in zip(columns, cache.schema, strict=True)]
    cache.add(pa.Table.from_arrays(arrays, schema=cache.schema))


def test_a_review_has_measures_and_similar_images_from_the_first_run_on(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    one, near, other = b"\x00" * 32, b"\x0f" + b"\x00" * 31, b"\xff" * 32
    measured(project, {0: (one, 90), 5: (near, 90), 2: (other, 90), 3: (one, 20)})
    with closing(Journal(project.journal_url)) as journal:
        storage = Storage(str(project.folder))
        index = build_index(storage, journal)
        rows = {sha: at for at, sha in enumerate(index.table["image_sha256"].to_pylist())}
        similar = {number: index.of_cluster(rows[sha256(number)]) for number in range(6)}
        assert sorted(similar[0]) == sorted([rows[sha256(0)], rows[sha256(5)]])
        assert [len(similar[number]) for number in (1, 2, 3, 4)] == [1, 1, 1, 1]
        said = {
            number: words_on_similar(index.whole_row(rows[sha256(number)]), len(similar[number]))
            for number in range(4)
        }
        assert said == {
            0: "Images that are nearly the same (colour is not compared)",
            1: "Not compared yet: this image was not measured. Run krea-dagster curate.",
            2: "No image is nearly the same as this one (colour is not compared).",
            3: "Not compared: this image has too little structure.",
        }
        columns = {one["name"]: one for one in index.columns()}
        assert columns["sharpness"]["range"] == [100.0, 105.0]
        assert "perceptual_hash" not in columns
        assert files_version(storage) == index.generation, "the cache is no new row"


def test_a_table_of_duplicates_counts_until_new_images_come(tmp_path: Path) -> None:
    project = make_project(tmp_path / "krea", rows=16, subjects=1, measured=False)
    measured(project, dict.fromkeys(range(3), (b"\x00" * 32, 90)))
    storage = Storage(str(project.folder))
    with closing(Journal(project.journal_url)) as journal:
        update_near_duplicates(storage)  # without measures in tables: no similar images
        assert "cluster" not in non_empty(build_index(storage, journal))
        for file in (project.folder / "manifest").iterdir():
            later = file.stat().st_mtime_ns + 10**10
            os.utime(file, ns=(later, later))
        assert "cluster" in non_empty(build_index(storage, journal))


def non_empty(index: ReviewIndex) -> set[str]:
    """The columns that have a value in some row."""
    return {name for name in index.table.column_names if index.table[name].null_count < len(index)}

"""Exports end to end: selection, content, versions, and faults."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any, get_args

import fsspec
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea_dagster.curation.accepted.accepted_table import accepted_name
from krea_dagster.curation.export.export import Exported, export
from krea_dagster.curation.export.image_content import ImagesNotAsStored
from krea_dagster.curation.export.spec import ExportSpec, Form
from krea_dagster.curation.export.table_batches import verdict_columns
from krea_dagster.curation.export.target import ExportTarget
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.verdict import Verdict
from krea_dagster.errors import ConfigError, StorageError
from tests.curation.export.export_project import ExportProject, drawn

FORMS: tuple[Form, ...] = get_args(Form)
ROOT = Path(__file__).parents[3]
HALVES = ["train=0.5", "test=0.5"]


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    return ExportProject(str(tmp_path / "krea"))


@pytest.fixture
def to(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def done(
    project: ExportProject, to: str, *, splits: list[str] | None = None, **fields: Any
) -> Exported:
    fields.setdefault("mark", False)  # the files as they were received, unless a test says so
    how = {name: fields.pop(name) for name in ("fresh", "keep", "threads") if name in fields}
    return export(project.storage, ExportSpec.parse(splits=splits or [], **fields), to, **how)


def index_of(exported: Exported) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path(exported.path) / "index.parquet").to_pylist()
    return rows


def images_in(exported: Exported) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Return each image's bytes and columns by prompt_id, read without the package."""
    read = {"parquet": from_parquet, "webdataset": from_tar}.get(exported.spec.form, from_files)
    return {row["prompt_id"]: (data, row) for data, row in read(Path(exported.path))}


def from_parquet(root: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for path in root.glob("data/*.parquet"):
        for row in pq.read_table(path).to_pylist():
            yield row.pop("image")["bytes"], row


def from_tar(root: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for path in root.glob("data/*.tar"):
        with tarfile.open(path) as tar:
            files = [(one.name, content(tar, one)) for one in tar]
        for (image, data), (text, prompt), (line, row) in zip(
            files[::3], files[1::3], files[2::3], strict=True
        ):
            key = image.partition(".")[0]
            assert (text, line) == (f"{key}.txt", f"{key}.json")
            columns = json.loads(row)
            assert prompt.decode() == columns["prompt"]
            yield data, columns


def from_files(root: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    for path in [*root.glob("*.csv"), *root.glob("*.jsonl"), *root.glob("*/metadata.parquet")]:
        for row in table_rows(path):
            yield (path.parent / row["file_name"]).read_bytes(), row


def table_rows(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
        return rows
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file))


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    return file.read()


# -- what goes in and comes out ---------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_every_accepted_image_byte_for_byte_with_its_row(
    project: ExportProject, to: str, form: Form
) -> None:
    rows = project.rows(25)
    project.write_accepted(rows)
    exported = done(project, to, form=form, splits=HALVES, shard_images=6)
    found = images_in(exported)
    assert set(found) == {row["prompt_id"] for row in rows}
    for row in rows:
        data, columns = found[row["prompt_id"]]
        assert hashlib.sha256(data).hexdigest() == row["image_sha256"]
        for name in ("prompt", "request_key", "category", "task_id", "image_sha256", "reviewer"):
            assert columns[name] == row[name]
        assert str(columns["seed"]) == str(row["seed"])
        assert not {"image_path", "reused", "status"} & set(columns)
    assert exported.facts.images == 25
    assert exported.facts.credits == pytest.approx(25 * 0.9)
    assert (Path(to) / "LATEST").read_text() == f"{exported.version}\n"
    assert (Path(to) / "latest").resolve() == Path(exported.path)


@pytest.mark.parametrize("form", FORMS)
def test_equal_rows_give_equal_bytes_in_any_order(
    project: ExportProject, tmp_path: Path, form: Form
) -> None:
    rows = project.rows(30)
    project.write_accepted(rows)
    one = done(project, str(tmp_path / "one"), form=form, shard_images=7)
    project.write_accepted(rows[::-1])
    two = done(project, str(tmp_path / "two"), form=form, shard_images=7, threads=1)
    assert one.version == two.version
    assert contents(Path(one.path)) == contents(Path(two.path))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_filters_partitions_and_all_stored_images(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(6), "a")
    project.write_accepted(project.rows(4, 6), "b/1")
    unfinished = {**project.row(40), "status": "failed", "image_sha256": None, "image_path": None}
    project.write_listed([*project.rows(12, 20), unfinished], "a")
    assert done(project, to).facts.images == 10
    assert done(project, to, partitions=("b/1",)).facts.images == 4
    assert done(project, to, everything=True).facts.images == 12
    some = done(project, to, where=["category=sea", "seed=2", "seed=4", "seed=5"])
    assert {row["prompt_id"] for row in index_of(some)} == {"row-0001", "row-0003"}
    named = done(project, to, columns=("prompt", "seed"))
    assert list(named.schema.names) == ["prompt", "seed"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"where": ["nope=1"]}, "no column 'nope'"),
        ({"where": ["seed=red"]}, "'seed' has the type int32"),
        ({"where": ["category=none"]}, "left out 6"),
        ({"where": ["category"]}, "not COLUMN=VALUE"),
        ({"partitions": ("z",)}, "'z' has no table"),
        ({"columns": ("nope",)}, "no column 'nope'"),
        ({"everything": True}, "Materialize image_manifest first"),
        ({"license": "my own, see below"}, "not an identifier"),
        ({"form": "zip"}, "unknown form 'zip'"),
        ({"sidecars": True}, "sidecars need image files"),
    ],
    ids=str,
)
def test_an_invalid_export_is_rejected_with_the_reason(
    project: ExportProject, to: str, fields: dict[str, Any], said: str
) -> None:
    project.write_accepted(project.rows(6))
    with pytest.raises(ConfigError, match=said):
        done(project, to, **fields)
    assert not Path(to).exists()


def test_a_column_of_two_types_is_an_error(project: ExportProject, to: str) -> None:
    for key, value in (("a", 7), ("b", "seven")):
        project.write_accepted(project.rows(1), key)
        name = accepted_name(key)
        table = pq.read_table(project.storage.locate(name)).append_column("mixed", [[value]])
        project.storage.write(name, partial(pq.write_table, table))
    with pytest.raises(ConfigError, match="mixed"):
        done(project, to)


def test_a_reserved_column_is_rejected(project: ExportProject, to: str) -> None:
    rows = project.rows(2)
    project.write_accepted(rows)
    name = accepted_name("a")
    table = pq.read_table(project.storage.locate(name))
    project.storage.write(
        name, lambda file: pq.write_table(table.append_column("image", table["category"]), file)
    )
    with pytest.raises(ConfigError, match="under another name"):
        done(project, to)


# -- splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "webdataset", "imagefolder"])
def test_growth_moves_no_image_and_writes_only_what_has_changed(
    project: ExportProject, to: str, form: Form
) -> None:
    project.write_accepted(project.rows(100))
    first = done(project, to, form=form, splits=HALVES, shard_images=10)
    project.write_accepted(project.rows(110))
    second = done(project, to, form=form, splits=HALVES, shard_images=10)
    before = {row["key"]: (row["split"], row["shard"], row["file"]) for row in index_of(first)}
    after = {row["key"]: (row["split"], row["shard"], row["file"]) for row in index_of(second)}
    assert {key: after[key] for key in before} == before
    assert len(after) == 110
    assert (first.written, second.found) == (first.shards, 0)
    # Of each split the last shard, and one more.
    assert second.written <= 4
    assert second.linked == second.shards - second.written
    assert len(images_in(second)) == 110
    assert len(images_in(first)) == 100, "the version before stays as it was"


def test_images_that_are_no_longer_accepted_leave_and_numbers_have_no_gap(
    project: ExportProject, to: str
) -> None:
    project.write_accepted(project.rows(40))
    first = done(project, to, form="webdataset", shard_images=10)
    gone = {row["prompt_id"] for row in index_of(first) if row["shard"] == 1}
    project.write_accepted([row for row in project.rows(40) if row["prompt_id"] not in gone])
    second = done(project, to, form="webdataset", shard_images=10)
    assert set(images_in(second)) == {f"row-{n:04d}" for n in range(40)} - gone
    names = sorted(path.name for path in Path(second.path).glob("data/*"))
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]


def test_similar_images_are_in_the_last_split_only(project: ExportProject, to: str) -> None:
    rows = project.rows(40)
    project.write_accepted(rows)
    split_of = {
        row["prompt_id"]: row["split"] for row in index_of(done(project, to, splits=HALVES))
    }
    train = [row for row in rows if split_of[row["prompt_id"]] == "train"]
    test = [row for row in rows if split_of[row["prompt_id"]] == "test"]
    project.write_near_duplicates(
        [train[0], test[0]], [train[1], train[2]], [test[1], train[3], train[4]]
    )
    exported = done(project, to, splits=HALVES)
    left = {one["prompt_id"] for one in (train[0], train[3], train[4])}
    assert {row["prompt_id"] for row in index_of(exported)} == set(split_of) - left
    assert exported.summary()["splits"]["train"]["left_out_as_alike"] == 3
    assert "3 images of the others are left out" in (Path(exported.path) / "README.md").read_text()
    assert done(project, to, splits=HALVES, leaks=True).facts.images == 40


def test_equal_files_never_leak_even_without_near_duplicates(
    project: ExportProject, to: str
) -> None:
    rows = [project.row(n, image=n % 2 * 4) for n in range(0, 40, 4)]
    project.write_accepted(rows)
    found = index_of(done(project, to, splits=HALVES))
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(row["image_sha256"], set()).add(row["split"])
    assert all(len(of) == 1 for of in splits.values())
    assert len(found) < len(rows)


# -- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_missing_and_changed_files_are_all_named_and_nothing_is_published(
    project: ExportProject, to: str, form: Form
) -> None:
    rows = project.rows(40)
    project.write_accepted(rows)
    first = done(project, to, form=form, shard_images=10)
    more = [*rows, *project.rows(20, 40)]
    project.write_accepted(more)
    Path(more[45]["image_path"]).unlink()
    Path(more[50]["image_path"]).write_bytes(drawn(999))
    with pytest.raises(ImagesNotAsStored) as caught:
        done(project, to, form=form, shard_images=10)
    said = str(caught.value)
    assert "2 images differ from the manifest. Nothing was published" in said
    assert f"row-0045 sample 0: {more[45]['image_path']} is missing" in said
    assert f"instead of {more[50]['image_sha256']}" in said
    assert (Path(to) / "LATEST").read_text().strip() == first.version
    assert (Path(to) / "latest").resolve() == Path(first.path)
    complete = {path.resolve().parent.name for path in Path(to).glob("*/export.json")}
    assert complete == {first.version}

    project.rows(60)  # which puts the files back
    assert done(project, to, form=form, shard_images=10).facts.images == 60


@pytest.mark.parametrize("form", ["webdataset", "jsonl"])
def test_a_killed_export_resumes(project: ExportProject, to: str, form: Form) -> None:
    project.write_accepted(project.rows(60))
    command = [
        sys.executable,
        "-m",
        "tests.curation.export.export_worker",
        project.root,
        to,
        form,
        "4",
    ]
    ran = subprocess.run(command, cwd=ROOT, check=False, timeout=60, capture_output=True)
    assert ran.returncode == -9, ran.stderr
    assert not (Path(to) / "LATEST").exists()
    assert not list(Path(to).glob("*/export.json"))
    exported = done(project, to, form=form, shard_images=10, mark=True)
    assert exported.shards == 6
    assert exported.found >= 4
    assert not list(Path(exported.path).rglob(".*")), "the notes of finished shards are removed"
    assert len(images_in(exported)) == 60


@pytest.mark.parametrize("form", ["parquet", "webdataset", "imagefolder"])
def test_a_damaged_shard_is_written_again(project: ExportProject, to: str, form: Form) -> None:
    project.write_accepted(project.rows(30))
    first = done(project, to, form=form, shard_images=10)
    pattern = "train/00001/*.png" if form == "imagefolder" else "data/train-00001.*"
    victim = next(Path(first.path).glob(pattern))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 255
    victim.write_bytes(bytes(data))
    project.write_accepted(project.rows(31))
    second = done(project, to, form=form, shard_images=10)
    assert (second.linked, second.written) == (2, 2)
    for row in project.rows(31):
        assert (
            hashlib.sha256(images_in(second)[row["prompt_id"]][0]).hexdigest()
            == (row["image_sha256"])
        )


def test_a_target_that_cannot_be_written_is_an_error(
    project: ExportProject, tmp_path: Path
) -> None:
    project.write_accepted(project.rows(3))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="nothing was published"):
        done(project, str(tmp_path / "file" / "out"))


def test_without_changes_the_export_is_the_same_version_and_nothing_is_written(
    project: ExportProject, to: str
) -> None:
    project.write_accepted(project.rows(20))
    first = done(project, to, shard_images=5)
    (shard, *_) = Path(first.path).glob("data/*")
    written = shard.stat().st_mtime_ns
    second = done(project, to, shard_images=5)
    assert (second.version, second.found, second.written) == (first.version, 4, 0)
    assert shard.stat().st_mtime_ns == written


def test_a_version_without_its_index_or_files_is_rebuilt(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(20))
    first = done(project, to, form="webdataset", shard_images=5, embed_parameters=True)
    (Path(first.path) / "index.parquet").unlink()
    project.write_accepted(project.rows(21))
    second = done(project, to, form="webdataset", shard_images=5, embed_parameters=True)
    hashes = {row["prompt_id"]: row["exported_sha256"] for row in index_of(second)}
    for prompt_id, (data, _) in images_in(second).items():
        assert hashes[prompt_id] == hashlib.sha256(data).hexdigest()
    shutil.rmtree(second.path)
    assert done(project, to, form="webdataset", shard_images=5).facts.images == 21


def test_old_versions_are_removed_only_on_request(project: ExportProject, to: str) -> None:
    made = []
    for count in (5, 6, 7):
        project.write_accepted(project.rows(count))
        made.append(done(project, to).version)
    (Path(to) / "notes.txt").write_text("mine")
    assert all((Path(to) / version / "export.json").exists() for version in made)
    project.write_accepted(project.rows(8))
    last = done(project, to, keep=2)
    assert set(last.removed) == set(made[:2])
    assert {path.name for path in Path(to).iterdir() if path.is_dir() and path.name[0] != "."} == {
        made[2],
        last.version,
        "latest",
    }
    assert (Path(to) / "notes.txt").exists()


# -- elsewhere --------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Any]:
    """An object store, empty before and after."""
    fs = fsspec.filesystem("memory")
    fs.store.clear()
    yield fs
    fs.store.clear()


def test_a_moved_storage_root_can_be_exported(
    project: ExportProject, tmp_path: Path, to: str
) -> None:
    """Its manifests contain the old paths."""
    project.write_accepted(project.rows(3))
    Path(project.root).rename(tmp_path / "krea-moved")
    moved = export(Storage(str(tmp_path / "krea-moved")), ExportSpec.parse(form="jsonl"), to)
    assert len(images_in(moved)) == 3


def test_a_version_that_another_export_removed_is_not_published(
    project: ExportProject, to: str
) -> None:
    """The other export keeps few versions; this one is complete but not yet current."""
    rows = project.rows(3)
    project.write_accepted(rows)
    first = done(project, to, form="jsonl")
    project.write_accepted([*rows, *project.rows(1, 3)])
    second = done(project, to, form="jsonl")
    target = ExportTarget(to)
    target.publish(first.version)
    shutil.rmtree(Path(second.path))
    with pytest.raises(StorageError, match="removed by another export"):
        target.publish(second.version)
    assert target.latest() == first.version


@pytest.mark.parametrize("form", ["csv", "jsonl", "imagefolder"])
def test_line_ends_in_prompts_stay_in_their_row(
    project: ExportProject, to: str, form: Form
) -> None:
    ends = ["\r", "\n", "\r\n", "\u2028", "\x85", "\x0b", '"', ","]
    rows = [
        {**row, "prompt": f"one{end}two"} for row, end in zip(project.rows(8), ends, strict=True)
    ]
    project.write_accepted(rows)
    exported = done(project, to, form=form)
    assert {row["prompt"] for _, row in images_in(exported).values()} == {
        row["prompt"] for row in rows
    }
    if form == "csv":
        table = pa_csv.read_csv(
            Path(exported.path) / "train.csv",
            parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        )
        assert sorted(table["prompt"].to_pylist()) == sorted(row["prompt"] for row in rows)


@pytest.mark.parametrize("form", FORMS)
def test_an_object_store_gets_the_same_bytes_as_a_folder(
    project: ExportProject, to: str, memory: Any, form: Form
) -> None:
    project.write_accepted(project.rows(20))
    local = done(project, to, form=form, shard_images=5)
    remote = done(project, "memory://bucket/out", form=form, shard_images=5)
    assert remote.version == local.version
    root = f"/bucket/out/{local.version}"
    found = {name.removeprefix(f"{root}/"): memory.cat(name) for name in memory.find(root)}
    assert found == contents(Path(local.path))
    project.write_accepted(project.rows(23))
    second = done(project, "memory://bucket/out", form=form, shard_images=5)
    assert (second.linked, second.written) == (4, 1)
    assert memory.cat("/bucket/out/LATEST").decode().strip() == second.version


def test_images_in_an_object_store_are_exported_too(memory: Any, to: str) -> None:
    project = ExportProject("memory://bucket/krea")
    project.write_accepted(project.rows(12))
    assert len(images_in(done(project, to))) == 12


# -- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_embedded_parameters_keep_the_pixels_and_both_hashes(
    project: ExportProject, to: str, form: Form
) -> None:
    rows = project.rows(8)
    project.write_accepted(rows)
    exported = done(project, to, form=form, embed_parameters=True)
    by_id = {row["prompt_id"]: row for row in index_of(exported)}
    found = images_in(exported)
    for row in rows:
        data, columns = found[row["prompt_id"]]
        sha256 = hashlib.sha256(data).hexdigest()
        assert columns["exported_sha256"] == by_id[row["prompt_id"]]["exported_sha256"] == sha256
        assert columns["image_sha256"] == row["image_sha256"]
        with (
            Image.open(io.BytesIO(data)) as there,
            Image.open(row["image_path"]) as here,
        ):
            assert there.tobytes() == here.tobytes()
            if row["image_format"] != "PNG":
                assert sha256 == row["image_sha256"]
                continue
            told = json.loads(there.info["parameters"])
        assert (told["prompt"], told["seed"]) == (row["prompt"], row["seed"])
    # And a later version knows them again.
    project.write_accepted(project.rows(9))
    later = done(project, to, form=form, embed_parameters=True)
    assert {row["exported_sha256"] for row in index_of(later) if row["prompt_id"] in by_id} == {
        row["exported_sha256"] for row in by_id.values()
    }


def test_each_image_has_a_sidecar(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(5))
    exported = done(project, to, form="imagefolder", sidecars=True)
    for row in index_of(exported):
        sidecar = (Path(exported.path) / row["file"]).with_suffix(".json")
        assert json.loads(sidecar.read_text())["prompt_id"] == row["prompt_id"]


# -- the card ---------------------------------------------------------------------------------


def test_the_card_describes_the_images_their_origin_and_cost(
    project: ExportProject, to: str
) -> None:
    import yaml  # noqa: PLC0415 - comes with Dagster

    project.write_accepted(project.rows(12))
    exported = done(
        project,
        to,
        splits=["train=0.9", "test=0.1"],
        license="CC-BY-4.0",
        title='A "dataset": #1 | <b>',
        source="s3://ada:secret@bucket/prompts.parquet?token=secret",
        where=["quality=1K"],
    )
    text = (Path(exported.path) / "README.md").read_text()
    _, header, body = text.split("---\n", 2)
    told = yaml.safe_load(header)
    assert told["license"] == "cc-by-4.0"
    assert told["pretty_name"] == 'A "dataset": #1 | <b>'
    assert told["size_categories"] == ["n<1K"]
    assert told["configs"][0]["data_files"][0] == {
        "split": "train",
        "path": "data/train-*.parquet",
    }
    assert "secret" not in text
    for said in (
        "12 images of 12 prompts, all accepted",
        "s3://bucket/prompts.parquet",
        "Model: krea-2-turbo",
        "12 distinct ones, 1 to 12",
        "10.8 credits for the 12 purchases",
        "quality is 1K",
        "krea-dagster",
    ):
        assert said in body, said


def test_the_card_says_how_many_images_a_person_has_looked_at(
    project: ExportProject, to: str
) -> None:
    verdicts = ["keep", "keep", "flag", None, None, None]
    rows = [project.row(at, verdict=verdict) for at, verdict in enumerate(verdicts)]
    project.write_accepted(rows)
    exported = done(project, to, columns=("prompt",))
    text = (Path(exported.path) / "README.md").read_text()
    counts = "2 were kept by a person, 1 were flagged by a person, 3 were not seen by a person"
    assert (
        f"Of the images, {counts}. An image counts as accepted unless it was rejected or flagged."
        in text
    )


@pytest.mark.parametrize(
    ("origin", "said"),
    [
        ("an emulator", "**Synthetic test images**: they were drawn by an emulator"),
        ("api.evolink.ai", "Model: krea-2-turbo, through EvoLink's API (api.evolink.ai)"),
    ],
)
def test_the_card_says_whether_a_model_or_an_emulator_made_the_images(
    project: ExportProject, to: str, origin: str, said: str
) -> None:
    project.write_accepted(project.rows(2))
    exported = export(project.storage, ExportSpec(), to, origin=origin)
    text = (Path(exported.path) / "README.md").read_text()
    assert said in text
    assert ("which cost nothing" in text) == (origin == "an emulator")


def test_a_shared_purchase_counts_once_and_both_rows_are_exported(
    project: ExportProject, to: str
) -> None:
    first = project.row(1)
    project.write_accepted([first, {**first, "prompt_id": "twin"}])
    exported = done(project, to)
    assert (exported.facts.images, exported.facts.purchases) == (2, 1)
    assert exported.facts.credits == 0.9


def test_a_row_in_two_tables_is_exported_once(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(3), "a")
    project.write_accepted(project.rows(3), "b")
    exported = done(project, to, columns=("prompt",))
    assert (exported.facts.images, exported.repeated) == (3, 3)


# -- what is chosen, and how it is named ----------------------------------------------------------


def chosen(exported: Exported) -> set[str]:
    return {row["prompt_id"] for row in index_of(exported)}


def test_only_kept_images_or_named_rows_are_exported(project: ExportProject, to: str) -> None:
    verdicts = ["keep", None, "flag", "keep"]
    rows = [project.row(at, verdict=verdict) for at, verdict in enumerate(verdicts)]
    project.write_accepted(rows)
    assert chosen(done(project, to, kept=True)) == {"row-0000", "row-0003"}
    ids = frozenset({"row-0001", "row-0003", "no such row"})
    assert chosen(done(project, to, prompt_ids=ids)) == {"row-0001", "row-0003"}
    assert chosen(done(project, to, prompt_ids=ids, kept=True)) == {"row-0003"}


def test_measures_are_columns_and_filters(project: ExportProject, to: str) -> None:
    rows = project.rows(4)
    project.write_accepted(rows)
    project.write_accepted([project.row(9)], "b")  # not measured
    project.write_measures(rows[:3], sharpness=[10.0, 20.0, 30.0])
    exported = done(project, to, form="jsonl", where=["sharpness>=20"])
    assert chosen(exported) == {"row-0001", "row-0002"}
    found = images_in(done(project, to, form="jsonl"))
    sharpness = {name: row["sharpness"] for name, (_, row) in found.items()}
    assert sharpness == {
        "row-0000": 10.0,
        "row-0001": 20.0,
        "row-0002": 30.0,
        "row-0003": None,
        "row-0009": None,
    }


@pytest.mark.parametrize("form", FORMS)
def test_a_column_is_exported_under_another_name(
    project: ExportProject, to: str, form: Form
) -> None:
    rows = project.rows(3)
    project.write_accepted(rows)
    exported = done(project, to, form=form, columns=["prompt_id", "prompt=text", "seed"])
    read = {"parquet": from_parquet}.get(exported.spec.form, from_files)
    if form == "webdataset":
        lines = dict(tar_rows(Path(exported.path)))
    else:
        lines = {row["prompt_id"]: row for _, row in read(Path(exported.path))}
    assert {name: row["text"] for name, row in lines.items()} == {
        row["prompt_id"]: row["prompt"] for row in rows
    }
    assert all("prompt" not in row for row in lines.values())


def tar_rows(root: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    for path in root.glob("data/*.tar"):
        with tarfile.open(path) as tar:
            for one in tar:
                if one.name.endswith(".json"):
                    row = json.loads(content(tar, one))
                    yield row["prompt_id"], row


def test_two_columns_cannot_have_one_name(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(1))
    with pytest.raises(ConfigError, match="two columns would be exported as 'seed'"):
        done(project, to, columns=["prompt=seed", "seed"])


def test_captions_are_the_prompts_in_text_files_next_to_the_images(
    project: ExportProject, to: str
) -> None:
    project.write_accepted(project.rows(3))
    for count in (3, 4):  # the second time, the shard of the first is not linked but written again
        project.write_accepted(project.rows(count))
        exported = done(project, to, form="imagefolder", captions=True, columns=["prompt_id"])
        root = Path(exported.path)
        captions = {
            row["prompt_id"]: (root / row["file"]).with_suffix(".txt").read_text()
            for row in index_of(exported)
        }
        assert captions == {row["prompt_id"]: row["prompt"] for row in project.rows(count)}
    with pytest.raises(ConfigError, match="captions need image files"):
        ExportSpec(form="parquet", captions=True)


@pytest.mark.parametrize("form", FORMS)
def test_present_verdicts_are_columns_on_request(
    project: ExportProject, to: str, form: Form
) -> None:
    rows = project.rows(3)  # whose tables say that ada kept all of them
    project.write_accepted(rows)
    given = Verdict(
        "1",
        rows[1]["image_sha256"],
        "keep",
        "bea",
        **{name: rows[1][name] for name in ("request_key", "prompt_id", "sample", "attempt")},
        partition_key="a",
        reason="soft light",
        tags=("boat", "sea"),
        note="for the cover",
        at=datetime(2026, 11, 5, tzinfo=timezone.utc),
    )
    spec = ExportSpec(form=form, verdicts=True)
    exported = export(project.storage, spec, to, verdicts=verdict_columns([given]))
    found = {name: columns for name, (_, columns) in images_in(exported).items()}
    judged = found["row-0001"]
    assert (judged["verdict"], judged["reviewer"]) == ("keep", "bea")
    assert judged["verdict_reason"] == "soft light"
    assert judged["verdict_tags"] in (["boat", "sea"], '["boat", "sea"]')
    assert judged["verdict_note"] == "for the cover"
    assert str(judged["reviewed_at"]).startswith("2026-11-05")
    for name in ("row-0000", "row-0002"):
        assert not found[name]["verdict"]
        assert not found[name]["verdict_tags"]
    assert exported.facts.never_judged == 2


def test_partitions_without_accepted_images_are_named(project: ExportProject, to: str) -> None:
    project.write_accepted(project.rows(2), "a")
    for key, begin in (("a", 0), ("b", 2), ("c", 4)):
        project.write_listed(project.rows(2, begin), key)
    project.write_listed([], "no rows")
    exported = done(project, to)
    assert exported.summary()["partitions_left_out"] == ["b", "c"]
    card = (Path(exported.path) / "README.md").read_text()
    assert "Partitions without accepted images are not included: b, c." in card
    for fields in ({"everything": True}, {"partitions": ("a",)}):
        assert done(project, to, **fields).summary()["partitions_left_out"] == []


# -- what the datasets library is told ----------------------------------------------------------


def header(exported: Exported) -> dict[str, Any]:
    card = (Path(exported.path) / "README.md").read_text()
    lines = card.split("---\n")[1].splitlines()
    return {name: json.loads(value) for name, _, value in (line.partition(": ") for line in lines)}


@pytest.mark.parametrize("form", FORMS)
def test_each_version_has_a_config_of_its_own_so_that_no_cache_takes_it_for_another(
    project: ExportProject, to: str, form: Form
) -> None:
    """datasets finds what it has read by the name of the config, not by the files."""
    names = []
    for count in (4, 5, 5):
        project.write_accepted(project.rows(count))
        exported = done(project, to, form=form)
        (config,) = header(exported)["configs"]
        assert config["config_name"] == f"version-{exported.version}"
        names.append(config["config_name"])
    assert names[0] != names[1] == names[2]


def test_the_image_is_an_image_next_to_any_other_column(project: ExportProject, to: str) -> None:
    rows = project.rows(2)
    record = pa.array([{"lens": ["50"]}, None], pa.struct([("lens", pa.list_(pa.string()))]))
    pairs = pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int32()))
    project.write_accepted(rows, columns={"record": record, "pairs": pairs})
    exported = done(project, to, form="parquet")
    (path,) = Path(exported.path).glob("data/*.parquet")
    told = json.loads(pq.read_schema(path).metadata[b"huggingface"])["info"]["features"]
    assert told["image"] == {"_type": "Image"}
    text = {"dtype": "string", "_type": "Value"}
    assert told["record"] == {"lens": [text]}
    assert told["pairs"] == [{"key": text, "value": {"dtype": "int32", "_type": "Value"}}]


def test_the_types_of_columns_do_not_depend_on_the_rows_of_a_split(
    project: ExportProject, to: str
) -> None:
    rows = project.rows(6)
    project.write_accepted([{**row, "verdict": None, "reviewer": None} for row in rows])
    (config,) = header(done(project, to, form="jsonl"))["configs"]
    features = {one["name"]: one for one in config["features"]}
    assert features["verdict"]["dtype"] == features["reviewer"]["dtype"] == "string"
    (info,) = header(done(project, to, form="webdataset"))["dataset_info"]
    row = next(one for one in info["features"] if one["name"] == "json")
    assert {"name": "verdict", "dtype": "string"} in row["struct"]

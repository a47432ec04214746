"""Exports as a whole: what goes in, what comes out, what stays, and what a fault leaves behind."""

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
from functools import partial
from pathlib import Path
from typing import Any, get_args

import fsspec
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from PIL import Image

from krea_dagster.curation.accepted.accepted_table import accepted_name
from krea_dagster.curation.export.export import Exported, export
from krea_dagster.curation.export.image_content import (
    ImagesNotAsStored,
    with_parameters,
    without_parameters,
)
from krea_dagster.curation.export.spec import ExportSpec, Form
from krea_dagster.curation.export.target import ExportTarget
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import ConfigError, StorageError
from tests.curation.export.stored_images import Shelf, drawn

FORMS: tuple[Form, ...] = get_args(Form)
ROOT = Path(__file__).parents[3]
HALVES = ["train=0.5", "test=0.5"]


@pytest.fixture
def shelf(tmp_path: Path) -> Shelf:
    return Shelf(str(tmp_path / "krea"))


@pytest.fixture
def to(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def done(shelf: Shelf, to: str, *, splits: list[str] | None = None, **fields: Any) -> Exported:
    how = {name: fields.pop(name) for name in ("fresh", "keep", "threads") if name in fields}
    return export(shelf.storage, ExportSpec.parse(splits=splits or [], **fields), to, **how)


def index_of(exported: Exported) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(Path(exported.path) / "index.parquet").to_pylist()
    return rows


def images_in(exported: Exported) -> dict[str, tuple[bytes, dict[str, Any]]]:
    """Each image's bytes and columns by prompt_id, read without any of the package's readers."""
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
    for path in [*root.glob("*.csv"), *root.glob("*.jsonl"), *root.glob("*/metadata.jsonl")]:
        with path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file) if path.suffix == ".csv" else map(json.loads, file)
            for row in rows:
                yield (path.parent / row["file_name"]).read_bytes(), row


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    assert (member.mtime, member.uid, member.uname) == (0, 0, "")
    return file.read()


# -- what goes in and comes out ---------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_each_form_has_every_accepted_image_byte_for_byte_with_its_row(
    shelf: Shelf, to: str, form: Form
) -> None:
    rows = shelf.rows(25)
    shelf.accept(rows)
    exported = done(shelf, to, form=form, splits=HALVES, shard_images=6)
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
def test_equal_rows_give_equal_bytes_whatever_the_order_of_the_table(
    shelf: Shelf, tmp_path: Path, form: Form
) -> None:
    rows = shelf.rows(30)
    shelf.accept(rows)
    one = done(shelf, str(tmp_path / "one"), form=form, shard_images=7)
    shelf.accept(rows[::-1])
    two = done(shelf, str(tmp_path / "two"), form=form, shard_images=7, threads=1)
    assert one.version == two.version
    assert contents(Path(one.path)) == contents(Path(two.path))


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_filters_partitions_and_all_stored_images(shelf: Shelf, to: str) -> None:
    shelf.accept(shelf.rows(6), "a")
    shelf.accept(shelf.rows(4, 6), "b/1")
    unfinished = {**shelf.row(40), "status": "failed", "image_sha256": None, "image_path": None}
    shelf.list([*shelf.rows(12, 20), unfinished], "a")
    assert done(shelf, to).facts.images == 10
    assert done(shelf, to, partitions=("b/1",)).facts.images == 4
    assert done(shelf, to, everything=True).facts.images == 12
    some = done(shelf, to, where=["category=sea", "seed=2", "seed=4", "seed=5"])
    assert {row["prompt_id"] for row in index_of(some)} == {"row-0001", "row-0003"}
    named = done(shelf, to, columns=("prompt", "seed"))
    assert list(named.schema.names) == ["prompt", "seed"]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"where": ["nope=1"]}, "no column 'nope'"),
        ({"where": ["seed=red"]}, "'seed' is int32"),
        ({"where": ["category=none"]}, "6 were left out"),
        ({"where": ["category"]}, "not COLUMN=VALUE"),
        ({"partitions": ("z",)}, "'z' has no table"),
        ({"columns": ("nope",)}, "no column 'nope'"),
        ({"everything": True}, "Materialize image_manifest first"),
        ({"license": "my own, see below"}, "not an identifier"),
        ({"form": "zip"}, "there is no form 'zip'"),
        ({"sidecars": True}, "sidecars lie beside"),
    ],
    ids=str,
)
def test_what_cannot_be_exported_is_said_and_nothing_is_written(
    shelf: Shelf, to: str, fields: dict[str, Any], said: str
) -> None:
    shelf.accept(shelf.rows(6))
    with pytest.raises(ConfigError, match=said):
        done(shelf, to, **fields)
    assert not Path(to).exists()


def test_a_column_of_two_types_is_said(shelf: Shelf, to: str) -> None:
    for key, value in (("a", 7), ("b", "seven")):
        shelf.accept(shelf.rows(1), key)
        name = accepted_name(key)
        table = pq.read_table(shelf.storage.locate(name)).append_column("mixed", [[value]])
        shelf.storage.write(name, partial(pq.write_table, table))
    with pytest.raises(ConfigError, match="mixed"):
        done(shelf, to)


def test_a_column_that_the_form_needs_for_itself_is_refused(shelf: Shelf, to: str) -> None:
    rows = shelf.rows(2)
    shelf.accept(rows)
    name = accepted_name("a")
    table = pq.read_table(shelf.storage.locate(name))
    shelf.storage.write(
        name, lambda file: pq.write_table(table.append_column("image", table["category"]), file)
    )
    with pytest.raises(ConfigError, match="rename it"):
        done(shelf, to)


# -- splits -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["parquet", "webdataset", "imagefolder"])
def test_growth_moves_no_image_and_writes_only_what_has_changed(
    shelf: Shelf, to: str, form: Form
) -> None:
    shelf.accept(shelf.rows(100))
    first = done(shelf, to, form=form, splits=HALVES, shard_images=10)
    shelf.accept(shelf.rows(110))
    second = done(shelf, to, form=form, splits=HALVES, shard_images=10)
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
    shelf: Shelf, to: str
) -> None:
    shelf.accept(shelf.rows(40))
    first = done(shelf, to, form="webdataset", shard_images=10)
    gone = {row["prompt_id"] for row in index_of(first) if row["shard"] == 1}
    shelf.accept([row for row in shelf.rows(40) if row["prompt_id"] not in gone])
    second = done(shelf, to, form="webdataset", shard_images=10)
    assert set(images_in(second)) == {f"row-{n:04d}" for n in range(40)} - gone
    names = sorted(path.name for path in Path(second.path).glob("data/*"))
    assert names == ["train-00000.tar", "train-00001.tar", "train-00002.tar"]


def test_images_alike_are_in_one_split_and_the_last_keeps_them(shelf: Shelf, to: str) -> None:
    rows = shelf.rows(40)
    shelf.accept(rows)
    split_of = {row["prompt_id"]: row["split"] for row in index_of(done(shelf, to, splits=HALVES))}
    train = [row for row in rows if split_of[row["prompt_id"]] == "train"]
    test = [row for row in rows if split_of[row["prompt_id"]] == "test"]
    shelf.liken([train[0], test[0]], [train[1], train[2]], [test[1], train[3], train[4]])
    exported = done(shelf, to, splits=HALVES)
    left = {one["prompt_id"] for one in (train[0], train[3], train[4])}
    assert {row["prompt_id"] for row in index_of(exported)} == set(split_of) - left
    assert exported.figures()["splits"]["train"]["left_out_as_alike"] == 3
    assert "3 images of the others are left out" in (Path(exported.path) / "README.md").read_text()
    assert done(shelf, to, splits=HALVES, leaks=True).facts.images == 40


def test_the_very_same_file_never_leaks_even_where_nobody_has_looked_for_likeness(
    shelf: Shelf, to: str
) -> None:
    rows = [shelf.row(n, picture=n % 2 * 4) for n in range(0, 40, 4)]
    shelf.accept(rows)
    found = index_of(done(shelf, to, splits=HALVES))
    splits: dict[str, set[str]] = {}
    for row in found:
        splits.setdefault(row["image_sha256"], set()).add(row["split"])
    assert all(len(of) == 1 for of in splits.values())
    assert len(found) < len(rows)


# -- faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_files_that_are_missing_or_changed_are_all_named_and_nothing_is_published(
    shelf: Shelf, to: str, form: Form
) -> None:
    rows = shelf.rows(40)
    shelf.accept(rows)
    first = done(shelf, to, form=form, shard_images=10)
    more = [*rows, *shelf.rows(20, 40)]
    shelf.accept(more)
    Path(more[45]["image_path"]).unlink()
    Path(more[50]["image_path"]).write_bytes(drawn(999))
    with pytest.raises(ImagesNotAsStored) as caught:
        done(shelf, to, form=form, shard_images=10)
    said = str(caught.value)
    assert "2 images are not what the manifest says. Nothing was published" in said
    assert f"row-0045 sample 0: {more[45]['image_path']} is missing" in said
    assert f"instead of {more[50]['image_sha256']}" in said
    assert (Path(to) / "LATEST").read_text().strip() == first.version
    assert (Path(to) / "latest").resolve() == Path(first.path)
    complete = {path.resolve().parent.name for path in Path(to).glob("*/export.json")}
    assert complete == {first.version}

    shelf.rows(60)  # which puts the files back
    assert done(shelf, to, form=form, shard_images=10).facts.images == 60


@pytest.mark.parametrize("form", ["webdataset", "jsonl"])
def test_what_a_killed_export_has_written_is_not_written_again(
    shelf: Shelf, to: str, form: Form
) -> None:
    shelf.accept(shelf.rows(60))
    command = [
        sys.executable,
        "-m",
        "tests.curation.export.export_worker",
        shelf.root,
        to,
        form,
        "4",
    ]
    ran = subprocess.run(command, cwd=ROOT, check=False, timeout=60, capture_output=True)
    assert ran.returncode == -9, ran.stderr
    assert not (Path(to) / "LATEST").exists()
    assert not list(Path(to).glob("*/export.json"))
    exported = done(shelf, to, form=form, shard_images=10)
    assert exported.shards == 6
    assert exported.found >= 4
    assert len(images_in(exported)) == 60


@pytest.mark.parametrize("form", ["parquet", "webdataset", "imagefolder"])
def test_a_shard_that_was_damaged_since_is_made_anew(shelf: Shelf, to: str, form: Form) -> None:
    shelf.accept(shelf.rows(30))
    first = done(shelf, to, form=form, shard_images=10)
    pattern = "train/00001/*.png" if form == "imagefolder" else "data/train-00001.*"
    victim = next(Path(first.path).glob(pattern))
    data = bytearray(victim.read_bytes())
    data[len(data) // 2] ^= 255
    victim.write_bytes(bytes(data))
    shelf.accept(shelf.rows(31))
    second = done(shelf, to, form=form, shard_images=10)
    assert (second.linked, second.written) == (2, 2)
    for row in shelf.rows(31):
        assert (
            hashlib.sha256(images_in(second)[row["prompt_id"]][0]).hexdigest()
            == (row["image_sha256"])
        )


def test_a_target_that_cannot_be_written_is_said(shelf: Shelf, tmp_path: Path) -> None:
    shelf.accept(shelf.rows(3))
    (tmp_path / "file").write_text("not a folder")
    with pytest.raises(StorageError, match="nothing was published"):
        done(shelf, str(tmp_path / "file" / "out"))


def test_without_changes_the_export_is_the_same_version_and_nothing_is_written(
    shelf: Shelf, to: str
) -> None:
    shelf.accept(shelf.rows(20))
    first = done(shelf, to, shard_images=5)
    (shard, *_) = Path(first.path).glob("data/*")
    written = shard.stat().st_mtime_ns
    second = done(shelf, to, shard_images=5)
    assert (second.version, second.found, second.written) == (first.version, 4, 0)
    assert shard.stat().st_mtime_ns == written


def test_a_version_whose_index_or_files_somebody_has_removed_is_no_hindrance(
    shelf: Shelf, to: str
) -> None:
    shelf.accept(shelf.rows(20))
    first = done(shelf, to, form="webdataset", shard_images=5, embed_parameters=True)
    (Path(first.path) / "index.parquet").unlink()
    shelf.accept(shelf.rows(21))
    second = done(shelf, to, form="webdataset", shard_images=5, embed_parameters=True)
    hashes = {row["prompt_id"]: row["exported_sha256"] for row in index_of(second)}
    for prompt_id, (data, _) in images_in(second).items():
        assert hashes[prompt_id] == hashlib.sha256(data).hexdigest()
    shutil.rmtree(second.path)
    assert done(shelf, to, form="webdataset", shard_images=5).facts.images == 21


def test_old_versions_go_only_where_that_is_asked_for(shelf: Shelf, to: str) -> None:
    made = []
    for count in (5, 6, 7):
        shelf.accept(shelf.rows(count))
        made.append(done(shelf, to).version)
    (Path(to) / "notes.txt").write_text("mine")
    assert all((Path(to) / version / "export.json").exists() for version in made)
    shelf.accept(shelf.rows(8))
    last = done(shelf, to, keep=2)
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


def test_a_root_that_was_moved_is_exported_from_where_it_is_now(
    shelf: Shelf, tmp_path: Path, to: str
) -> None:
    """Its manifests name the files where they were."""
    shelf.accept(shelf.rows(3))
    Path(shelf.root).rename(tmp_path / "krea-moved")
    moved = export(Storage(str(tmp_path / "krea-moved")), ExportSpec.parse(form="jsonl"), to)
    assert len(images_in(moved)) == 3


def test_a_version_that_another_export_removed_is_not_published(shelf: Shelf, to: str) -> None:
    """That one was told to keep few, and this one's was complete and not the one that counts."""
    rows = shelf.rows(3)
    shelf.accept(rows)
    first = done(shelf, to, form="jsonl")
    shelf.accept([*rows, *shelf.rows(1, 3)])
    second = done(shelf, to, form="jsonl")
    target = ExportTarget(to)
    target.publish(first.version)
    shutil.rmtree(Path(second.path))
    with pytest.raises(StorageError, match="removed by another export"):
        target.publish(second.version)
    assert target.latest() == first.version


@pytest.mark.parametrize("form", ["csv", "jsonl", "imagefolder"])
def test_prompts_with_every_kind_of_line_end_stay_in_their_row(
    shelf: Shelf, to: str, form: Form
) -> None:
    ends = ["\r", "\n", "\r\n", "\u2028", "\x85", "\x0b", '"', ","]
    rows = [{**row, "prompt": f"one{end}two"} for row, end in zip(shelf.rows(8), ends, strict=True)]
    shelf.accept(rows)
    exported = done(shelf, to, form=form)
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
    shelf: Shelf, to: str, memory: Any, form: Form
) -> None:
    shelf.accept(shelf.rows(20))
    local = done(shelf, to, form=form, shard_images=5)
    remote = done(shelf, "memory://bucket/out", form=form, shard_images=5)
    assert remote.version == local.version
    root = f"/bucket/out/{local.version}"
    found = {name.removeprefix(f"{root}/"): memory.cat(name) for name in memory.find(root)}
    assert found == contents(Path(local.path))
    shelf.accept(shelf.rows(23))
    second = done(shelf, "memory://bucket/out", form=form, shard_images=5)
    assert (second.linked, second.written) == (4, 1)
    assert memory.cat("/bucket/out/LATEST").decode().strip() == second.version


def test_images_in_an_object_store_are_exported_too(memory: Any, to: str) -> None:
    shelf = Shelf("memory://bucket/krea")
    shelf.accept(shelf.rows(12))
    assert len(images_in(done(shelf, to))) == 12


# -- parameters -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_parameters_in_a_png_leave_its_pixels_and_both_hashes_are_kept(
    shelf: Shelf, to: str, form: Form
) -> None:
    rows = shelf.rows(8)
    shelf.accept(rows)
    exported = done(shelf, to, form=form, embed_parameters=True)
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
        assert hashlib.sha256(without_parameters(data)[0]).hexdigest() == row["image_sha256"]
    # And a later version knows them again.
    shelf.accept(shelf.rows(9))
    later = done(shelf, to, form=form, embed_parameters=True)
    assert {row["exported_sha256"] for row in index_of(later) if row["prompt_id"] in by_id} == {
        row["exported_sha256"] for row in by_id.values()
    }


def test_taking_parameters_out_of_a_file_that_has_none_changes_nothing() -> None:
    data = drawn(1)
    assert without_parameters(data) == (data, None)
    assert without_parameters(b"short") == (b"short", None)
    assert without_parameters(with_parameters(data, "ü")) == (data, "ü")


def test_a_sidecar_lies_beside_each_image(shelf: Shelf, to: str) -> None:
    shelf.accept(shelf.rows(5))
    exported = done(shelf, to, form="imagefolder", sidecars=True)
    for row in index_of(exported):
        sidecar = (Path(exported.path) / row["file"]).with_suffix(".json")
        assert json.loads(sidecar.read_text())["prompt_id"] == row["prompt_id"]


# -- the card ---------------------------------------------------------------------------------


def test_the_card_says_what_it_is_how_it_was_made_and_what_it_cost(shelf: Shelf, to: str) -> None:
    import yaml  # noqa: PLC0415 - comes with Dagster

    shelf.accept(shelf.rows(12))
    exported = done(
        shelf,
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
        "12 different ones, 1 to 12",
        "10.8 credits for the 12 purchases",
        "quality is 1K",
        "krea-dagster",
    ):
        assert said in body, said


def test_a_purchase_that_two_rows_share_counts_once_and_both_rows_are_in(
    shelf: Shelf, to: str
) -> None:
    first = shelf.row(1)
    shelf.accept([first, {**first, "prompt_id": "twin"}])
    exported = done(shelf, to)
    assert (exported.facts.images, exported.facts.purchases) == (2, 1)
    assert exported.facts.credits == 0.9


def test_a_row_that_is_in_two_tables_is_in_the_export_once(shelf: Shelf, to: str) -> None:
    shelf.accept(shelf.rows(3), "a")
    shelf.accept(shelf.rows(3), "b")
    exported = done(shelf, to, columns=("prompt",))
    assert (exported.facts.images, exported.repeated) == (3, 3)

"""Reads every export back with its own library, in an environment without this package.

Images must be equal by sha256 and by pixels, columns equal to the rows they were made from, and
splits the same when the table has grown by a tenth. ``EXPORT_PYTHON`` names a Python that has the
libraries already; else an environment is made with uv, which takes the versions below.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
UV = ROOT / ".uv" / "bin" / "uv"
PACKAGES = (
    "datasets==5.2.0",
    "webdataset==1.0.2",
    "pillow",
    "pyexiv2==2.16.0",
    "mlcroissant==1.1.1",
)
IMAGES = 200

#: What is done to the files.
EDITS: dict[str, dict[str, Any]] = {
    "as received": {"mark": False},
    "marked, with parameters": {"embed_parameters": True},
    "converted": {"image_format": "webp", "longest_side": 16},
}

sys.path.insert(0, str(ROOT))

import pyarrow.parquet as pq  # noqa: E402
from PIL import Image  # noqa: E402

from krea_dagster.curation.export.export import export  # noqa: E402
from krea_dagster.curation.export.selected_rows import LEFT_OUT  # noqa: E402
from krea_dagster.curation.export.spec import FORMS, ExportSpec  # noqa: E402
from tests.curation.export.export_project import ExportProject  # noqa: E402
from tests.export_env.kinds import KINDS, column, expected, same  # noqa: E402

READERS_OF = {form: (form,) for form in FORMS} | {
    "webdataset": ("webdataset", "webdataset-datasets"),
    "csv": ("csv", "csv-datasets"),
}


def main() -> int:
    """Return 0 if everything is as it was written."""
    with tempfile.TemporaryDirectory(prefix="krea-export-env-") as folder:
        home = Path(folder)
        python = Path(os.environ.get("EXPORT_PYTHON") or make_environment(home))
        project = ExportProject(str(home / "store"))
        rows = project.rows(IMAGES)
        more = [*rows, *project.rows(IMAGES // 10, IMAGES)]
        for form in FORMS:
            for edits in EDITS:
                to = home / "out" / f"{form}-{edits}"
                project.write_accepted(rows)
                first = read(python, home, form, publish(project, form, to, edits))
                for reader, found in first.items():
                    compare(reader, found, rows, edits)
                project.write_accepted(more)
                second = read(python, home, form, publish(project, form, to, edits))
                for reader, found in second.items():
                    compare(reader, found, more, edits)
                    before, after = splits_of(first[reader]), splits_of(found)
                    assert before == {name: after[name] for name in before}, "rows have moved"
                    sizes = {split: len(images) for split, images in found.items()}
                    print(f"{reader}, files {edits}; {sizes}: as written")
        every_kind(python, home)
        two_versions(python, home)
        described_by_croissant(python, home)
        from_the_demo(python, home)
    return 0


def from_the_demo(python: Path, home: Path) -> None:
    """The README's way from the demo to a dataset, without the review, which waits for a person."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (block,) = [one for one in readme.split("```console\n") if "load_dataset" in one]
    commands = block.split("```")[0].replace(".venv/bin/krea-dagster review\n", "")
    commands = commands.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    folder = home / "demo"
    folder.mkdir()
    ours = ("DAGSTER_", "EVOLINK_", "KREA_")
    environment = {name: text for name, text in os.environ.items() if not name.startswith(ours)}
    environment |= {
        "PATH": f"{python.parent}{os.pathsep}{os.environ['PATH']}",
        "HF_HOME": str(home),
    }
    began = time.monotonic()
    demo = [str(Path(sys.executable).parent / "krea-dagster"), "demo"]
    for program in (demo, ["bash", "-euc", commands]):
        done = subprocess.run(program, cwd=folder, env=environment, check=True, capture_output=True)
    assert "num_rows: 66" in done.stdout.decode(), done.stdout.decode()
    print(f"from the demo to a loaded dataset in {time.monotonic() - began:.0f} s")


def every_kind(python: Path, home: Path) -> None:
    """Every kind of column, in a dataset of which one split has no verdict yet."""
    project = ExportProject(str(home / "kinds"))
    rows = project.rows(40)
    to = home / "kinds-out"
    project.write_accepted(rows)
    halves = split_by_prompt(Path(export(project.storage, spec_of("csv"), str(to)).path))
    judged = [
        row if halves[row["prompt_id"]] == "train" else {**row, "verdict": None, "reviewer": None}
        for row in rows
    ]
    project.write_accepted(judged, columns={name: column(name, len(rows)) for name in KINDS})
    for form in FORMS:
        folder = Path(export(project.storage, spec_of(form), str(home / "kinds-out" / form)).path)
        for reader in READERS_OF[form]:
            found = read(python, home, reader, folder)[reader]
            images = {name: image for split in found.values() for name, image in split.items()}
            assert set(images) == {row["prompt_id"] for row in rows}, reader
            wrong = [
                (reader, name, expected(name, at), images[row["prompt_id"]]["columns"][name])
                for at, row in enumerate(rows)
                for name in KINDS
                if not same(
                    expected(name, at),
                    images[row["prompt_id"]]["columns"][name],
                    csv=form == "csv",
                )
            ]
            assert not wrong, wrong[:20]
            print(f"{reader}: {len(KINDS)} kinds of columns, half of the images judged: as written")


def two_versions(python: Path, home: Path) -> None:
    """The next version of an export, and another project's, are never taken for the first."""
    for form in FORMS:
        for reader in READERS_OF[form]:
            for place, count in (("one", 12), ("one", 5), ("two", 7)):
                project = ExportProject(str(home / f"cache-{place}"))
                project.write_accepted(project.rows(count))
                to = home / "cache-out" / place / form
                export(project.storage, ExportSpec(form=form), str(to))
                found = read(python, home, reader, to / "latest")[reader]
                assert sum(map(len, found.values())) == count, (reader, place, count)
        print(f"{form}: each version is read by its link `latest`, in one cache")


def described_by_croissant(python: Path, home: Path) -> None:
    """What ``mlcroissant`` finds through croissant.json, in a dataset with odd columns."""
    project = ExportProject(str(home / "croissant"))
    rows = project.rows(30)
    rows[::3] = [{**row, "verdict": None, "reviewer": None} for row in rows[::3]]
    more = {name: column(name, len(rows)) for name in (*KINDS, "whole")}
    project.write_accepted(rows, columns={**more, "odd näme [x]": more["whole"]})
    for form in ("parquet", "imagefolder", "jsonl", "csv"):
        to = home / "croissant-out" / form
        folder = Path(export(project.storage, spec_of(form), str(to)).path)
        found = read(python, home, "croissant", folder)["croissant"]
        splits = {name: split for split, images in found.items() for name in images}
        assert splits == split_by_prompt(folder), form
        for at, row in enumerate(rows):
            image = found[splits[row["prompt_id"]]][row["prompt_id"]]
            columns = image["columns"]
            assert image["pixels"] == pixels_of(row), form
            for name in ("prompt", "seed", "width", "image_sha256", "verdict", "category"):
                assert columns[name] == row[name], (form, name)
            assert columns["odd näme [x]"] == expected("whole", at)
            assert columns["stored_at"] == row["stored_at"].isoformat()
            tags = columns["tags"]
            assert row["tags"] == (json.loads(tags) if form == "csv" and tags else tags), form
        print(f"{form}: {len(rows)} images read by croissant.json: as written")


def spec_of(form: Any) -> ExportSpec:
    return ExportSpec.parse(splits=["train=0.6", "test=0.4"], form=form, shard_images=10)


def split_by_prompt(folder: Path) -> dict[str, str]:
    index = pq.read_table(folder / "index.parquet", columns=["prompt_id", "split"])
    return dict(zip(*(column.to_pylist() for column in index.columns), strict=True))


def publish(project: ExportProject, form: Any, to: Path, edits: str) -> Path:
    spec = ExportSpec.parse(
        splits=["train=0.8", "test=0.2"],
        form=form,
        shard_images=50,
        **EDITS[edits],
    )
    return Path(export(project.storage, spec, str(to)).path)


def read(python: Path, home: Path, reader: str, folder: Path) -> dict[str, Any]:
    """What a library finds in an export."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(home),
        "HF_HOME": str(home / "hf"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    }
    script = str(Path(__file__).with_name("readers.py"))
    ran = subprocess.run(
        [str(python), "-I", script, reader, str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=home,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    return {reader: json.loads(ran.stdout.splitlines()[-1])}


def compare(reader: str, found: dict[str, Any], rows: list[dict[str, Any]], edits: str) -> None:
    images = {name: image for split in found.values() for name, image in split.items()}
    assert set(images) == {row["prompt_id"] for row in rows}, reader
    assert sum(map(len, found.values())) == len(rows), reader
    for row in rows:
        image, columns = images[row["prompt_id"]], images[row["prompt_id"]]["columns"]
        if edits == "as received":
            assert image["sha256"] == row["image_sha256"], (reader, row["prompt_id"])
            assert image["source_type"] is None
        else:
            assert image["sha256"] == columns["exported_sha256"] != row["image_sha256"]
            assert image["source_type"].endswith("/trainedAlgorithmicMedia"), image
        expected = {name: value for name, value in row.items() if name not in LEFT_OUT}
        if edits == "converted":
            assert image["size"] == [16, 16]
            expected |= {"width": 16, "height": 16, "image_format": "WEBP"}
        else:
            assert image["pixels"] == pixels_of(row), (reader, row["prompt_id"])
        for name, value in expected.items():
            wanted, got = plain(value), columns[name]
            if reader == "csv":
                wanted = text(wanted)
            elif isinstance(value, datetime):
                got = got.replace("Z", "+00:00")
            assert got == wanted, (reader, row["prompt_id"], name, got, wanted)


def pixels_of(row: dict[str, Any]) -> str:
    with Image.open(io.BytesIO(Path(row["image_path"]).read_bytes())) as image:
        return hashlib.sha256(image.convert("RGB").tobytes()).hexdigest()


def splits_of(found: dict[str, Any]) -> dict[str, str]:
    return {name: split for split, images in found.items() for name in images}


def plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and math.isnan(value) else value


def text(value: Any) -> str:
    """A value as CSV has it."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, str) and value.endswith("+00:00"):
        return value.replace("+00:00", "Z")
    return str(value)


def make_environment(home: Path) -> Path:
    python = home / "env" / "bin" / "python"
    bare = {name: value for name, value in os.environ.items() if name != "VIRTUAL_ENV"}
    for command in (
        ["venv", "--quiet", "--python", sys.executable, str(home / "env")],
        ["pip", "install", "--quiet", "--python", str(python), *PACKAGES],
    ):
        subprocess.run([str(UV), *command], check=True, env=bare)
    return python


if __name__ == "__main__":
    sys.exit(main())

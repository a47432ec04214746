"""Images that an export converts, makes smaller and marks: files, columns, card, versions."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from krea_dagster.curation.export.export import Exported, export
from krea_dagster.curation.export.file_metadata import BY_ALGORITHM, BY_MODEL
from krea_dagster.curation.export.image_edits import ImageEdits
from krea_dagster.curation.export.spec import ExportSpec, Form
from krea_dagster.errors import ConfigError
from tests.curation.export.export_project import ExportProject
from tests.curation.export.test_export import FORMS, contents, images_in, index_of


@pytest.fixture
def project(tmp_path: Path) -> ExportProject:
    project = ExportProject(str(tmp_path / "krea"))
    project.write_accepted(project.rows(10))
    return project


@pytest.fixture
def to(tmp_path: Path) -> str:
    return str(tmp_path / "out")


def done(project: ExportProject, to: str, **fields: Any) -> Exported:
    return export(project.storage, ExportSpec.parse(**fields), to)


def card_of(exported: Exported) -> str:
    return (Path(exported.path) / "README.md").read_text()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("image_format", ["png", "jpeg", "webp"])
def test_images_are_converted_and_made_smaller_and_columns_describe_the_new_file(
    project: ExportProject, to: str, form: Form, image_format: str
) -> None:
    exported = done(
        project, to, form=form, image_format=image_format, longest_side=16, shard_images=4
    )
    known = {row["prompt_id"]: row for row in index_of(exported)}
    stored = {row["prompt_id"]: row for row in project.rows(10)}
    for prompt_id, (data, columns) in images_in(exported).items():
        with Image.open(io.BytesIO(data)) as image:
            assert (image.format, image.size) == (image_format.upper(), (16, 16))
        assert columns["image_format"] == image_format.upper()
        assert (int(columns["width"]), int(columns["height"])) == (16, 16)
        assert columns["image_sha256"] == stored[prompt_id]["image_sha256"]
        assert columns["exported_sha256"] == hashlib.sha256(data).hexdigest()
        assert int(columns["exported_bytes"]) == known[prompt_id]["exported_bytes"] == len(data)
        assert known[prompt_id]["exported_sha256"] == columns["exported_sha256"]
        assert known[prompt_id]["file"].endswith(
            {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}[image_format]
        )
    assert exported.facts.formats == {image_format.upper(): 10}
    assert "their longer side has 16 pixels" in card_of(exported)


def test_equal_images_become_equal_files_with_any_number_of_threads(
    project: ExportProject, tmp_path: Path
) -> None:
    spec = ExportSpec.parse(form="imagefolder", image_format="webp", longest_side=20)
    one, four = (
        export(project.storage, spec, str(tmp_path / str(threads)), threads=threads)
        for threads in (1, 4)
    )
    assert contents(Path(one.path)) == contents(Path(four.path))


def test_a_file_that_has_the_format_and_the_size_is_not_encoded_again(
    project: ExportProject, to: str
) -> None:
    exported = done(project, to, form="jsonl", image_format="jpeg", longest_side=24, mark=False)
    stored = {row["prompt_id"]: row for row in project.rows(10)}
    for prompt_id, (data, columns) in images_in(exported).items():
        as_stored = hashlib.sha256(data).hexdigest() == columns["image_sha256"]
        assert as_stored == (stored[prompt_id]["image_format"] == "JPEG")


@pytest.mark.parametrize(
    ("size", "longest", "expected"),
    [
        ((1024, 768), 512, (512, 384)),
        ((768, 1024), 512, (384, 512)),
        ((512, 512), 1024, (512, 512)),
        ((2000, 3), 100, (100, 1)),
        ((1365, 1024), 1000, (1000, 750)),
    ],
)
def test_the_sides_keep_their_ratio_and_no_image_is_enlarged(
    size: tuple[int, int], longest: int, expected: tuple[int, int]
) -> None:
    assert ImageEdits(longest_side=longest).size(*size) == expected


def image_file(mode: str, image_format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    gradient = np.linspace(0, 255, 64 * 64, dtype=np.uint8).reshape(64, 64)
    Image.fromarray(gradient).convert(mode).save(file, image_format, **options)
    return file.getvalue()


def converted(data: bytes, **edits: Any) -> Image.Image:
    image = Image.open(io.BytesIO(ImageEdits(**edits).apply(data, "", "")))
    image.load()
    return image


def test_transparency_becomes_white_in_a_jpeg_and_stays_elsewhere() -> None:
    file = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(file, "PNG")
    jpeg = converted(file.getvalue(), image_format="JPEG")
    assert jpeg.mode == "RGB"
    assert jpeg.getpixel((3, 3)) == (255, 255, 255)
    webp = converted(file.getvalue(), image_format="WEBP")
    assert not any(webp.getchannel("A").tobytes())


@pytest.mark.parametrize(
    ("mode", "image_format"),
    [("P", "PNG"), ("1", "PNG"), ("LA", "PNG"), ("I;16", "PNG"), ("CMYK", "JPEG"), ("L", "AVIF")],
)
def test_every_kind_of_pixels_can_be_converted(mode: str, image_format: str) -> None:
    data = image_file(mode, image_format)
    for wanted in ("PNG", "JPEG", "WEBP"):
        image = converted(data, image_format=wanted, longest_side=32)
        assert (image.format, image.size) == (wanted, (32, 32))


def test_the_colour_profile_is_kept_and_quality_decides_the_size() -> None:
    data = image_file("RGB", "PNG", icc_profile=b"a profile" * 20)
    assert converted(data, image_format="JPEG").info["icc_profile"] == b"a profile" * 20
    sizes = [
        len(ImageEdits(image_format="JPEG", quality=quality).apply(data, "", ""))
        for quality in (20, 80, 95)
    ]
    assert sizes == sorted(sizes)
    assert len(set(sizes)) == 3


def test_the_next_version_converts_only_shards_that_changed(
    project: ExportProject, to: str
) -> None:
    fields: dict[str, Any] = {"image_format": "jpeg", "longest_side": 12, "shard_images": 4}
    for form in ("parquet", "imagefolder"):
        place = f"{to}-{form}"
        project.write_accepted(project.rows(10))
        first = done(project, place, form=form, **fields)
        again = done(project, place, form=form, **fields)
        assert (again.version, again.found, again.written) == (first.version, 3, 0)
        project.write_accepted(project.rows(11))
        second = done(project, place, form=form, **fields)
        assert (second.linked, second.written) == (2, 1)
        other = done(project, place, form=form, **{**fields, "quality": 50})
        assert (other.linked, other.written) == (0, 3), "other settings make other files"
        assert {row["prompt_id"] for row in index_of(other)} == set(images_in(other))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"image_format": "gif"}, "cannot be converted to 'gif'"),
        ({"longest_side": 0}, "must be 1 pixel or more"),
        ({"quality": 80}, "quality is for images that are converted"),
        ({"image_format": "png", "quality": 80}, "quality is for images that are converted"),
        ({"image_format": "jpeg", "quality": 101}, "from 1 to 100"),
    ],
)
def test_an_invalid_conversion_is_an_error(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ExportSpec(**fields)


@pytest.mark.parametrize("form", FORMS)
def test_files_are_marked_as_generated_by_default(
    project: ExportProject, to: str, form: Form
) -> None:
    exported = done(project, to, form=form)
    stored = {row["prompt_id"]: row for row in project.rows(10)}
    for prompt_id, (data, columns) in images_in(exported).items():
        assert BY_MODEL.encode() in data
        assert columns["image_sha256"] == stored[prompt_id]["image_sha256"]
        with (
            Image.open(io.BytesIO(data)) as there,
            Image.open(stored[prompt_id]["image_path"]) as here,
        ):
            assert there.tobytes() == here.tobytes()
    assert "`trainedAlgorithmicMedia`" in card_of(exported)


def test_images_of_an_emulator_are_not_said_to_be_made_by_a_model(
    project: ExportProject, to: str
) -> None:
    exported = export(project.storage, ExportSpec(form="jsonl"), to, origin="an emulator")
    assert all(BY_ALGORITHM.encode() in data for data, _ in images_in(exported).values())
    assert "`algorithmicMedia`" in card_of(exported)

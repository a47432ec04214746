"""Thumbnails: made once, kept by hash, and only of images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from krea_dagster.curation.thumbnails import (
    LEAST_SIDE,
    SIDE,
    NoThumbnail,
    Thumbnails,
    decoded,
    thumbnail_of,
)
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.models import PIXELS

SHA = "ab" * 32


def image_bytes(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (900, 600)) -> bytes:
    out = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert(mode)
    image.save(out, kind)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def made_of(data: bytes) -> Image.Image:
    return opened(thumbnail_of(decoded(data, SIDE)))


class Project:
    """A storage root with the image ``images/a.png``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.image = folder / "images" / "a.png"
        self.image.parent.mkdir(parents=True)
        self.image.write_bytes(image_bytes())
        self.thumbnails = Thumbnails(Storage(str(folder)))

    def get(self) -> bytes:
        return self.thumbnails.get(SHA, "images/a.png")

    @property
    def kept(self) -> Path:
        (path,) = (self.folder / "thumbnails").rglob("*.jpg")
        return path


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path / "krea")


# -- what a thumbnail is ----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_every_format_gives_a_small_jpeg_of_the_same_shape(kind: str) -> None:
    made = made_of(image_bytes(kind))
    assert made.format == "JPEG"
    assert made.size in {(SIDE, SIDE * 2 // 3), (450 * 2 // 3, 300 * 2 // 3)}


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
def test_every_image_mode_can_be_shown(mode: str) -> None:
    assert made_of(image_bytes(mode=mode)).mode == "RGB"


@pytest.mark.parametrize("pixels", sorted({*PIXELS.values(), (400, 400), (385, 1), (640, 512)}))
def test_a_larger_image_has_a_thumbnail_that_fits_and_fills_a_cell(pixels: tuple[int, int]) -> None:
    made = made_of(image_bytes(size=pixels))
    assert LEAST_SIDE <= max(made.size) <= SIDE
    assert abs(made.width / made.height - pixels[0] / pixels[1]) < 0.02 * pixels[0] / pixels[1]


def test_a_thumbnail_has_the_orientation_of_its_image() -> None:
    turned = Image.Exif()
    turned[274] = 6  # a quarter turn
    out = io.BytesIO()
    Image.linear_gradient("L").resize((900, 600)).save(out, "JPEG", exif=turned)
    made = made_of(out.getvalue())
    assert made.width < made.height
    assert 274 not in made.getexif()


def test_transparency_is_shown_as_white() -> None:
    out = io.BytesIO()
    Image.new("RGBA", (500, 500), (10, 20, 30, 0)).save(out, "PNG")
    assert made_of(out.getvalue()).getpixel((5, 5)) == (255, 255, 255)


def test_a_small_image_is_not_enlarged() -> None:
    assert made_of(image_bytes(size=(60, 40))).size == (60, 40)


@pytest.mark.parametrize(
    ("made", "said"),
    [
        (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "damaged"),
        (lambda: image_bytes()[:900], "damaged"),
        (lambda: image_bytes(mode="1", size=(20_000, 4000)), "20000×4000 pixels"),
    ],
    ids=["not an image", "cut short", "far too large"],
)
def test_a_bad_file_is_refused_with_the_reason(made: Callable[[], bytes], said: str) -> None:
    with pytest.raises(NoThumbnail, match=said):
        decoded(made(), SIDE)


# -- where it is kept -------------------------------------------------------------------------


def test_a_thumbnail_is_made_once_and_then_read(project: Project) -> None:
    made = project.get()
    assert project.kept.relative_to(project.folder).as_posix() == (
        f"thumbnails/ab/{SHA}-{SIDE}.jpg"
    )
    project.image.unlink()
    assert project.get() == made
    with pytest.raises(NoThumbnail, match="no longer exists"):
        project.thumbnails.get("cd" * 32, "images/a.png")


@pytest.mark.parametrize("damage", [b"", bytes(4000), b"\xff\xd8 cut short"])
def test_a_damaged_thumbnail_is_made_again(project: Project, damage: bytes) -> None:
    made = project.get()
    project.kept.write_bytes(damage)  # as a power failure may leave it
    assert project.get() == made
    assert project.kept.read_bytes() == made


def test_only_a_hash_names_a_file(project: Project) -> None:
    for name in ("../../images/a", "", "AB" * 32):
        project.thumbnails.get(name, "images/a.png")
        assert project.thumbnails.find(name) is None
    assert not (project.folder / "thumbnails").exists()


@pytest.mark.skipif(os.name == "nt", reason="folders are made read only otherwise there")
def test_a_folder_that_cannot_be_written_still_gives_thumbnails(project: Project) -> None:
    (project.folder / "thumbnails").write_text("in the way")
    assert opened(project.get()).format == "JPEG"


def test_thumbnails_of_an_object_store_are_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the store, each would cost a request to write and one to show."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    storage = Storage(f"memory://{tmp_path.name}")
    made = Thumbnails(storage).add(SHA, Image.linear_gradient("L"))
    assert Thumbnails(storage).find(SHA) == made
    kept = tmp_path / "krea-dagster" / "thumbnails" / "ab" / f"{SHA}-{SIDE}.jpg"
    assert kept.read_bytes() == made
    assert not list(storage.names(""))


@pytest.mark.skipif(os.name == "nt", reason="users are known otherwise there")
def test_a_user_without_a_home_folder_has_thumbnails_that_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A container may run with any user id."""

    def unknown(user_id: int) -> object:
        raise KeyError(user_id)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    thumbnails = Thumbnails(Storage(f"memory://{tmp_path.name}"))
    assert opened(thumbnails.add(SHA, Image.linear_gradient("L"))).format == "JPEG"
    assert thumbnails.find(SHA) is None

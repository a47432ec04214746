"""Thumbnails: made once, cached by hash, and only of images."""

from __future__ import annotations

import io
import os
from collections.abc import Callable
from pathlib import Path

import anyio
import pytest
from PIL import Image

from krea_dagster.curation.review.thumbnails import (
    SIDE,
    NoThumbnail,
    Thumbnails,
    make_thumbnail,
    thumbnail_folder,
)
from krea_dagster.engine.storage.storage import Storage

SHA = "ab" * 32


def image_bytes(kind: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (900, 600)) -> bytes:
    out = io.BytesIO()
    image = Image.linear_gradient("L").resize(size).convert(mode)
    image.save(out, kind)
    return out.getvalue()


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_every_format_gives_a_small_jpeg_of_the_same_shape(kind: str) -> None:
    made = opened(make_thumbnail(io.BytesIO(image_bytes(kind))))
    assert (made.format, made.size) == ("JPEG", (SIDE, SIDE * 2 // 3))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "I;16", "1"])
def test_every_image_mode_can_be_shown(mode: str) -> None:
    assert opened(make_thumbnail(io.BytesIO(image_bytes(mode=mode)))).mode == "RGB"


def test_a_small_image_is_not_enlarged() -> None:
    assert opened(make_thumbnail(io.BytesIO(image_bytes(size=(60, 40))))).size == (60, 40)


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
        make_thumbnail(io.BytesIO(made()))


def test_a_thumbnail_is_made_once_and_then_read(tmp_path: Path) -> None:
    storage = Storage(str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes())
    thumbnails = Thumbnails(storage)

    async def several() -> list[bytes]:
        found: list[bytes] = []

        async def get() -> None:
            found.append(await thumbnails.get(SHA, "images/a.png"))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(get)
        return found

    found = anyio.run(several)
    assert len(set(found)) == 1
    (kept,) = [path for path in thumbnail_folder(storage).rglob("*") if path.is_file()]
    assert kept.name == f"{SHA}-{SIDE}.jpg"
    kept.write_bytes(b"")  # as a power cut may leave it
    assert anyio.run(thumbnails.get, SHA, "images/a.png") == found[0]
    (tmp_path / "images" / "a.png").unlink()
    assert anyio.run(thumbnails.get, SHA, "images/a.png") == found[0]
    with pytest.raises(NoThumbnail, match="no longer exists"):
        anyio.run(thumbnails.get, "cd" * 32, "images/a.png")


@pytest.mark.skipif(os.name == "nt", reason="folders are made read only otherwise there")
def test_a_read_only_folder_still_gives_thumbnails(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes())
    (tmp_path / "a file").write_text("in the way")
    thumbnails = Thumbnails(Storage(str(tmp_path)), tmp_path / "a file")
    assert opened(anyio.run(thumbnails.get, SHA, "images/a.png")).format == "JPEG"


def test_thumbnails_of_an_object_store_are_in_the_user_s_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert thumbnail_folder(Storage("memory://project")).is_relative_to(tmp_path)

"""The thumbnails of the grid: an image that is asked for several times at once is decoded once."""

from __future__ import annotations

from pathlib import Path
from typing import BinaryIO

import anyio
import pytest

from krea_dagster.curation.review.thumbnails import GridThumbnails
from krea_dagster.curation.thumbnails import NoThumbnail, Thumbnails
from krea_dagster.engine.storage.storage import Storage
from tests.curation.test_thumbnails import SHA, image_bytes


class CountingStorage(Storage):
    """Counts the files that are opened below ``images``."""

    opened = 0

    def open(self, name: str) -> BinaryIO:
        self.opened += name.startswith("images/")
        return super().open(name)


def test_a_thumbnail_is_made_once_for_all_who_wait(tmp_path: Path) -> None:
    storage = CountingStorage(str(tmp_path))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(image_bytes())
    thumbnails = GridThumbnails(Thumbnails(storage))

    async def several() -> list[bytes]:
        found: list[bytes] = []

        async def get() -> None:
            found.append(await thumbnails.get(SHA, "images/a.png"))

        async with anyio.create_task_group() as group:
            for _ in range(5):
                group.start_soon(get)
        return found

    assert len(set(anyio.run(several))) == 1
    assert storage.opened == 1


def test_a_missing_file_has_no_thumbnail(tmp_path: Path) -> None:
    thumbnails = GridThumbnails(Thumbnails(Storage(str(tmp_path))))
    for _ in range(2):  # the first failure does not block the second try
        with pytest.raises(NoThumbnail, match="no longer exists"):
            anyio.run(thumbnails.get, SHA, "images/a.png")

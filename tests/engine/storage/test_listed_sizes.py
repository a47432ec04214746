"""Many sizes of a store's images are read from pages of its listing."""

from __future__ import annotations

import hashlib
import uuid
from functools import partial
from pathlib import Path
from typing import BinaryIO

import pytest

from krea_dagster.engine.storage.listed_sizes import ListedSizes, sizes_of_images
from krea_dagster.engine.storage.storage import Storage


def write_bytes(size: int, file: BinaryIO) -> None:
    file.write(b"x" * size)


@pytest.mark.parametrize("stored", [10, 100_000])
@pytest.mark.parametrize("place", ["folder", "object store"])
def test_the_sizes_are_those_of_the_files(place: str, stored: int, tmp_path: Path) -> None:
    root = str(tmp_path) if place == "folder" else f"memory://{uuid.uuid4().hex}/krea"
    storage = Storage(root)
    names = []
    for number in range(20):
        key = f"{number * 12:02x}{uuid.uuid4().hex}"
        names.append(f"images/{key[:2]}/{key}.png")
        storage.write(names[-1], partial(write_bytes, number))
    storage.write("images/elsewhere.png", lambda file: file.write(b"12345"))
    sizes = ListedSizes(storage, stored)
    assert [sizes.size_bytes(name) for name in sorted(names)] == list(range(20))
    assert sizes.size_bytes("images/00/00missing.png") is None
    assert sizes.size_bytes("images/elsewhere.png") == 5


@pytest.mark.parametrize("stored", [0, 10, 100_000])
@pytest.mark.parametrize("place", ["folder", "object store"])
def test_the_sizes_of_images_in_any_order_are_those_of_the_files(
    place: str, stored: int, tmp_path: Path
) -> None:
    root = str(tmp_path) if place == "folder" else f"memory://{uuid.uuid4().hex}/krea"
    storage = Storage(root)
    wanted: dict[str, int | None] = {}
    for number in range(20):
        key = hashlib.sha256(str(number).encode()).hexdigest()
        name = f"images/{key[:2]}/{key}.{'png' if number % 2 else 'webp'}"
        wanted[name] = number if number % 5 else None
        if number % 5:
            storage.write(name, partial(write_bytes, number))
    odd = ["images/elsewhere.png", "images/aa/short.png", "images/rejected/x.png"]
    for name in odd[:2]:
        storage.write(name, partial(write_bytes, 3))
    wanted |= dict(zip(odd, (3, 3, None), strict=True))
    assert dict(zip(wanted, sizes_of_images(storage, list(wanted), stored), strict=True)) == wanted
    assert sizes_of_images(storage, [], stored) == []

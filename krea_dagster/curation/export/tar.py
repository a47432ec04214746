"""WebDataset shards: tar files in which the files of an image are adjacent and share a name.

``<key>.png``, ``<key>.txt`` (the prompt) and ``<key>.json`` (the row). Times and owners are
constant, so equal rows give equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedFile,
    ExportedImage,
    ShardContent,
    check_image,
)


def write_tar(path: Path, content: ShardContent, images: Iterator[ExportedImage]) -> None:
    """Write a shard, with one image in memory at a time."""
    prompts = content.facts["prompt"]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for image in images:
            item = image.item
            line = json.dumps(content.ready(item, image.file), ensure_ascii=False)
            _add(tar, item.file, image.data)
            _add(tar, f"{item.key}.txt", (prompts[item.place].as_py() or "").encode())
            _add(tar, f"{item.key}.json", line.encode())


def check_tar(path: Path, content: ShardContent, files: Sequence[ExportedFile]) -> None:
    """Verify a shard, whose image files are ``files``. Raises CorruptShard."""
    prompts = content.facts["prompt"]
    try:
        with tarfile.open(path, "r:") as tar:
            for item, known in zip(content.items, files, strict=True):
                check_image(item, _next(tar, item.file), known)
                text = _next(tar, f"{item.key}.txt").decode()
                record = json.loads(_next(tar, f"{item.key}.json"))
                if text != (prompts[item.place].as_py() or ""):
                    raise CorruptShard(f"{path.name}: the prompt of {item.key} differs")
                if record != content.ready(item, known):
                    raise CorruptShard(f"{path.name}: the row of {item.key} differs")
            if tar.next() is not None:
                raise CorruptShard(f"{path.name} has extra files")
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CorruptShard(f"{path.name} cannot be read: {error}") from None


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def _next(tar: tarfile.TarFile, name: str) -> bytes:
    info = tar.next()
    # tarfile would keep all members in memory, for lookups by name.
    tar.members = []  # type: ignore[attr-defined] # the stubs do not have it
    file = None if info is None or info.name != name else tar.extractfile(info)
    if file is None:
        raise CorruptShard(f"{name} is missing or misplaced")
    with file:
        return file.read()

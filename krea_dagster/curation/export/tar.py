"""WebDataset shards: a tar file in which the files of an image share a name, one after the other.

``<key>.png``, ``<key>.txt`` (the prompt) and ``<key>.json`` (the row). Nothing in the file hangs
on when or by whom it was written, so that equal rows give equal bytes.
"""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

from krea_dagster.curation.export.image_content import (
    CorruptShard,
    ExportedImage,
    ShardContent,
    check_picture,
)


def write_tar(path: Path, content: ShardContent, pictures: Iterator[ExportedImage]) -> None:
    """Write a shard; one image is in memory at a time."""
    prompts = content.facts["prompt"]
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for picture in pictures:
            item = picture.item
            line = json.dumps(content.ready(item, picture.sha256), ensure_ascii=False)
            _add(tar, item.file, picture.data)
            _add(tar, f"{item.key}.txt", (prompts[item.place].as_py() or "").encode())
            _add(tar, f"{item.key}.json", line.encode())


def check_tar(path: Path, content: ShardContent) -> list[str]:
    """Read a shard back; return the sha256 of each image in it. Raises CorruptShard."""
    prompts = content.facts["prompt"]
    found: list[str] = []
    try:
        with tarfile.open(path, "r:") as tar:
            for item in content.items:
                sha256 = check_picture(item, _next(tar, item.file))
                text = _next(tar, f"{item.key}.txt").decode()
                record = json.loads(_next(tar, f"{item.key}.json"))
                if text != (prompts[item.place].as_py() or ""):
                    raise CorruptShard(f"{path.name}: the prompt of {item.key} is another")
                if record != content.ready(item, sha256):
                    raise CorruptShard(f"{path.name}: the row of {item.key} is another")
                found.append(sha256)
            if tar.next() is not None:
                raise CorruptShard(f"{path.name} holds more than it should")
    except (tarfile.TarError, ValueError, EOFError) as error:
        raise CorruptShard(f"{path.name} cannot be read: {error}") from None
    return found


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    info.mode = 0o644
    tar.addfile(info, io.BytesIO(data))


def _next(tar: tarfile.TarFile, name: str) -> bytes:
    info = tar.next()
    # All that were read are kept otherwise, for looking them up by name.
    tar.members = []  # type: ignore[attr-defined] # the stubs do not have it
    file = None if info is None or info.name != name else tar.extractfile(info)
    if file is None:
        raise CorruptShard(f"{name} is missing, or in another place")
    with file:
        return file.read()

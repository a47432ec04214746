"""The images of a shard: read from storage, verified against the manifest, prepared for writing.

A file whose sha256 differs from the manifest's is not exported. Optionally the generation's
parameters are written into PNG files, as a text chunk after the header: the pixels stay the same,
and removing the chunk restores the original file.
"""

from __future__ import annotations

import hashlib
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import pyarrow as pa

from krea_dagster.curation.export.json_rows import records, to_json
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.errors import KreaError

#: The columns in the text chunk.
_PARAMETERS: Final = (
    "prompt",
    "model",
    "seed",
    "size",
    "quality",
    "prompt_id",
    "sample",
    "request_key",
    "image_sha256",
)

#: The chunk's keyword, which image viewers look for.
_KEYWORD: Final = b"parameters"
_PNG: Final = b"\x89PNG\r\n\x1a\n"
#: Where a PNG's header chunk ends: 8 bytes of signature, 25 of IHDR.
_HEADER: Final = 33

_NAMED: Final = 20


@dataclass(frozen=True)
class BadImage:
    """A file that differs from the manifest."""

    prompt_id: str
    sample: int
    location: str
    why: str

    def __str__(self) -> str:
        return f"{self.prompt_id} sample {self.sample}: {self.location} {self.why}"


class ImagesNotAsStored(KreaError):
    """Files are missing or have changed since they were verified; nothing was published.

    ``bad`` has all of them, the text the first twenty.
    """

    def __init__(self, bad: Sequence[BadImage]) -> None:
        self.bad = tuple(bad)
        super().__init__(self.bad)

    def __str__(self) -> str:
        one = len(self.bad) == 1
        lines = [
            (
                f"{'1 image differs' if one else f'{len(self.bad)} images differ'} from the "
                "manifest. Nothing was published, and earlier exports are unchanged. A run of "
                "these partitions (krea-dagster materialize) fetches files that EvoLink still has."
            ),
            *(f"  {bad}" for bad in self.bad[:_NAMED]),
        ]
        if len(self.bad) > _NAMED:
            lines.append(f"  … and {len(self.bad) - _NAMED} more")
        return "\n".join(lines)


class CorruptShard(KreaError):
    """A shard does not have the content that it should."""


@dataclass(frozen=True)
class ImageEntry:
    """One image of a shard. ``record`` has its exported columns; ``file`` is its name."""

    place: int
    key: str
    file: str
    sha256: str
    location: str
    record: dict[str, Any]
    parameters: str | None


@dataclass(frozen=True)
class ExportedImage:
    """An image file to write, and its hash, which embedded parameters change."""

    item: ImageEntry
    data: bytes
    sha256: str


@dataclass(frozen=True)
class ShardContent:
    """The rows of a shard in order, without their images. ``table`` has the exported columns."""

    table: pa.Table
    facts: pa.Table
    keys: Sequence[str]
    embed: bool

    @cached_property
    def items(self) -> list[ImageEntry]:
        """Return the images, one per row."""
        facts = self.facts.to_pydict()
        made = []
        for place, (key, record) in enumerate(zip(self.keys, records(self.table), strict=True)):
            location = facts["image_path"][place]
            ending = ending_of(location)
            parameters = (
                to_json({name: facts[name][place] for name in _PARAMETERS})
                if self.embed and ending == "png"
                else None
            )
            made.append(
                ImageEntry(
                    place,
                    key,
                    f"{key}.{ending}",
                    facts["image_sha256"][place],
                    location,
                    record,
                    parameters,
                )
            )
        return made

    def ready(self, item: ImageEntry, exported: str) -> dict[str, Any]:
        """Return a row's record to write."""
        return {**item.record, "exported_sha256": exported} if self.embed else item.record


def ending_of(location: str) -> str:
    """Return the file extension of an image, which was chosen by its content."""
    return location.rpartition("/")[2].rpartition(".")[2].lower()


#: The columns of ``ShardContent.facts``.
FACTS: Final = tuple(dict.fromkeys(["image_path", *_PARAMETERS]))


def read_images(
    content: ShardContent, storage: Storage, bad: Callable[[BadImage], object]
) -> Iterator[ExportedImage]:
    """Yield the images of a shard; bad ones are reported and left out."""
    facts = content.facts
    for item in content.items:
        try:
            with storage.open(storage.name_of(item.location)) as file:
                data = file.read()
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            why = "is missing" if missing else f"cannot be read: {error}"
        else:
            sha256 = hashlib.sha256(data).hexdigest()
            if sha256 == item.sha256:
                yield _exported(item, data)
                continue
            why = f"has the sha256 {sha256} instead of {item.sha256}"
        bad(
            BadImage(
                facts["prompt_id"][item.place].as_py(),
                facts["sample"][item.place].as_py(),
                item.location,
                why,
            )
        )


def check_image(item: ImageEntry, data: bytes) -> str:
    """Return the sha256 of an exported image. Raises CorruptShard where it is another image."""
    sha256 = hashlib.sha256(data).hexdigest()
    original = sha256
    if item.parameters is not None:
        plain, text = without_parameters(data)
        original = hashlib.sha256(plain).hexdigest()
        if text != item.parameters:
            raise CorruptShard(f"{item.file} has other embedded parameters")
    if original != item.sha256:
        raise CorruptShard(f"{item.file} has the sha256 {original} instead of {item.sha256}")
    return sha256


def _exported(item: ImageEntry, data: bytes) -> ExportedImage:
    if item.parameters is None:
        return ExportedImage(item, data, item.sha256)
    made = with_parameters(data, item.parameters)
    return ExportedImage(item, made, hashlib.sha256(made).hexdigest())


def with_parameters(data: bytes, text: str) -> bytes:
    """Return a PNG file with a text chunk after its header."""
    body = _KEYWORD + b"\0\0\0\0\0" + text.encode()
    chunk = struct.pack(">I", len(body)) + b"iTXt" + body
    return data[:_HEADER] + chunk + struct.pack(">I", zlib.crc32(chunk[4:])) + data[_HEADER:]


def without_parameters(data: bytes) -> tuple[bytes, str | None]:
    """Undo ``with_parameters``: return the original file and the text, None where it has none."""
    if not data.startswith(_PNG) or data[_HEADER + 4 : _HEADER + 8] != b"iTXt":
        return data, None
    (length,) = struct.unpack_from(">I", data, _HEADER)
    body = data[_HEADER + 8 : _HEADER + 8 + length]
    begin = _KEYWORD + b"\0\0\0\0\0"
    if not body.startswith(begin):
        return data, None
    end = _HEADER + 12 + length
    return data[:_HEADER] + data[end:], body[len(begin) :].decode("utf-8", "replace")


def written_schema(exported: pa.Schema, *, embed: bool) -> pa.Schema:
    """Return the columns of the rows: those that are exported, and the hash of a changed file."""
    added = [pa.field("exported_sha256", pa.string())] if embed else []
    return pa.schema([pa.field(one.name, one.type) for one in (*exported, *added)])


def written_columns(content: ShardContent, places: Sequence[int], shas: Sequence[str]) -> pa.Table:
    """Return these rows of a shard in the columns of ``written_schema``."""
    table = content.table.take(pa.array(list(places), pa.int64()))
    if not content.embed:
        return table
    return table.append_column("exported_sha256", pa.array(shas, pa.string()))

"""The images of a shard: read from storage, verified against the manifest, prepared for writing.

A file whose sha256 differs from the manifest's is not exported.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final, NamedTuple, TypeAlias

import pyarrow as pa

from krea_dagster.curation.export.image_edits import ImageEdits
from krea_dagster.curation.export.json_rows import records, to_json
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import DECODE_ERRORS
from krea_dagster.errors import KreaError

#: The columns of a file that an export has changed; ``image_sha256`` is of the stored one.
_ADDED: Final = (
    pa.field("exported_sha256", pa.string()),
    pa.field("exported_bytes", pa.int64()),
)
#: Names that the columns of a changed file have.
ADDED_NAMES: Final = tuple(one.name for one in _ADDED)

#: Calls a function with each item, and yields the results in order.
InOrder: TypeAlias = Callable[[Callable[[Any], Any], Iterable[Any]], Iterable[Any]]

#: The columns of the parameters.
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
    model: str
    parameters: str | None


class ExportedFile(NamedTuple):
    """What is known of an exported file."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ExportedImage:
    """An image file to write."""

    item: ImageEntry
    data: bytes
    file: ExportedFile

    @classmethod
    def of(cls, item: ImageEntry, data: bytes) -> ExportedImage:
        """Return an image, with the hash of its file."""
        return cls(item, data, ExportedFile(hashlib.sha256(data).hexdigest(), len(data)))


@dataclass(frozen=True)
class ShardContent:
    """The rows of a shard in order, without their images. ``table`` has the exported columns."""

    table: pa.Table
    facts: pa.Table
    keys: Sequence[str]
    edits: ImageEdits

    @cached_property
    def items(self) -> list[ImageEntry]:
        """Return the images, one per row."""
        facts = self.facts.to_pydict()
        made = []
        for place, (key, record) in enumerate(zip(self.keys, records(self.table), strict=True)):
            location = facts["image_path"][place]
            ending = self.edits.ending(ending_of(location))
            parameters = (
                to_json({name: facts[name][place] for name in _PARAMETERS})
                if self.edits.parameters and ending == "png"
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
                    facts["model"][place] or "",
                    parameters,
                )
            )
        return made

    def ready(self, item: ImageEntry, file: ExportedFile) -> dict[str, Any]:
        """Return a row's record to write."""
        if not self.edits.changes_files:
            return item.record
        return {**item.record, "exported_sha256": file.sha256, "exported_bytes": file.bytes}


def ending_of(location: str) -> str:
    """Return the file extension of an image, which was chosen by its content."""
    return location.rpartition("/")[2].rpartition(".")[2].lower()


#: The columns of ``ShardContent.facts``.
FACTS: Final = tuple(dict.fromkeys(["image_path", *_PARAMETERS]))


def read_images(
    content: ShardContent,
    storage: Storage,
    bad: Callable[[BadImage], object],
    in_order: InOrder = map,
) -> Iterator[ExportedImage]:
    """Yield the images of a shard, edited; bad ones are reported and left out.

    ``in_order`` calls a function with each item, and yields the results in the order of the items.
    """
    for found in in_order(lambda item: _edited(content, item, storage), content.items):
        if isinstance(found, BadImage):
            bad(found)
        else:
            yield found


def check_stored(
    content: ShardContent, storage: Storage, bad: Callable[[BadImage], object]
) -> None:
    """Read the images of a shard, and report bad ones."""
    for item in content.items:
        if isinstance(found := _read(content, item, storage), BadImage):
            bad(found)


def _edited(content: ShardContent, item: ImageEntry, storage: Storage) -> ExportedImage | BadImage:
    data = _read(content, item, storage)
    if isinstance(data, BadImage):
        return data
    if not content.edits.changes_files:
        return ExportedImage(item, data, ExportedFile(item.sha256, len(data)))
    try:
        edited = content.edits.apply(data, ending_of(item.file), item.model, item.parameters)
    except DECODE_ERRORS as error:
        return _bad(content, item, f"cannot be exported: {error}")
    return ExportedImage.of(item, edited)


def _read(content: ShardContent, item: ImageEntry, storage: Storage) -> bytes | BadImage:
    """Return the file of an image, as the manifest has it."""
    try:
        with storage.open(storage.name_of(item.location)) as file:
            data: bytes = file.read()
    except OSError as error:
        missing = isinstance(error, FileNotFoundError)
        return _bad(content, item, "is missing" if missing else f"cannot be read: {error}")
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != item.sha256:
        return _bad(content, item, f"has the sha256 {sha256} instead of {item.sha256}")
    return data


def _bad(content: ShardContent, item: ImageEntry, why: str) -> BadImage:
    prompt_id, sample = (content.facts[name][item.place] for name in ("prompt_id", "sample"))
    return BadImage(prompt_id.as_py(), sample.as_py(), item.location, why)


def check_image(item: ImageEntry, data: bytes, file: ExportedFile) -> None:
    """Raise CorruptShard if an exported image is another file."""
    sha256 = hashlib.sha256(data).hexdigest()
    if sha256 != file.sha256:
        raise CorruptShard(f"{item.file} has the sha256 {sha256} instead of {file.sha256}")


def written_schema(exported: pa.Schema, edits: ImageEdits) -> pa.Schema:
    """Return the columns of the rows: those that are exported, and those of a changed file."""
    added = _ADDED if edits.changes_files else ()
    return pa.schema([pa.field(one.name, one.type) for one in (*exported, *added)])


def written_columns(
    content: ShardContent, places: Sequence[int], files: Sequence[ExportedFile]
) -> pa.Table:
    """Return these rows of a shard in the columns of ``written_schema``."""
    table = content.table.take(pa.array(list(places), pa.int64()))
    if not content.edits.changes_files:
        return table
    for column, values in zip(_ADDED, zip(*files, strict=True), strict=True):
        table = table.append_column(column, pa.array(values, column.type))
    return table

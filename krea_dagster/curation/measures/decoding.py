"""Reads image files, decodes them in threads, and computes the measures that are missing.

A bounded number of files is decoded ahead of the custom functions, which are called in the caller's
thread, a batch at a time. So memory does not grow with the number of files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import Final

from PIL import Image

from krea_dagster.curation.in_order import in_order
from krea_dagster.curation.measures.builtin import Measures, measure, to_grey_or_rgb
from krea_dagster.curation.measures.cache import MeasureWriter
from krea_dagster.curation.measures.custom import Measure
from krea_dagster.curation.measures.measures_table import BUILTIN
from krea_dagster.engine.storage.storage import Storage
from krea_dagster.engine.storage.verify import verify_image
from krea_dagster.errors import ConfigError, DownloadError, ImageRejected

#: A function that fails on this many images in a row counts as broken.
_MAX_FAILURES: Final = 10

#: Threads per core where files are behind a URL: they mostly wait.
_REMOTE_THREADS: Final = 4


@dataclass(frozen=True)
class ImageFile:
    """A file to read, by the manifest, and the names of the measures it lacks."""

    sha256: str
    path: str
    pixels: tuple[int, int]
    prompt_id: str
    sample: int
    missing: Sequence[str]


@dataclass(frozen=True)
class MeasureFailure:
    """An image that could not be measured, and why; ``measure`` is the custom one that failed."""

    file: ImageFile
    why: str
    measure: str = BUILTIN

    def __str__(self) -> str:
        by = f", {self.measure}" if self.measure else ""
        file = self.file
        return f"{file.prompt_id}, sample {file.sample}{by}: {self.why} ({file.path})"


@dataclass(frozen=True)
class _Decoded:
    file: ImageFile
    measures: Measures | None = None
    image: Image.Image | None = None
    why: str = ""


def measure_files(
    storage: Storage,
    files: Iterable[ImageFile],
    custom: Mapping[str, Measure],
    writers: Mapping[str, MeasureWriter],
    *,
    threads: int | None = None,
    on_read: Callable[[], None] = lambda: None,
) -> list[MeasureFailure]:
    """Add the missing measures of these files to ``writers``; return what failed.

    ``custom`` and ``writers`` are by name. ``on_read`` is called after each file. Raises
    ConfigError where a custom function fails on every image, and StorageError.
    """
    failures: list[MeasureFailure] = []
    batches = {name: _CustomBatch(one, writers[name], failures) for name, one in custom.items()}
    with closing(_decode_ahead(storage, files, threads or _threads(storage))) as decoded:
        for found in decoded:
            on_read()
            if found.why:
                failures.append(MeasureFailure(found.file, found.why))
                continue
            if found.measures is not None:
                writers[BUILTIN].add(found.file.sha256, found.measures.values())
            if found.image is not None:
                for name in found.file.missing:
                    if name in batches:
                        batches[name].add(found.file, found.image)
    for one in batches.values():
        one.run()
    return failures


def _threads(storage: Storage) -> int:
    cores = os.cpu_count() or 1
    return cores if storage.folder is not None else cores * _REMOTE_THREADS


def _decode_ahead(
    storage: Storage, files: Iterable[ImageFile], threads: int
) -> Generator[_Decoded, None, None]:
    """Yield the decoded files in order, with at most twice as many as ``threads`` under way."""
    with ThreadPoolExecutor(threads, "krea-measure") as pool:
        decode = partial(_decode, storage)
        with closing(in_order(pool, decode, files, 2 * threads)) as decoded:
            yield from decoded


def _decode(storage: Storage, file: ImageFile) -> _Decoded:
    images: list[Image.Image] = []
    try:
        with storage.open(storage.name_of(file.path)) as opened:
            data = opened.read()
        if hashlib.sha256(data).hexdigest() != file.sha256:
            return _Decoded(file, why="the file is not the one that was stored: its hash differs")
        verify_image(data, file.pixels, on_decoded=images.append)
    except FileNotFoundError:
        return _Decoded(file, why="the file is missing")
    except (DownloadError, OSError) as error:
        # An image of one flat colour is rejected after decoding; its measures show that.
        if not (isinstance(error, ImageRejected) and images):
            return _Decoded(file, why=str(error))
    (image,) = images
    needs_image = any(name != BUILTIN for name in file.missing)
    return _Decoded(
        file,
        measures=measure(image) if BUILTIN in file.missing else None,
        image=to_grey_or_rgb(image).convert("RGB") if needs_image else None,
    )


class _CustomBatch:
    """Collects images for a custom function, calls it, and writes its values.

    A batch that fails is repeated image by image, so that one bad image loses one value and is
    named.
    """

    def __init__(
        self, custom: Measure, writer: MeasureWriter, failures: list[MeasureFailure]
    ) -> None:
        self._measure = custom
        self._writer = writer
        self._failures = failures
        self._waiting: list[tuple[ImageFile, Image.Image]] = []
        self._failed_in_a_row = 0

    def add(self, file: ImageFile, image: Image.Image) -> None:
        self._waiting.append((file, image))
        if len(self._waiting) >= self._measure.batch_size:
            self.run()

    def run(self) -> None:
        """Call the function on the images that wait."""
        batch, self._waiting = self._waiting, []
        if not batch or (error := self._call(batch)) is None:
            return
        if len(batch) == 1:
            self._fail(batch[0][0], error)
            return
        for one in batch:
            if (error := self._call([one])) is not None:
                self._fail(one[0], error)

    def _call(self, batch: Sequence[tuple[ImageFile, Image.Image]]) -> Exception | None:
        try:
            values = self._measure.values([image for _, image in batch])
        except Exception as error:  # noqa: BLE001 - a user's function: reported with its image
            return error
        for (file, _), value in zip(batch, values, strict=True):
            self._writer.add(file.sha256, (value,))
        self._failed_in_a_row = 0
        return None

    def _fail(self, file: ImageFile, error: Exception) -> None:
        name = type(error).__name__
        failure = MeasureFailure(
            file, f"{name}: {error}" if str(error) else name, self._measure.name
        )
        self._failures.append(failure)
        self._failed_in_a_row += 1
        if self._failed_in_a_row >= _MAX_FAILURES:
            raise ConfigError(
                f"the measure {self._measure.name!r} failed on {_MAX_FAILURES} images in a row; "
                f"the last was {failure}. Measures computed before are kept. Correct its function "
                "and run again"
            ) from error
